"""The GRPO loop: sample, score, learn, push.

The run directory (run/directory.py) holds the trained model as `checkpoints/latest/model`. With `staleness: 0` engines
and learners take turns on the same weights; with `k` the engines sample the batch of k steps later while the learners
work (sampling.py). Start, checkpoints and faults: trainer.py.
"""

from __future__ import annotations

import time
from contextlib import suppress

from tatar_dist.config.schema import Config
from tatar_dist.errors import StopRequested
from tatar_dist.evaluate.runner import held_out_metrics
from tatar_dist.sampling import Collected, ScoredBatches
from tatar_dist.trainer import Run
from tatar_dist.types import ScoredGroup, StepReport


def run(config: Config) -> None:
    """Train to `grpo.max_steps` or `grpo.epochs`. Raises Interrupted after a stop, or UserError."""
    with Run(config, "grpo") as run:
        batches = ScoredBatches(config, run)
        while (step := run.next_step(batches)) is not None:
            with run.recovering():
                start = time.perf_counter()
                batch = batches.take(step)  # sampled by the engines, scored over the whole batch
                run.directory.rollouts(step, batch.scored, batch.replaced)  # written before the update that they cause
                run.engines.prepare_update()
                run.directory.begin("learn", step)
                update = run.learners.grpo_step(batches.shards(batch.scored), step)
                batches.work_ahead(step, update)
                report = update.result()
                run.directory.begin("sync", step)
                pushed = run.push_weights(step + 1)
                metrics = _metrics(step, batch, report, pushed, batches.seconds, time.perf_counter() - start)
                run.finish(step, metrics | _evaluated(run, batches, step))


def _evaluated(run: Run, batches: ScoredBatches, step: int) -> dict[str, float]:
    """Evaluate greedy answers to held-out prompts when due; a stop signal ends only this."""
    every, last = run.config.grpo.eval_every, step + 1 == batches.total
    if batches.held_out and ((step + 1) % every == 0 or last):
        run.directory.begin("evaluate", step)
        with suppress(StopRequested), run.waits.interruptible():
            return held_out_metrics(run.engines, batches.held_out, run.config.rollout.max_new_tokens)
    return {}


def _metrics(
    step: int,
    batch: Collected,
    report: StepReport,
    pushed: dict[str, float],
    sampled: dict[str, float],
    seconds: float,
) -> dict[str, float]:
    """Collect the metrics of a step."""
    scored = batch.scored
    times = sampled | {"learn": report.seconds, "sync": pushed["sync/seconds"], "step": seconds}
    lag = sum(step - s.group.weight_version for s in scored) / len(scored)
    metrics = {**batch.metrics, **_completion_metrics(scored), **report.metrics, **pushed, "policy/staleness": lag}
    return metrics | _times(times, scored)


def _times(seconds: dict[str, float], scored: list[ScoredGroup]) -> dict[str, float]:
    """Return seconds per part; with staleness parts overlap and generation is for a later step."""
    tokens, total = sum(len(c.token_ids) for s in scored for c in s.group.completions), seconds["step"]
    return {f"time/{part}": spent for part, spent in seconds.items()} | {
        "perf/tokens_per_second": tokens / total,
        "perf/rollout_idle": 1 - seconds["generate"] / total,
        "perf/learner_idle": 1 - seconds["learn"] / total,
    }


def _completion_metrics(scored: list[ScoredGroup]) -> dict[str, float]:
    metrics = {}
    for task in ("iqa", "iaa"):
        completions = [c for s in scored if s.group.prompt.sample.task == task for c in s.group.completions]
        if completions:
            n = len(completions)
            metrics[f"completion/tokens/{task}"] = sum(len(c.token_ids) for c in completions) / n
            metrics[f"completion/clipped_ratio/{task}"] = sum(c.finish_reason == "length" for c in completions) / n
    return metrics
