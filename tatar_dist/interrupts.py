"""Ctrl-C and SIGTERM ask the run to stop at its next safe point; a second Ctrl-C stops at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

EXIT_INTERRUPTED = 130


class Interrupted(Exception):
    """The run stopped at a safe point because it was asked to; its checkpoint is written."""


class Interrupts:
    """Context manager; `requested` turns true at the first signal."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, b"\nstopping at the next safe point; Ctrl-C again stops at once\n")  # print may not be re-entered
