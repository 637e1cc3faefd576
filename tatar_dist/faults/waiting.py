"""Waiting for one call on each of several actors: the first that fails or is late is named. Nothing waits for ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from tatar_dist.errors import RunError

TICK_S = 0.5  # how often a wait looks up


def wait_all(
    refs: Sequence[Any],
    timeout: float,
    who: str,
    error: type[RunError],
    check: Callable[[], None] = lambda: None,
) -> list[Any]:
    """The results of one call per actor, in order.

    Args:
        refs: Ray references, one an actor.
        timeout: seconds without any answer after which the late ones are given up.
        who: what an actor is called in the error, for example "learner rank".
        error: raised when an actor died or is late. What a call itself raised is raised as it is, and at once, because
            the other actors may be waiting for that one.
        check: called twice a second; may raise to leave the wait.
    """
    pending, since = list(refs), time.monotonic()
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=TICK_S)
        check()
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
    """What an error says, in one line: of what a call raised the cause, not Ray's traceback around it."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"


def error_of(ref: Any) -> Exception | None:
    """The error that a finished call ended with, or None. Fetches its result to this process."""
    try:
        ray.get(ref)
    except ray.exceptions.RayError as e:
        return e
    return None
