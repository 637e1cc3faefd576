"""Supervised fine-tuning: the first stage, on the same learners, forward and run directory as GRPO.

In: a checked config whose manifests carry rationales. Out: a run directory; `checkpoints/latest/model` is the model.
The loss is the mean negative log-likelihood of the assistant's tokens over the global batch, end-of-turn included.
"""

from __future__ import annotations

import math
import time

from tatar_dist.checkpoint import Checkpoints
from tatar_dist.cluster import Cluster
from tatar_dist.config import Config
from tatar_dist.data.sampler import check_rationales, sft_sampler
from tatar_dist.errors import UserError
from tatar_dist.interrupts import Interrupted, Interrupts
from tatar_dist.learner.group import LearnerGroup
from tatar_dist.learner.sharding import shard_rows
from tatar_dist.plan import resolve
from tatar_dist.progress import Progress
from tatar_dist.prompt_source import PromptSource, read_manifests
from tatar_dist.records import LearnerRow, Sample
from tatar_dist.run_directory import RunDirectory

EVAL_ROWS_PER_DATASET = 64  # held-out rows behind eval/loss: a curve, not a verdict


def run(config: Config) -> None:
    """Train until `sft.max_steps` or `sft.epochs`. Raises Interrupted after a clean stop, UserError for bad input."""
    plan, s = resolve(config, "sft"), config.sft
    with RunDirectory(config) as directory, Interrupts() as stop:
        source = PromptSource(config, directory)
        sampler = sft_sampler(read_manifests(config.data, "train"), config.seed, config.data.iqa_fraction)
        total = s.max_steps or max(1, round(s.epochs * sampler.steps_per_epoch(s.global_batch)))
        checkpoints = Checkpoints(directory.path.absolute(), config.checkpoint.keep)
        same = {"stage": "sft", "learners": plan.learners, "model.path": config.model.path}
        found = checkpoints.resume(same) if config.checkpoint.resume else None
        first = found[1]["step"] if found else 0
        directory.rewind(first)
        if first >= total:
            return
        held_out = _held_out(config, source, plan.learners * plan.split.micro_batch)
        with Cluster(config) as cluster, Progress("sft", total, first) as progress:
            learners = cluster.learners(plan.learners)
            learners.setup("sft", plan.split, total)
            if found:
                learners.load(found[0])
                sampler.load_state_dict(found[1]["sampler"])
            progress.ready()
            for step in range(first, total):
                start = time.perf_counter()
                rows = [source.sft_row(sample) for sample in source.samples(sampler, s.global_batch)]
                tokens = sum(len(r.completion_ids) for r in rows)
                report = learners.sft_step(shard_rows(rows, plan.learners), step, tokens)
                seconds = time.perf_counter() - start
                metrics = {
                    **report.metrics,
                    "time/learn": report.seconds,
                    "time/step": seconds,
                    "perf/tokens_per_second": tokens / seconds,
                }
                last = step + 1 == total
                if held_out and (last or (s.eval_every and (step + 1) % s.eval_every == 0)):
                    metrics |= _held_out_loss(learners, held_out)
                directory.log(step, metrics)
                progress.update(step + 1, metrics)
                if last or stop.requested or (config.checkpoint.every and (step + 1) % config.checkpoint.every == 0):
                    checkpoints.save(step + 1, {"same": same, "sampler": sampler.state_dict()}, learners.save)
                if stop.requested and not last:
                    raise Interrupted(f"stopped after step {step + 1} of {total}; the same command continues there")


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
    sums = learners.sft_loss(shard_rows(rows, len(learners.actors)))
    return {
        f"eval/loss/{t}": sums[f"nll/{t}"] / sums[f"tokens/{t}"] if sums[f"tokens/{t}"] else math.nan
        for t in ("iqa", "iaa")
    }
