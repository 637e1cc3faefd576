"""Waiting for one call on each of several actors: the first that fails or is late is named. Nothing waits for ever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from tatar_dist.errors import RunError


def wait_all(refs: Sequence[Any], timeout: float, who: str, error: type[RunError]) -> list[Any]:
    """The results of one call per actor, in order.

    Args:
        refs: Ray references, one an actor.
        timeout: seconds without any answer after which the late ones are given up.
        who: what an actor is called in the error, for example "learner rank".
        error: raised when an actor died or is late. What a call itself raised is raised as it is, and at once, because
            the other actors may be waiting for that one.
    """
    pending = list(refs)
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=timeout)
        if not done:
            late = [i for i, ref in enumerate(refs) if ref in pending]
            raise error(f"{who}(s) {late} did not answer within {timeout:g} s")
        try:
            ray.get(done[0])
        except ray.exceptions.RayActorError as e:
            raise error(f"{who} {list(refs).index(done[0])} died: {str(e).splitlines()[0]}") from e
    return ray.get(list(refs))
