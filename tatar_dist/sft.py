"""Supervised fine-tuning: the first stage, on the same learners, forward and run directory as GRPO.

In: a checked config whose manifests carry rationales. Out: a run directory; `checkpoints/latest/model` is the model.
The loss is the mean negative log-likelihood of the assistant's tokens over the global batch, end-of-turn included.
"""

from __future__ import annotations

import math
import time
from typing import Any

from tatar_dist.config import Config
from tatar_dist.data.sampler import check_rationales, sft_sampler
from tatar_dist.errors import UserError
from tatar_dist.interrupts import Interrupts
from tatar_dist.learner.group import LearnerGroup
from tatar_dist.learner.sharding import shard_rows
from tatar_dist.plan import resolve
from tatar_dist.prompt_source import PromptSource, read_manifests
from tatar_dist.records import LearnerRow, Sample
from tatar_dist.run_directory import RunDirectory
from tatar_dist.training import Steps, Training

EVAL_ROWS_PER_DATASET = 64  # held-out rows behind eval/loss: a curve, not a verdict


def run(config: Config) -> None:
    """Train until `sft.max_steps` or `sft.epochs`. Raises Interrupted after a clean stop, UserError for bad input."""
    plan, s = resolve(config, "sft"), config.sft
    with RunDirectory(config) as directory, Interrupts(config.checkpoint.grace_seconds) as stop:
        steps = SFTSteps(config, directory, plan.learners * plan.split.micro_batch)
        total = s.max_steps or max(1, round(s.epochs * steps.sampler.steps_per_epoch(s.global_batch)))
        Training(config, "sft", plan, steps, total, directory, stop).run()


class SFTSteps(Steps):
    """Read, learn, now and then measure the held-out loss on `multiple` rows or a multiple of it."""

    def __init__(self, config: Config, directory: RunDirectory, multiple: int) -> None:
        self.config, self.directory = config, directory
        self.source = PromptSource(config, directory)
        self.sampler = sft_sampler(read_manifests(config.data, "train"), config.seed, config.data.iqa_fraction)
        self.held_out = _held_out(config, self.source, multiple)

    def state(self) -> dict[str, Any]:
        return {"sampler": self.sampler.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])

    def step(self, step: int, last: bool) -> dict[str, float]:
        s, start, ranks = self.config.sft, time.perf_counter(), len(self.learners.actors)
        rows = [self.source.sft_row(sample) for sample in self.source.samples(self.sampler, s.global_batch)]
        tokens = sum(len(r.completion_ids) for r in rows)
        self.directory.begin("learn", step)
        report = self.learners.sft_step(shard_rows(rows, ranks), step, tokens)
        seconds = time.perf_counter() - start
        metrics = {
            **report.metrics,
            "time/learn": report.seconds,
            "time/step": seconds,
            "perf/tokens_per_second": tokens / seconds,
        }
        if self.held_out and (last or (s.eval_every and (step + 1) % s.eval_every == 0)):
            self.directory.begin("evaluate", step)
            metrics |= _held_out_loss(self.learners, self.held_out)
        return metrics


def _held_out(config: Config, source: PromptSource, multiple: int) -> list[LearnerRow]:
    """Validation rows in a number that divides evenly over ranks and micro-batches; none without a manifest.

    Data sets are interleaved, each spread over the whole, so that the cut to that number takes from all alike.

    Raises:
        UserError: fewer usable rows than one such number, or a manifest without any rationale.
    """
    if not config.data.validation:
        return []
    manifests = read_manifests(config.data, "validation")
    check_rationales(manifests)
    samples = source.held_out(manifests, EVAL_ROWS_PER_DATASET, supervised=True)
    if len(samples) < multiple:
        raise UserError(
            f"data.validation has {len(samples)} usable rows, the held-out loss needs at least {multiple} (learners x "
            "micro-batch): name more, or lower sft.micro_batch, or set data.validation=[]"
        )
    sets: dict[str, list[Sample]] = {}
    for s in samples:
        sets.setdefault(s.dataset, []).append(s)
    placed = [(i / len(rows), s) for rows in sets.values() for i, s in enumerate(rows)]
    spread = [s for _, s in sorted(placed, key=lambda p: p[0])]
    return [source.sft_row(s) for s in spread[: len(spread) // multiple * multiple]]


def _held_out_loss(learners: LearnerGroup, rows: list[LearnerRow]) -> dict[str, float]:
    ranks = len(learners.actors)
    rows = rows[: max(ranks, len(rows) // ranks * ranks)]  # with fewer learners after a fault the rest is left out
    sums = learners.sft_loss(shard_rows(rows, ranks))
    return {
        f"eval/loss/{t}": sums[f"nll/{t}"] / sums[f"tokens/{t}"] if sums[f"tokens/{t}"] else math.nan
        for t in ("iqa", "iaa")
    }
