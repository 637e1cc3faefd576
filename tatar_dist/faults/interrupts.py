"""Stop a run at its next safe point on SIGINT, SIGTERM or SIGUSR1, and set its exit status.

    Ctrl-C (SIGINT)      exit 130; a second Ctrl-C stops at once
    SIGTERM, SIGUSR1     preemption: exit 75 (EX_TEMPFAIL: the same command resumes), within `grace_seconds`

A safe point is the end of a step, or a wait inside `Waits.interruptible` (waiting.py): nothing has been learned since
the last step. A preempted run that does not reach one in time is ended anyway and resumes from its last checkpoint.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType

from tatar_dist.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, Interrupted, StopRequested

MARGIN_S = 5.0  # of the grace, for closing down


class StopSignals:
    """Context manager; `requested` is true after the first signal, `status` is the exit status."""

    def __init__(self, grace_seconds: float | None = None) -> None:
        self.requested, self.name, self.status = False, "", EXIT_INTERRUPTED
        self.grace_seconds = grace_seconds
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._handle)
        if self.grace_seconds is not None:
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._grace_over)
        return self

    def __exit__(self, *_: object) -> None:
        if self.status == EXIT_PREEMPTED and self.grace_seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def raise_if_stopping(self) -> None:
        """Raise StopRequested after a signal."""
        if self.requested:
            raise StopRequested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.requested:
                raise KeyboardInterrupt
            message = b"\nstopping at the next safe point; Ctrl-C again stops at once\n"
        else:
            message = b"\nasked to stop: writing a checkpoint\n"
            if self.grace_seconds is not None and self.status != EXIT_PREEMPTED:
                signal.setitimer(signal.ITIMER_REAL, max(1.0, self.grace_seconds - MARGIN_S))
            self.status = EXIT_PREEMPTED
        self.requested, self.name = True, signal.Signals(number).name
        with suppress(OSError):
            os.write(2, message)  # print may not be re-entered

    def _grace_over(self, number: int, frame: FrameType | None) -> None:
        raise Interrupted(
            f"no safe point within checkpoint.grace_seconds={self.grace_seconds:g}: stopped; the same command "
            "continues from the last checkpoint",
            self.status,
        )
