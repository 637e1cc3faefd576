"""Results of the demo's stages as numbers, terminal tables and Markdown.

Reads demo directories (demo/pipeline.py). SFT and GRPO are compared on the same held-out crops, with 95 % intervals
resampled by source photograph, because crops of one photograph are not independent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from tatar_dist.evaluate import tables
from tatar_dist.evaluate.bootstrap import paired_mean_difference, paired_srcc_difference
from tatar_dist.evaluate.metrics import srcc
from tatar_dist.types import TASKS

MODELS = {"base": "baseline", "sft": "sft_eval", "grpo": "grpo_eval"}  # model -> the directory of its evaluation
TERMS = {"iqa": ("gaussian", "format", "length"), "iaa": ("thurstone", "format", "length")}


def results(out: Path) -> dict[str, Any]:
    """Return {"table": row per model and task, "gains": {task: {measure: [change, lo, hi]}}}."""
    table = []
    for model, directory in MODELS.items():
        metrics = json.loads((out / directory / "metrics.json").read_text())
        for name, values in metrics["datasets"].items():
            table.append({"model": model, "task": "iqa" if "iqa" in name else "iaa", **values})
    return {"table": table, "gains": {task: gains([out], task) for task in TASKS}}


def gains(directories: Sequence[Path], task: str) -> dict[str, list[float]]:
    """Return {reward_TERM…, srcc: [change, lo, hi]} from SFT to GRPO, pooled over seeds."""
    seeds = [_paired(d, task) for d in directories]
    for other in seeds:  # images that every seed was asked about
        seeds = [s.filter(pc.is_in(s["sample_id"], other["sample_id"])) for s in seeds]
    source, target = (seeds[0][name].to_numpy() for name in ("source", "target"))

    def both(column: str) -> list[np.ndarray]:
        return [np.array([s[f"{column}_{model}"].to_numpy() for s in seeds]) for model in ("sft", "grpo")]

    intervals = {f"reward_{t}": paired_mean_difference(*both(f"{t}_mean"), source) for t in TERMS[task]}
    intervals["srcc"] = paired_srcc_difference(target, *both("prediction"), source)
    return {name: [i.estimate, i.lo, i.hi] for name, i in intervals.items()}


def answers(directory: Path, task: str) -> pa.Table:
    """Read sample_id, source, target, greedy prediction (null: unparsed), sorted by sample_id."""
    columns = ["sample_id", "source", "target", "prediction"]
    table = pq.read_table(directory / "predictions.parquet", columns=columns, filters=[("task", "=", task)])
    return table.sort_by("sample_id")


def _paired(out: Path, task: str) -> pa.Table:
    """Join the `answers` of SFT and GRPO by image; their columns end in _sft and _grpo.

    TERM_mean is the mean of a reward term over the sampled answers to an image. Images that only one has are left out.
    """
    both = []
    for model in ("sft", "grpo"):
        file, columns = out / MODELS[model] / "sampled.parquet", ["sample_id", *TERMS[task]]
        sampled = pq.read_table(file, columns=columns, filters=[("task", "=", task)])
        terms = sampled.group_by("sample_id").aggregate([(t, "mean") for t in TERMS[task]])
        both.append(answers(out / MODELS[model], task).join(terms, "sample_id", join_type="inner"))
    sft, grpo = both[0], both[1].drop_columns(["source", "target"])
    joined = sft.join(grpo, "sample_id", join_type="inner", left_suffix="_sft", right_suffix="_grpo")
    return joined.sort_by("sample_id")


def of_parsed(directories: Sequence[Path], model: str, task: str) -> tuple[float, float]:
    """Return (share of all sampled answers that parsed, mean main reward term among those)."""
    files = [d / MODELS[model] / "sampled.parquet" for d in directories]
    term, rows = TERMS[task][0], [("task", "=", task)]
    sampled = pa.concat_tables(pq.read_table(f, columns=["parsed", term], filters=rows) for f in files)
    parsed = sampled.filter(sampled["parsed"])
    return len(parsed) / len(sampled), float(np.mean(parsed[term])) if len(parsed) else float("nan")


def by_photograph(out: Path, task: str) -> dict[str, tuple[int, float, float]]:
    """Map source photograph -> (crops, SRCC after SFT, SRCC after GRPO) on its crops."""
    rows = _paired(out, task)
    result = {}
    for source in sorted(rows["source"].unique().to_pylist()):
        crops = rows.filter(pc.equal(rows["source"], source))
        names = ("target", "prediction_sft", "prediction_grpo")
        target, sft, grpo = (np.nan_to_num(crops[name].to_numpy(), nan=50.0) for name in names)
        result[source] = (len(crops), srcc(target, sft), srcc(target, grpo))
    return result


def markdown(directories: Sequence[Path], head: dict[str, float]) -> str:
    """Format the tables of the README and demo/README.md: per seed, pooled, per photograph.

    `head`: test SRCC of the regression head (demo/tiny/probe.py), by task.
    """
    summaries = [results(d) for d in directories]
    seeds = [f"seed {k}" for k in range(len(directories))]
    scores, changes, parsed, photographs = [], [], [], []
    for task in TASKS:
        for model in ("sft", "grpo"):
            rows = [r for s in summaries for r in s["table"] if (r["task"], r["model"]) == (task, model)]
            cells = [f"{r['srcc']:.3f} ({r['n_parsed']}/{r['n']})" for r in rows]
            scores.append([task, f"{head[task]:.3f}", model, *cells])
        for name, (value, lo, hi) in gains(directories, task).items():
            by_seed = ", ".join(f"{s['gains'][task][name][0]:+.3f}" for s in summaries)
            changes.append([task, name.replace("_", " "), f"{value:+.3f}", f"{lo:+.3f} to {hi:+.3f}", by_seed])
        (share, term), (share_after, term_after) = (of_parsed(directories, model, task) for model in ("sft", "grpo"))
        parsed.append([task, "that parse", f"{share:.1%}", f"{share_after:.1%}"])
        parsed.append([task, f"{TERMS[task][0]} among these", f"{term:.3f}", f"{term_after:.3f}"])
        crops = [by_photograph(d, task) for d in directories]
        for source, (n, *_) in crops[0].items():
            cells = [f"{seed[source][1]:.2f} → {seed[source][2]:.2f}" for seed in crops]
            photographs.append([task, source.replace("_", " "), str(n), *cells])
    columns = ("task", "SFT to GRPO", "pooled change", "95 % interval", "per seed")
    return "\n".join(
        [
            tables.markdown(scores, ("task", "regression head", "", *seeds)),
            tables.markdown(changes, columns),
            tables.markdown(parsed, ("task", "sampled answers", "SFT", "GRPO")),
            tables.markdown(photographs, ("task", "photograph", "crops", *seeds)),
        ]
    )


def number(value: float | None, form: str = ".3f") -> str:
    """Format a figure; a dash where it is None or NaN."""
    return "—" if value is None or value != value else f"{value:{form}}"


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of text cells, numbers from the third column on."""
    table = Table(title=title, title_justify="left")
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k < 2 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_tables(console: Console, summary: dict[str, Any]) -> None:
    """Print scores, changes by GRPO, and times on the terminal."""
    scores = []
    for r in sorted(summary["table"], key=lambda r: TASKS.index(r["task"])):
        cells = [number(r["srcc"]), number(r["plcc"]), number(r["mae"], ".1f")]
        scores.append([r["task"], r["model"], str(r["n"]), f"{r['n_parsed'] / r['n']:.1%}", *cells])
    columns = ("task", "model", "images", "parsed", "SRCC", "PLCC", "MAE")
    print_table(console, "Held-out photographs", columns, scores)
    changes = []
    for task, measures in summary["gains"].items():
        for name, values in measures.items():
            value, lo, hi = (number(v, "+.3f") for v in values)
            changes.append([task, name.replace("_", " "), value, f"{lo} to {hi}"])
    title = "What GRPO changed, with 95 % intervals over photographs"
    print_table(console, title, ("task", "measure", "change", "interval"), changes)
    times = []
    for s in summary["stages"]:
        took = "reused" if s["reused"] else f"{s['seconds']:.0f} s"
        times.append([s["name"].replace("_", " "), took, f"{s['budget_seconds']:.0f} s"])
    total, budget = (sum(s[k] for s in summary["stages"]) for k in ("seconds", "budget_seconds"))
    times.append(["all", f"{total:.0f} s", f"{budget:.0f} s"])
    print_table(console, "Time", ("stage", "took", "budget"), times)
