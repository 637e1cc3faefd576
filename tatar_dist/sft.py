"""Supervised fine-tuning: the first stage, on the same learners, forward and run directory as GRPO.

In: a checked config whose manifests carry rationales. Out: a run directory; `checkpoints/latest/model` is the model.
The loss is the mean negative log-likelihood of the assistant's tokens over the global batch, end-of-turn included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from tatar_dist.config.schema import Config
from tatar_dist.data.sampler import check_rationales, sft_sampler
from tatar_dist.errors import UserError
from tatar_dist.faults.interrupts import Interrupts
from tatar_dist.learner.sharding import Shard, shard_rows
from tatar_dist.plan.plan import resolve
from tatar_dist.prompts.source import PromptSource, read_manifests
from tatar_dist.run.directory import RunDirectory
from tatar_dist.trainer import Steps, Training
from tatar_dist.types import TASKS, LearnerRow

EVAL_ROWS_PER_DATASET = 64  # held-out rows behind eval/loss: a curve, not a verdict


def run(config: Config) -> None:
    """Train until `sft.max_steps` or `sft.epochs`. Raises Interrupted after a clean stop, UserError for bad input."""
    plan, s = resolve(config, "sft"), config.sft
    with RunDirectory(config) as directory, Interrupts(config.checkpoint.grace_seconds) as stop:
        steps = SFTSteps(config, directory)
        total = s.max_steps or max(1, round(s.epochs * steps.sampler.steps_per_epoch(s.global_batch)))
        Training(config, "sft", plan, steps, total, directory, stop).run()


class SFTSteps(Steps):
    """Read, learn, now and then measure the held-out loss."""

    def __init__(self, config: Config, directory: RunDirectory) -> None:
        self.config, self.directory = config, directory
        self.source = PromptSource(config, directory)
        self.sampler = sft_sampler(read_manifests(config.data, "train"), config.seed, config.data.iqa_fraction)
        self.costs = self.source.backbone.costs()
        self.held_out = _held_out(config, self.source)

    def state(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])

    def step(self, step: int, last: bool) -> dict[str, float]:
        s, start = self.config.sft, time.perf_counter()
        rows = [self.source.sft_row(sample) for sample in self.source.samples(self.sampler, s.global_batch)]
        tokens = sum(len(r.completion_ids) for r in rows)
        self.directory.begin("learn", step)
        report = self.learners.sft_step(self._shards(rows), step, tokens)
        seconds = time.perf_counter() - start
        metrics = {
            **report.metrics,
            "time/learn": report.seconds,
            "time/step": seconds,
            "perf/tokens_per_second": tokens / seconds,
        }
        if self.held_out and (last or (s.eval_every and (step + 1) % s.eval_every == 0)):
            self.directory.begin("evaluate", step)
            sums = self.learners.sft_loss(self._shards(self.held_out))
            for task in TASKS:
                tokens = sums[f"tokens/{task}"]
                metrics[f"eval/loss/{task}"] = sums[f"nll/{task}"] / tokens if tokens else math.nan
        return metrics

    def _shards(self, rows: Sequence[LearnerRow]) -> list[Shard]:
        return shard_rows(rows, len(self.learners.actors), self.config.sft.micro_tokens, self.costs)


def _held_out(config: Config, source: PromptSource) -> list[LearnerRow]:
    """Validation rows, at most `EVAL_ROWS_PER_DATASET` of each data set; none without a manifest.

    Raises:
        UserError: no usable row, or a manifest without any rationale.
    """
    if not config.data.validation:
        return []
    manifests = read_manifests(config.data, "validation")
    check_rationales(manifests)
    samples = list(source.held_out(manifests, EVAL_ROWS_PER_DATASET, supervised=True))
    if not samples:
        raise UserError("data.validation has no usable row for the held-out loss: name others, or data.validation=[]")
    return [source.sft_row(s) for s in samples]
