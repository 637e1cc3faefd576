"""The keys and values of the learners' torch.distributed store, kept by a Ray actor.

torch's own TCPStore listens without authentication, and whoever writes into it decides whom a rank connects to. Here
keys travel as calls of a Ray actor, which only holders of the cluster's token can make; process_group.py makes them.
"""

from __future__ import annotations

import asyncio


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

    async def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        held = self._values.get(key)
        if held == expected or (held is None and not expected):
            await self.set(key, desired)
            return desired
        return expected if held is None else held

    async def get(self, keys: list[str], timeout_s: float) -> list[bytes] | None:
        """The values once all keys are there; None if that takes longer."""
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

    async def size(self) -> int:
        return len(self._values)
