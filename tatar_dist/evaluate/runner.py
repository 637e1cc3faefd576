"""Evaluate a model on the engine pool: greedy, sampled and direct answers, expected scores.

Reads `model.path` and `data.test`. Writes `answers.jsonl` (the journal; after a kill the same command resumes),
`predictions.parquet`, `metrics.json` and `table.{md,tex,csv}`. Metrics always come with n, n_parsed and n_truncated.
Engines start only if answers are missing. Images are streamed and not kept in memory.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tatar_dist.cluster.ray_cluster import Cluster
from tatar_dist.config.schema import Config
from tatar_dist.data.manifest import Manifest
from tatar_dist.errors import Interrupted, StopRequested, UserError
from tatar_dist.evaluate import tables
from tatar_dist.evaluate.answers import AnswerJournal, batch_size, batches, distinct, key_of, model_fingerprint
from tatar_dist.evaluate.metrics import score_metrics, set_names, spread
from tatar_dist.faults.interrupts import StopSignals
from tatar_dist.faults.waiting import Waits
from tatar_dist.plan.memory import check_fit
from tatar_dist.plan.plan import resolve
from tatar_dist.prompts.answer import DIRECT, clamped, parse, think_words
from tatar_dist.prompts.render import PromptTexts
from tatar_dist.prompts.source import PromptSource, read_manifests
from tatar_dist.rewards.batch import batch_of_groups
from tatar_dist.rewards.metrics import reward_metrics
from tatar_dist.rewards.presets import load_preset
from tatar_dist.rewards.score import score_batch, scored_groups
from tatar_dist.rollout.engine import Sampling
from tatar_dist.rollout.pool import RolloutPool
from tatar_dist.run.directory import RunDirectory, write_rollouts
from tatar_dist.run.files import write_whole, written_whole
from tatar_dist.run.progress import Progress
from tatar_dist.types import TASKS, Completion, Group, Prompt, Sample

REWARD_STEP = 1 << 20  # the step that enters the seeds of sampled evaluation; no training run gets there


def run(config: Config) -> dict[str, Any]:
    """Evaluate `model.path` on `data.test`, resuming `output`; return metrics.json's content."""
    texts = PromptTexts(config)
    with (  # the journal first: other settings are refused before anything of the run is touched
        AnswerJournal(Path(config.output) / "answers.jsonl", _settings(config, texts)) as answers,
        RunDirectory(config) as directory,
        StopSignals() as stop,
    ):
        if answers.cut:
            print(f"tatar-dist: {answers.cut}", file=sys.stderr)
        source = PromptSource(config, directory, texts)
        waits = Waits(stop)
        try:
            with waits.interruptible():
                return Evaluation(config, directory, source, answers, waits).run()
        except StopRequested:
            raise Interrupted("stopped; the same command continues the evaluation", stop.status) from None


def _settings(config: Config, texts: PromptTexts) -> dict[str, Any]:
    """Return the settings that determine an answer; the journal refuses answers under others."""
    m, e = config.model, config.evaluate
    sampled = {"samples": e.samples, "temperature": config.rollout.temperature, "seed": e.seed} if e.samples else None
    return {
        "model": model_fingerprint(m.path),
        "dtype": m.dtype,
        "pixels": [m.min_pixels, m.max_pixels],
        "prompts": texts.text,
        "max_new_tokens": config.rollout.max_new_tokens,
        "sampled": sampled,
        "expected": e.expected,
        **({} if config.rollout.quantization == "none" else {"quantization": config.rollout.quantization}),
    }


