"""Prompts on their way to the engines: one chunk an engine call, in a queue that chunks come back to after a fault."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tatar_dist.types import Prompt


@dataclass(eq=False)
class Chunk:
    """Prompts of one engine call. `failures`: engines that ended on it; `done` once any engine's answer is taken."""

    prompts: list[Prompt]
    failures: int = 0
    done: bool = False


class Queue:
    """Chunks to be handed out: those that an engine left undone first, then new ones, made one ahead of need."""

    def __init__(self, parts: Iterable[list[Prompt]]) -> None:
        self._again: deque[Chunk] = deque()
        self._parts = iter(parts)

    def __bool__(self) -> bool:
        if not self._again and (part := next(self._parts, None)) is not None:
            self._again.append(Chunk(part))
        return bool(self._again)

    def take(self) -> Chunk | None:
        return self._again.popleft() if self else None

    def put_back(self, chunks: Sequence[Chunk]) -> None:
        """They come first, in this order."""
        self._again.extendleft(reversed(chunks))

    def clear(self) -> None:
        self._again.clear()
        self._parts = iter(())
