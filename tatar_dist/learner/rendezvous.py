"""Meeting of learners without an open port: a Ray actor as store, gloo's sockets silenced.

torch's own TCPStore listens without authentication, and whoever writes into it decides whom a rank connects to. Here
keys travel as calls of a Ray actor, which only holders of the cluster's token can make; process_group.py makes them.

gloo accepts any connection. Once all ranks are connected nothing more is expected, but its sockets stay open for as
long as the process group lives, and closing them would send gloo's event loop spinning. A filter in the kernel that
drops every packet (Linux, no privilege needed) leaves them silent; established connections do not notice.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct

import psutil

SO_ATTACH_FILTER = 26
RETURN_NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)  # struct sock_filter: BPF_RET | BPF_K, k = 0 bytes kept


class Rendezvous:
    """The keys and values. Plain class with coroutines: waiting for a key blocks no other call."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._changed = asyncio.Condition()

    async def set(self, key: str, value: bytes) -> None:
        async with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    async def add(self, key: str, amount: int) -> int:
        total = int(self._values.get(key, b"0")) + amount
        await self.set(key, str(total).encode())
        return total

    async def get(self, keys: list[str], timeout_s: float) -> list[bytes] | None:
        """Return the values once all keys are there; None if that takes longer."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: all(k in self._values for k in keys))
        except TimeoutError:
            return None
        return [self._values[k] for k in keys]

    async def missing(self, keys: list[str]) -> list[str]:
        return [k for k in keys if k not in self._values]

    async def delete(self, key: str) -> bool:
        return self._values.pop(key, None) is not None


def listening() -> set[int]:
    """Return the file descriptors of this process's listening TCP sockets."""
    return {c.fd for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def silence(descriptors: set[int]) -> None:
    """Let the kernel drop whatever arrives at these listening sockets from now on."""
    program = ctypes.create_string_buffer(RETURN_NOTHING)
    for fd in descriptors:
        with socket.socket(fileno=os.dup(fd)) as s:
            s.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))
