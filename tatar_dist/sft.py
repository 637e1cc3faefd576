"""Supervised fine-tuning: the first stage, on GRPO's learners, forward and run directory.

Manifests must have rationales, unless `sft.thought_dropout` lets answers of their task do without. The trained model is
`checkpoints/latest/model` of the run directory. The loss is the mean negative log-likelihood of the assistant's tokens
over the global batch, the end-of-turn token included.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tatar_dist.config.schema import Config
from tatar_dist.data.sampler import PromptSampler, check_rationales
from tatar_dist.errors import UserError
from tatar_dist.learner.sharding import Shard, shard_rows
from tatar_dist.prompts.source import PromptSource, read_manifests
from tatar_dist.trainer import Run
from tatar_dist.types import TASKS, LearnerRow, Sample, Task

EVAL_ROWS_PER_DATASET = 64  # held-out rows for eval/loss: enough for a curve


def run(config: Config) -> None:
    """Train to `sft.max_steps` or `sft.epochs`. Raises Interrupted after a stop, or UserError."""
    with Run(config, "sft") as run:
        rows = SftRows(config, run)
        while (step := run.next_step(rows)) is not None:
            with run.recovering():
                start = time.perf_counter()
                batch = rows.take(step)
                tokens = sum(len(r.completion_ids) for r in batch)
                run.directory.begin("learn", step)
                report = run.learners.sft_step(rows.shards(batch), step, tokens)
                seconds = time.perf_counter() - start
                times = {"time/learn": report.seconds, "time/step": seconds, "perf/tokens_per_second": tokens / seconds}
                run.finish(step, {**report.metrics, **times, **_evaluated(run, rows, step)})


class SftRows:
    """Source of training rows. `total`: steps of the run; `held_out`: rows of `data.validation`."""

    def __init__(self, config: Config, run: Run) -> None:
        s = config.sft
        self.config, self.run, self.source = config, run, PromptSource(config, run.directory)
        manifests = read_manifests(config.data, "train")
        check_rationales(manifests, _with_rationales(config))
        self.sampler = PromptSampler(manifests, config.seed, config.data.iqa_fraction, supervised=True)
        self.total = s.max_steps or max(1, round(s.epochs * self.sampler.steps_per_epoch(s.global_batch)))
        self.held_out = _held_out(config, self.source)
        self._costs = self.source.backbone.costs()

    def state(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])

    def take(self, step: int) -> list[LearnerRow]:
        """Draw the rows of the next step."""
        samples = self.source.samples(self.sampler, self.config.sft.global_batch)
        return [self.source.sft_row(dropped(s, self.config, step)) for s in samples]

    def shards(self, rows: Sequence[LearnerRow]) -> list[Shard]:
        """Assign rows to learners."""
        return shard_rows(rows, len(self.run.learners.actors), self.config.sft.micro_tokens, self._costs)


def dropped(sample: Sample, config: Config, step: int) -> Sample:
    """Return the sample, without its rationale as often as `sft.thought_dropout` says.

    The same arguments give the same result, so that a resumed run is the uninterrupted one.
    """
    p = getattr(config.sft.thought_dropout, sample.task)
    draw = random.Random(f"{config.seed} {step} {sample.dataset} {sample.sample_id}").random()
    return replace(sample, rationale=None) if draw < p else sample


def _with_rationales(config: Config) -> tuple[Task, ...]:
    """Return the tasks whose rows must have a rationale."""
    return tuple(task for task in TASKS if not getattr(config.sft.thought_dropout, task))


def _evaluated(run: Run, rows: SftRows, step: int) -> dict[str, float]:
    """Compute the held-out loss by task when due."""
    every, last = run.config.sft.eval_every, step + 1 == rows.total
    if not rows.held_out or not (last or (every and (step + 1) % every == 0)):
        return {}
    run.directory.begin("evaluate", step)
    sums = run.learners.sft_loss(rows.shards(rows.held_out))
    tokens = {task: sums[f"tokens/{task}"] for task in TASKS}
    return {f"eval/loss/{t}": sums[f"nll/{t}"] / tokens[t] if tokens[t] else math.nan for t in TASKS}


def _held_out(config: Config, source: PromptSource) -> list[LearnerRow]:
    """Read at most `EVAL_ROWS_PER_DATASET` rows per validation set; none without a manifest.

    Raises:
        UserError: no usable row, or a manifest without any rationale.
    """
    if not config.data.validation:
        return []
    manifests = read_manifests(config.data, "validation")
    check_rationales(manifests, _with_rationales(config))
    samples = list(source.held_out(manifests, EVAL_ROWS_PER_DATASET, supervised=True))
    if not samples:
        raise UserError(f"data.validation has no usable row for the held-out loss: {source.unusable}")
    return [source.sft_row(dropped(s, config, -1)) for s in samples]
