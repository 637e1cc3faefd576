"""The reward actor, which sees each global batch whole, and the controller's client of it.

The actor holds no state, so its death costs one call: the client makes another and asks again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray

from tatar_dist.config.schema import GRPOConfig, RewardConfig
from tatar_dist.errors import RunError
from tatar_dist.faults.waiting import Waits, first_line
from tatar_dist.rewards.batch import batch_of_groups
from tatar_dist.rewards.metrics import reward_metrics
from tatar_dist.rewards.presets import load_preset
from tatar_dist.rewards.score import score_batch, scored_groups
from tatar_dist.run.failpoints import Failpoints
from tatar_dist.run.process import open_log, process_facts
from tatar_dist.types import Group, ScoredGroup

ATTEMPTS = 3


class RewardScorer:
    """A thin shell around `rewards.score`; `cluster.ray_cluster` makes the Ray actor of it."""

    def __init__(self, config: RewardConfig, grpo: GRPOConfig, failpoints: Failpoints) -> None:
        open_log(failpoints.run, "reward")
        self.preset = load_preset(config.preset, weights=config.weights, params=config.params)
        self.grpo, self.failpoints = grpo, failpoints

    def facts(self) -> dict[str, Any]:
        return process_facts()

    def score(self, groups: Sequence[Group], step: int) -> tuple[list[ScoredGroup], dict[str, float]]:
        """Score the batch of `step`; return groups in order, and reward/* and completion/* metrics."""
        self.failpoints.reach("reward.score", step=step)
        batch = batch_of_groups(groups)
        g = self.grpo
        scored = score_batch(batch, self.preset, advantage=g.advantage, eps=g.advantage_eps, scale=g.scaling)
        return scored_groups(groups, scored), reward_metrics(batch, scored)


class ScorerFailed(RunError):
    """The reward actor died or did not answer in time."""


class RemoteScorer:
    """Client of a `RewardScorer` actor: the Ray handle that `make()` returns, remade on failure."""

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
        """Return the scored groups, in order, and metrics. Raises ScorerFailed after three attempts."""
        attempt = 0
        while True:
            try:
                if self._actor is None:
                    self._actor = self.make()
                    self.log("reward/ready", **self._wait(self._actor.facts.remote()))
                return self._wait(self._actor.score.remote(groups, step))
            except ScorerFailed as e:
                attempt += 1
                self.log("reward/failed", reason=first_line(e), attempt=attempt)
                self.end()
                if attempt == ATTEMPTS:
                    raise

    def end(self) -> None:
        """Kill the actor; the next call makes another."""
        with suppress(Exception):  # it may be dead already
            ray.kill(self._actor)
        self._actor = None

    def _wait(self, ref: Any) -> Any:
        return self.waits.gather([ref], self.timeout, "reward actor", ScorerFailed)[0]
