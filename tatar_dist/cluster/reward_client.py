"""The reward actor as the controller sees it: one call a global batch. It holds nothing, so its death costs a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray

from tatar_dist.errors import RunError
from tatar_dist.faults.waiting import Waits, first_line
from tatar_dist.types import Group, ScoredGroup

ATTEMPTS = 3


class ScorerFailed(RunError):
    """The reward actor died or was late."""


class RemoteScorer:
    """`make()` gives a Ray actor handle of `RewardScorer`; a new one is made when it dies or is late."""

    def __init__(
        self,
        make: Callable[[], Any],
        timeout: float,
        log: Callable[..., None] = lambda event, **fields: None,
        waits: Waits | None = None,
    ) -> None:
        self.make, self.timeout, self.log, self.waits = make, timeout, log, waits or Waits()
        self._actor: Any = None

    def score(self, groups: Sequence[Group], step: int = 0) -> tuple[list[ScoredGroup], dict[str, float]]:
        """The groups with their rewards, in order, and metrics. Raises ScorerFailed after three attempts."""
        attempt = 0
        while True:
            try:
                if self._actor is None:
                    self._actor = self.make()
                    (facts,) = self._wait(self._actor.facts.remote())
                    self.log("reward/ready", **facts)
                return self._wait(self._actor.score.remote(groups, step))[0]
            except ScorerFailed as e:
                attempt += 1
                self.log("reward/failed", reason=first_line(e), attempt=attempt)
                self.end()
                if attempt == ATTEMPTS:
                    raise

    def end(self) -> None:
        """End the actor, whatever it does; the next call makes another."""
        with suppress(Exception):  # it may be dead already
            ray.kill(self._actor)
        self._actor = None

    def _wait(self, ref: Any) -> list[Any]:
        return self.waits.gather([ref], self.timeout, "reward actor", ScorerFailed)
