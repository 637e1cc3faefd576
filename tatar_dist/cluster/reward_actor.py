"""The reward actor: sees each global batch whole. A thin shell around `rewards.score`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tatar_dist.config.schema import GRPOConfig, RewardConfig
from tatar_dist.rewards.batch import batch_of_groups
from tatar_dist.rewards.presets import load_preset
from tatar_dist.rewards.score import reward_metrics, score_batch, scored_groups
from tatar_dist.run.failpoints import Failpoints
from tatar_dist.run.log import open_log
from tatar_dist.run.process import process_facts
from tatar_dist.types import Group, ScoredGroup


class RewardScorer:
    """Plain class: `tatar_dist.cluster.ray_cluster` makes the Ray actor of it."""

    def __init__(self, config: RewardConfig, grpo: GRPOConfig, failpoints: Failpoints) -> None:
        open_log(failpoints.run, "reward")
        self.preset = load_preset(config.preset, weights=config.weights, params=config.params)
        self.grpo, self.failpoints = grpo, failpoints

    def facts(self) -> dict[str, Any]:
        return process_facts()

    def score(self, groups: Sequence[Group], step: int) -> tuple[list[ScoredGroup], dict[str, float]]:
        """Score the global batch of `step`; returns the groups in order and the reward/* and completion/* metrics."""
        self.failpoints.reach("reward.score", step=step)
        batch = batch_of_groups(groups)
        scored = score_batch(batch, self.preset, advantage=self.grpo.advantage, eps=self.grpo.advantage_eps)
        return scored_groups(groups, scored), reward_metrics(batch, scored)