class Evaluation:
    """One evaluation. `samples`: the samples asked, without images, in manifest order."""

    def __init__(
        self, config: Config, directory: RunDirectory, source: PromptSource, answers: AnswerJournal, waits: Waits
    ) -> None:
        self.config, self.directory, self.source, self.answers, self.waits = config, directory, source, answers, waits
        self.plan = resolve(config, "evaluate")
        self.manifests = read_manifests(config.data, "test")
        self.rows = _rows(self.manifests)
        self.total = _most_samples(self.rows, config.data.eval_limit)
        self.samples: list[Sample] = []
        limit, e = config.rollout.max_new_tokens, config.evaluate
        self.sampling = {"greedy": Sampling(1, 0.0, limit, expected=e.expected)}
        if e.samples:
            self.sampling["sampled"] = Sampling(e.samples, config.rollout.temperature, limit, e.seed, REWARD_STEP)
        if e.direct:
            self.sampling["direct"] = Sampling(1, 0.0, limit)
        self.seconds: dict[str, float] = {}  # of an answer, by kind that this start asked for

    def run(self) -> dict[str, Any]:
        """Generate missing answers and write the results."""
        start, path = time.perf_counter(), self.directory.path
        units = self.total * len(self.sampling)
        with (
            self.directory.running("evaluate", units, 0, 0, self.plan.engines),
            Progress("evaluate", units, unit="answer") as progress,
        ):
            tokens, seconds = self._ask_all(progress)
            if not self.samples:
                raise UserError(f"data.test: no usable sample: {self.source.unusable}")
            self.directory.record()
            result = self._results(path)
            result["tokens_per_second"] = tokens / seconds if tokens else None  # of this start; nothing asked: null
            result["seconds"] = time.perf_counter() - start
            tables.write(path, result, self.config.evaluate.published)
            write_whole(path / "metrics.json", json.dumps(result, indent=1, allow_nan=False))
        return result

    # -- asking ------------------------------------------------------------------------------------------------------

    def _ask_all(self, progress: Progress) -> tuple[int, float]:
        """Generate all kinds of answers; return the number of generated tokens and seconds taken."""
        tokens, done, began = 0, 0, time.perf_counter()
        with ExitStack() as stack:
            pool: RolloutPool | None = None
            for kind, sampling in self.sampling.items():
                calls = self._calls(kind)
                first, asked = next(calls, None), 0
                if first and pool is None:
                    pool = self._engines(stack)
                    self.directory.record()
                    began = time.perf_counter()
                    done = sum(min(self.answers.count(k), self.total) for k in self.sampling)
                    progress.ready(done)
                kind_began = time.perf_counter()
                for groups in pool.stream(chain([first], calls), sampling) if first and pool else ():
                    self.answers.keep(kind, groups)
                    tokens += sum(len(c.token_ids) for g in groups for c in g.completions)
                    done += len(groups)
                    asked += len(groups) * sampling.n
                    self.directory.begin("evaluate", done)
                    progress.update(min(done, progress.total), {})
                if asked:
                    self.seconds[kind] = (time.perf_counter() - kind_began) / asked
                if kind == "greedy":
                    self.missing = dict(self.source.missing)  # another kind comes by the same samples again
            self.directory.begin("results", progress.total)
        return tokens, time.perf_counter() - began

    def _calls(self, kind: str) -> Iterator[list[Prompt]]:
        """Yield unanswered prompts by engine call. `samples` is filled during the first kind."""
        r = self.config.rollout
        size = batch_size(self.total, self.plan.engines, r.max_num_seqs, self.sampling[kind].n)
        begun = DIRECT if kind == "direct" else ""
        return batches(
            self._held_out(kind),
            1 if r.deterministic else size,
            lambda s: replace(self.source.prompt(s, f"eval/{key_of(s)}"), begun=begun),
            partial(self.answers.has, kind),
        )

    def _held_out(self, kind: str) -> Iterator[Sample]:
        known = partial(self.answers.has, "greedy")
        for sample in distinct(self.source.held_out(self.manifests, self.config.data.eval_limit, known=known)):
            self.waits.check()
            if kind == "greedy":
                self.samples.append(replace(sample, image=b""))
            yield sample

    def _engines(self, stack: ExitStack) -> RolloutPool:
        cluster = stack.enter_context(Cluster(self.config, self.directory.events.log, waits=self.waits))
        check_fit(self.config, self.plan, cluster.smallest_gpu())
        pool = cluster.engines(self.plan.engines)
        pool.start(cluster.threads(self.plan.engines))
        pool.started()
        return pool

    # -- results -----------------------------------------------------------------------------------------------------

    def _results(self, path: Path) -> dict[str, Any]:
        rows = [self._row(s) for s in self.samples]
        table = pa.Table.from_pylist(rows, pa.schema([(name, kind) for name, (kind, _) in COLUMNS.items()]))
        with written_whole(path / "predictions.parquet") as place:
            pq.write_table(table, place)
        e = self.config.evaluate
        counts: dict[str, Any] = {"missing": self.missing, "rows_of": self.rows}
        metrics = partial(by_dataset, rows, **counts, unparsed=e.unparsed, bootstrap=e.bootstrap)
        result: dict[str, Any] = {"model": self.config.model.path, "datasets": metrics("prediction")}
        result["averages"] = tables.averages(result["datasets"], e.in_domain)
        result["slices"] = tables.slices(rows, e.slices, unparsed=e.unparsed)
        if e.expected:
            result["expected"] = metrics("expected")
        if e.samples:
            result["sample_mean"] = metrics("sample_mean")
            result["rewards"] = self._rewards(path / "sampled.parquet")
        if e.direct:
            before: dict[str, float] = {}
            with suppress(OSError, ValueError, LookupError):  # of an earlier start, where there was one
                before = json.loads((path / "metrics.json").read_text())["seconds_per_answer"]
            result["direct"] = metrics("direct")
            result["seconds_per_answer"] = {kind: self.seconds.get(kind) or before.get(kind) for kind in self.sampling}
        for variant in tables.VARIANTS.keys() & result.keys():  # beside the greedy answers' own
            for name, m in result[variant].items():
                result["datasets"][name][f"srcc_{variant}"] = m["srcc"]
        return result

    def _row(self, sample: Sample) -> dict[str, Any]:
        (greedy,) = self.answers.get("greedy", sample)
        row = prediction_row(sample, greedy)
        if "sampled" in self.sampling:
            drawn = self.answers.get("sampled", sample)
            row["samples"] = [clamped(parse(c.text).value) for c in drawn]
            row["samples_truncated"] = sum(c.finish_reason == "length" for c in drawn)
            row["sample_mean"], row["sample_sd"] = spread(row["samples"])
        if "direct" in self.sampling:
            (direct,) = self.answers.get("direct", sample)
            row["direct"], row["direct_tokens"] = parse(direct.text).value, len(direct.token_ids)
            row["direct_truncated"] = direct.finish_reason == "length"
        return row

    def _rewards(self, file: Path) -> dict[str, float | None]:
        """Score all sampled completions as one batch, write them to `file`, and return its metrics."""
        groups = [
            Group(Prompt(s, "", f"eval/{key_of(s)}"), (), self.answers.get("sampled", s), 0)
            for s in sorted(self.samples, key=key_of)
        ]
        r, g = self.config.reward, self.config.grpo
        batch = batch_of_groups(groups)
        preset = load_preset(r.preset, weights=r.weights, params=r.params)
        scored = score_batch(batch, preset, advantage=g.advantage, eps=g.advantage_eps, scale=g.scaling)
        write_rollouts(file, 0, scored_groups(groups, scored))
        return {k: v if math.isfinite(v) else None for k, v in reward_metrics(batch, scored).items()}


