"""Waits for actors' calls: each has a deadline, looks twice a second, names late and dead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from tatar_dist.errors import RunError
from tatar_dist.faults.interrupts import StopSignals
from tatar_dist.faults.stall import StallDetector

TICK_S = 0.5  # between two checks of a wait


class Waits:
    """End waits before their deadline: on a stall and, inside `interruptible`, on a signal.

    The cluster, the engine pool, the learner group, the weight pushes and the client of the reward actor share one
    `Waits`. Only the thread that writes checkpoints waits without it.

    Args:
        stop: the stop signals, if any.
        watch: the detector of stalls, if any.
    """

    def __init__(self, stop: StopSignals | None = None, watch: StallDetector | None = None) -> None:
        self._stop, self._watch = stop, watch
        self._may_stop: Callable[[], bool] | None = None
        self._stalls = True

    def check(self) -> None:
        """Raise if the current wait must end.

        Raises:
            Stalled: nothing has moved for too long. StopRequested: a signal came, inside `interruptible`.
        """
        if self._watch is not None and self._stalls:
            self._watch.raise_if_asked()
        may_stop, self._may_stop = self._may_stop, None  # `may_stop` may itself wait and call `check`
        try:
            stops = may_stop is not None and may_stop()
        finally:
            self._may_stop = may_stop
        if stops and self._stop is not None:
            self._stop.raise_if_stopping()

    def progress(self) -> None:
        """Report progress to the detector of stalls."""
        if self._watch is not None:
            self._watch.progress()

    @contextmanager
    def interruptible(self, when: Callable[[], bool] = lambda: True, stalls: bool = True) -> Iterator[None]:
        """Let a signal end every wait inside at once if `when()` is true; outside it ends none.

        Args:
            when: called at every check; an exception ends the wait, too.
            stalls: False where the deadline of a wait is longer than the limit of a stall.
        """
        before, (self._may_stop, self._stalls) = (self._may_stop, self._stalls), (when, stalls)
        try:
            yield
        finally:
            self._may_stop, self._stalls = before

    def gather(self, refs: Sequence[Any], timeout: float, who: str, error: type[RunError]) -> list[Any]:
        """Wait for one call per actor and return the results in order.

        Args:
            refs: Ray references, one an actor.
            timeout: seconds without any answer until `error` is raised for the late ones.
            who: what an actor is called in the error, for example "learner rank".
            error: raised when an actor died or is late. An exception of a call itself is raised unchanged and at
                once, because the other actors may be waiting for that one.
        """
        pending, since = list(refs), time.monotonic()
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=TICK_S)
            self.check()
            if not done:
                if time.monotonic() - since > timeout:
                    late = [i for i, ref in enumerate(refs) if ref in pending]
                    raise error(f"{who}(s) {late} did not answer within {timeout:g} s")
                continue
            since = time.monotonic()
            try:
                ray.get(done[0])
            except ray.exceptions.RayTaskError:
                raise
            except ray.exceptions.RayError as e:  # died, was out of memory, lost its node
                raise error(f"{who} {list(refs).index(done[0])} died: {first_line(e)}") from e
        return ray.get(list(refs))


def first_line(error: BaseException) -> str:
    """Return an error's message in one line; for a remote call its cause, not Ray's traceback."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"


def error_of(ref: Any) -> Exception | None:
    """Return the error of a finished call, or None. Fetches the result to this process."""
    try:
        ray.get(ref)
    except ray.exceptions.RayError as e:
        return e
    return None
