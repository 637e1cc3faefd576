"""Where a process runs: what the event log says of every actor, and what signals and stack dumps need to find it."""

from __future__ import annotations

import os
import socket
from typing import Any


def interface_of(ip: str) -> str | None:
    """The network interface that has this address, None where no one has."""
    import psutil

    if ip.startswith("127."):  # all of them are loopback's, only one is listed
        return "lo"
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == ip for a in addresses):
            return name
    return None


def process_facts() -> dict[str, Any]:
    """pid, host name, and Ray's node id (None outside Ray)."""
    import ray

    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else None
    return {"pid": os.getpid(), "host": socket.gethostname(), "node": node}