# Columns of predictions.parquet, each with its value for a greedy completion; `Evaluation._row` adds the samples.
COLUMNS: dict[str, tuple[pa.DataType, Callable[[Sample, Completion], Any]]] = {
    "sample_id": (pa.string(), lambda s, c: s.sample_id),
    "dataset": (pa.string(), lambda s, c: s.dataset),
    "task": (pa.string(), lambda s, c: s.task),
    # what several pictures are made from: crops of one photograph, distortions of one reference
    "source": (pa.string(), lambda s, c: str(s.meta.get("photo") or s.meta.get("reference") or "")),
    "target": (pa.float64(), lambda s, c: s.score),
    "prediction": (pa.float64(), lambda s, c: parse(c.text).value),
    "completion": (pa.string(), lambda s, c: c.text),
    "think_words": (pa.int64(), lambda s, c: think_words(c.text)),
    "tokens": (pa.int64(), lambda s, c: len(c.token_ids)),
    "truncated": (pa.bool_(), lambda s, c: c.finish_reason == "length"),
    "expected": (pa.float64(), lambda s, c: c.expected.mean if c.expected else None),
    "expected_sd": (pa.float64(), lambda s, c: c.expected.sd if c.expected else None),
    "samples": (pa.list_(pa.float64()), lambda s, c: None),
    "sample_mean": (pa.float64(), lambda s, c: None),
    "sample_sd": (pa.float64(), lambda s, c: None),
    "samples_truncated": (pa.int64(), lambda s, c: 0),
    "direct": (pa.float64(), lambda s, c: None),
    "direct_tokens": (pa.int64(), lambda s, c: None),
    "direct_truncated": (pa.bool_(), lambda s, c: None),
    "meta": (pa.string(), lambda s, c: json.dumps(s.meta) if s.meta else None),
}


