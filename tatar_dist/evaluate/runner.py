"""Evaluation on the engine pool: greedy answers for SRCC/PLCC, sampled answers for the reward terms.

In: a config (`model.path`, `data.test`). Out: `predictions.parquet`, `metrics.json`, and the result as a dict. A metric
never comes without its n, n_parsed and n_truncated.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tatar_dist.cluster import Cluster
from tatar_dist.config import Config
from tatar_dist.errors import UserError
from tatar_dist.evaluate.metrics import score_metrics
from tatar_dist.interrupts import Interrupted, Interrupts, StopAsked
from tatar_dist.plan import resolve
from tatar_dist.progress import Progress
from tatar_dist.prompt_source import PromptSource, read_manifests
from tatar_dist.prompts import parse, think_words
from tatar_dist.records import Prompt, ScoredGroup
from tatar_dist.rewards.remote import RemoteScorer
from tatar_dist.rollout.engine import Sampling
from tatar_dist.rollout.pool import RolloutPool
from tatar_dist.run_directory import RunDirectory, write_rollouts

REWARD_STEP = 1 << 20  # the step that enters the seeds of sampled evaluation; no training run gets there


def run(config: Config) -> dict[str, Any]:
    """Evaluate `model.path` on `data.test`. Returns {"datasets": {name: metrics}, "rewards": {...}}."""
    plan = resolve(config, "evaluate")
    with RunDirectory(config) as directory, Interrupts() as stop:
        source = PromptSource(config, directory)
        samples = source.held_out(read_manifests(config.data, "test"), config.data.eval_limit)
        if not samples:
            raise UserError("data.test: no usable sample")
        prompts = [source.prompt(s, f"eval/{s.dataset}/{s.sample_id}") for s in samples]
        with (
            directory.running("evaluate", len(prompts), 0, 0, plan.engines),
            Cluster(config, directory.events.log) as cluster,
            Progress("evaluate", len(prompts), unit="image") as progress,
        ):
            pool = cluster.engines(plan.engines)
            scorer = cluster.scorer()
            pool.check = scorer.check = stop.leave_if_asked
            pool.start(cluster.threads(plan.engines))
            try:
                pool.started()
                progress.ready()
                return evaluate_prompts(config, pool, scorer, prompts, directory.path, progress, source.missing)
            except StopAsked:
                raise Interrupted("stopped; the same command starts the evaluation again", stop.status) from None


def evaluate_prompts(
    config: Config,
    pool: RolloutPool,
    scorer: RemoteScorer,
    prompts: Sequence[Prompt],
    output: Path,
    progress: Progress | None = None,
    missing: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Greedy completions of all prompts, and `evaluate.samples` sampled ones scored as one global batch."""
    start = time.perf_counter()
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if progress:
            progress.update(min(done, progress.total), {})

    limit, e = config.rollout.max_new_tokens, config.evaluate
    rows = greedy_answers(pool, prompts, limit, advance)
    generated = time.perf_counter() - start
    output.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), output / "predictions.parquet")
    result: dict[str, Any] = {
        "model": config.model.path,
        "datasets": dataset_metrics(rows, missing or {}),
        "tokens_per_second": sum(r["tokens"] for r in rows) / generated,
    }
    if e.samples:
        sampling = Sampling(e.samples, config.rollout.temperature, limit, e.seed, REWARD_STEP)
        scored: list[ScoredGroup]
        groups = pool.generate(prompts, sampling)
        scored, result["rewards"] = scorer.score(groups)
        write_rollouts(output / "sampled.parquet", 0, scored)
    result["seconds"] = time.perf_counter() - start
    (output / "metrics.json").write_text(json.dumps(result, indent=1))
    return result


def greedy_answers(
    pool: RolloutPool, prompts: Sequence[Prompt], max_tokens: int, advance: Callable[[int], None] | None = None
) -> list[dict[str, Any]]:
    """One row a prompt: target, prediction (None when unparsed), completion, its words and tokens, truncated or not."""
    rows = []
    for g in pool.generate(prompts, Sampling(1, 0.0, max_tokens), advance):
        sample, completion = g.prompt.sample, g.completions[0]
        rows.append(
            {
                "sample_id": sample.sample_id,
                "dataset": sample.dataset,
                "task": sample.task,
                "source": str(sample.meta.get("photo", "")),
                "target": sample.score,
                "prediction": parse(completion.text).value,
                "completion": completion.text,
                "think_words": think_words(completion.text),
                "tokens": len(completion.token_ids),
                "truncated": completion.finish_reason == "length",
            }
        )
    return rows


def dataset_metrics(rows: Sequence[Mapping[str, Any]], missing: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Data set -> its metrics, from the rows of `greedy_answers`. `missing`: samples that could not be asked."""
    found = {}
    for name in sorted({r["dataset"] for r in rows} | missing.keys()):
        part = [r for r in rows if r["dataset"] == name]
        predictions = [math.nan if r["prediction"] is None else r["prediction"] for r in part]
        found[name] = score_metrics(
            np.array([r["target"] for r in part]),
            np.array(predictions),
            n_missing=missing.get(name, 0),
            n_truncated=sum(r["truncated"] for r in part),
        ).to_dict()
    return found


def held_out_metrics(pool: RolloutPool, prompts: Sequence[Prompt], max_tokens: int) -> dict[str, float]:
    """eval/{dataset}/{srcc,plcc} of a running training's weights, which the engines hold; NaN where undefined."""
    datasets = dataset_metrics(greedy_answers(pool, prompts, max_tokens), {})
    return {
        f"eval/{name}/{k}": math.nan if m[k] is None else m[k] for name, m in datasets.items() for k in ("srcc", "plcc")
    }
