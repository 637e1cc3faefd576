"""The interface of a weight push, and what all ways share: rounds of calls on the engines.

A way of pushing has three sides, in one file: a sender in every learner rank, a receiver in every vLLM worker
(vllm_backend.py hands it the parts), and the controller's side, a `WeightPush`. `object_store.py` works anywhere;
`nccl.py` and `cuda_ipc.py` are for GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import ray

from tatar_dist.errors import LearnersFailed
from tatar_dist.faults.waiting import TICK_S, Waits, error_of, first_line

if TYPE_CHECKING:
    from tatar_dist.learner.group import LearnerGroup


@dataclass(frozen=True)
class PushResult:
    """`sent`: bytes that each engine received. `failed`: {engine index: reason}.

    An engine that failed half-way holds neither the old weights nor the new and must be restarted.
    """

    sent: int
    failed: dict[int, str] = field(default_factory=dict)


class WeightPush(Protocol):
    """One way of loading the learners' weights into engines, {index: actor handle}."""

    def push(self, learners: LearnerGroup, engines: Mapping[int, Any], version: int) -> PushResult:
        """Load the weights as `version`. Raises LearnersFailed: a rank died, failed or is late."""


class Round:
    """Calls on engines of one push. `left`: engines still in it; `failed`: reasons of others.

    Args:
        limit: seconds for each call; an engine that takes longer leaves the push, and an event is logged.
        log: the event log.
    """

    def __init__(
        self, engines: Mapping[int, Any], version: int, limit: float, waits: Waits, log: Callable[..., None]
    ) -> None:
        self.left, self.failed, self.version = dict(engines), dict[int, str](), version
        self._limit, self._waits, self._log = limit, waits, log

    def ask(self, call: Callable[[int, Any], Any]) -> dict[int, Any]:
        """Call each engine that is left, without waiting; an engine answers its calls in order."""
        return {i: call(i, engine) for i, engine in self.left.items()}

    def call(self, what: str, call: Callable[[int, Any], Any]) -> list[Any]:
        """Call each engine and wait for the answers, as `wait`."""
        return self.wait(what, self.ask(call))

    def wait(self, what: str, calls: Mapping[int, Any], given: Any = None) -> list[Any]:
        """Wait for answers up to the limit; engines that died, failed or are late leave the push.

        Calls of engines that have left it are ignored.

        Raises:
            LearnersFailed: the reference `given` holds an error of the learner instead of a part of the weights.
        """
        calls = {i: ref for i, ref in calls.items() if i in self.left}
        deadline, waiting = time.monotonic() + self._limit, list(calls.values())
        while waiting and time.monotonic() < deadline:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=TICK_S)
            if done:
                self._waits.progress()
            self._waits.check()
        answers = []
        for i, ref in calls.items():
            if ref in waiting:
                reason = f"no answer within {self._limit:g} s"
                self._log("push/late", engine=i, version=self.version, reason=reason)
                self.lose(i, f"{what}: {reason}")
                continue
            try:
                answers.append(ray.get(ref))
            except ray.exceptions.RayError as error:
                if given is not None and (failed := error_of(given)):
                    raise LearnersFailed(f"gathering weights: {first_line(failed)}") from failed
                self.lose(i, f"{what}: {first_line(error)}")
        return answers

    def lose(self, index: int, reason: str) -> None:
        self.failed[index] = reason
        self.left.pop(index, None)


def ask_learners(learners: LearnerGroup, calls: list[Any], limit: float, what: str) -> list[Any]:
    """Return the answers of ranks. LearnersFailed names a rank that died, failed or is late."""
    try:
        return learners.wait(calls, limit)
    except LearnersFailed as e:
        raise LearnersFailed(f"{what}: {e}") from e
    except OSError as e:  # a connection, here: no full disk
        raise LearnersFailed(f"{what}: {first_line(e)}") from e
