"""Where a process runs: what the event log says of every actor, what signals and stack dumps need; its cores."""

from __future__ import annotations

import atexit
import gc
import os
import socket
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of large libraries. What they make stays, so the garbage collector need not look through it.

    Looking again and again, while they are imported and at every full collection after, is a third of the time that an
    engine of a small model takes to start.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # or triton would list what is left when the interpreter is taken down
        if collects:
            gc.enable()


def process_facts() -> dict[str, Any]:
    """pid, host name, and Ray's node id (None outside Ray)."""
    ray = sys.modules.get("ray")  # a process that has not imported it is in none
    node = ray.get_runtime_context().get_node_id() if ray and ray.is_initialized() else None
    return {"pid": os.getpid(), "host": socket.gethostname(), "node": node}


def pin(_: Any, side: int, index: int, count: int) -> None:
    """Keep this process on its share of this machine's cores: process `index` of `count` of the first or second half.

    Called on an actor, which comes as the first argument. Where there are fewer cores than processes, some share one.
    """
    cores = sorted(os.sched_getaffinity(0))
    half = cores[: len(cores) // 2] if side == 0 else cores[len(cores) // 2 :]
    half = half or cores
    own = half[index * len(half) // count : (index + 1) * len(half) // count] or [half[index % len(half)]]
    keep_on(own)


def keep_on(cores: Collection[int]) -> None:
    """Every thread of this process onto these cores; threads that come later inherit it."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(int(thread), cores)