def _rows(manifests: Sequence[Manifest]) -> Counter[tuple[str, str]]:
    """Count the rows of each (data set, task)."""
    rows = Counter[tuple[str, str]]()
    for pool in chain.from_iterable(m.pools for m in manifests):
        rows[pool.dataset, pool.task] += pool.rows
    return rows


def _most_samples(rows_of: Mapping[tuple[str, str], int], limit: int | None) -> int:
    """Return the maximum number of samples to ask, at most `limit` per data set."""
    rows = Counter[str]()
    for (dataset, _), n in rows_of.items():
        rows[dataset] += n
    return sum(n if limit is None else min(n, limit) for n in rows.values())


def prediction_row(sample: Sample, completion: Completion) -> dict[str, Any]:
    """Return a row of predictions.parquet; prediction is None if the completion does not parse."""
    return {name: value(sample, completion) for name, (_, value) in COLUMNS.items()}


def by_dataset(
    rows: Sequence[Mapping[str, Any]],
    column: str,
    missing: Mapping[tuple[str, str], int],
    unparsed: str = "drop",
    bootstrap: int = 0,
    rows_of: Mapping[tuple[str, str], int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return data set -> metrics of `column`. missing: unusable samples by (data set, task).

    `rows_of`: all rows of a set by (data set, task), given as n_total; by default those that were asked.
    Intervals are resampled by source photograph if all rows of a set name one.
    """
    names = set_names([*((r["dataset"], r["task"]) for r in rows), *missing])
    truncated = {"sample_mean": "samples_truncated", "direct": "direct_truncated"}.get(column, "truncated")
    tokens = {"sample_mean": None, "direct": "direct_tokens"}.get(column, "tokens")
    metrics = {}
    for name, task in sorted(names, key=lambda pair: (TASKS.index(pair[1]), pair[0])):  # type: ignore[arg-type]
        part = [r for r in rows if r["dataset"] == name and r["task"] == task]
        sources = np.array([r["source"] for r in part], str)
        metrics[names[name, task]] = score_metrics(
            [r["target"] for r in part],
            [r[column] for r in part],
            n_missing=missing.get((name, task), 0),
            n_truncated=sum(r[truncated] for r in part),
            unparsed=unparsed,
            bootstrap=bootstrap,
            cluster=sources if (sources != "").all() else None,
        ).to_dict() | {"task": task, "n_total": (rows_of or {}).get((name, task), len(part))}
        if tokens and part:
            metrics[names[name, task]]["tokens"] = float(np.mean([r[tokens] for r in part]))
    return metrics


def held_out_metrics(pool: RolloutPool, prompts: Sequence[Prompt], max_tokens: int) -> dict[str, float]:
    """Return eval/{dataset}/{srcc,plcc} of greedy answers by the engines; NaN if undefined."""
    groups = pool.generate(prompts, Sampling(1, 0.0, max_tokens))
    rows = [prediction_row(g.prompt.sample, g.completions[0]) for g in groups]
    return {
        f"eval/{name}/{k}": math.nan if m[k] is None else m[k]
        for name, m in by_dataset(rows, "prediction", {}).items()
        for k in ("srcc", "plcc")
    }
