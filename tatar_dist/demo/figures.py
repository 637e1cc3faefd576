"""Results of the demo's stages as numbers, terminal tables and Markdown.

Reads demo directories (demo/pipeline.py). SFT and GRPO are compared on the same held-out crops, with 95 % intervals
resampled by source photograph, because crops of one photograph are not independent.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from tatar_dist.evaluate.bootstrap import Interval, paired_mean_difference, paired_srcc_difference
from tatar_dist.evaluate.metrics import srcc
from tatar_dist.types import TASKS

MODELS = {"base": "baseline", "sft": "sft_eval", "grpo": "grpo_eval"}  # model -> the directory of its evaluation
TERMS = {"iqa": ("gaussian", "format", "length"), "iaa": ("thurstone", "format", "length")}


def results(out: Path) -> dict[str, Any]:
    """Return {"table": one row per model and task, "gains": {task: {measure: [change, lo, hi]}}} of a demo."""
    table = []
    for model, directory in MODELS.items():
        metrics = json.loads((out / directory / "metrics.json").read_text())
        for name, values in metrics["datasets"].items():
            table.append({"model": model, "task": "iqa" if "iqa" in name else "iaa", **values})
    return {"table": table, "gains": {task: gains([out], task) for task in TASKS}}


def gains(directories: Sequence[Path], task: str) -> dict[str, list[float]]:
    """Return {reward_TERM…, srcc: [change, lo, hi]} from SFT to GRPO, pooled over demo directories (seeds)."""
    seeds = [_paired(d, task) for d in directories]
    ids = sorted(set.intersection(*(set(s) for s in seeds)))
    rows = [[s[i] for i in ids] for s in seeds]
    cluster = np.array([r["source"] for r in rows[0]])
    intervals: dict[str, Interval] = {}
    for term in TERMS[task]:
        before, after = (np.array([[r[k][term] for r in seed] for seed in rows]) for k in ("sft_terms", "grpo_terms"))
        intervals[f"reward_{term}"] = paired_mean_difference(before, after, cluster)
    before, after = (np.array([[r[k] for r in seed] for seed in rows]) for k in ("sft", "grpo"))
    intervals["srcc"] = paired_srcc_difference(np.array([r["target"] for r in rows[0]]), before, after, cluster)
    return {name: [i.estimate, i.lo, i.hi] for name, i in intervals.items()}


def _paired(out: Path, task: str) -> dict[str, dict[str, Any]]:
    """Map sample id -> target, source, greedy predictions (NaN unparsed) and mean reward terms of both models."""
    rows: dict[str, dict[str, Any]] = {}
    for model in ("sft", "grpo"):
        directory = out / MODELS[model]
        columns = ["sample_id", "task", "source", "target", "prediction"]
        terms = _terms(directory / "sampled.parquet", task)
        for r in pq.read_table(directory / "predictions.parquet", columns=columns).to_pylist():
            if r["task"] == task and r["sample_id"] in terms:
                row = rows.setdefault(r["sample_id"], {"target": r["target"], "source": r["source"]})
                row[model] = np.nan if r["prediction"] is None else r["prediction"]
                row[f"{model}_terms"] = terms[r["sample_id"]]
    return {i: r for i, r in rows.items() if "sft" in r and "grpo" in r}


def _terms(file: Path, task: str) -> dict[str, dict[str, float]]:
    """Map sample id -> mean of each reward term over the image's sampled completions."""
    values: dict[str, list[dict[str, float]]] = {}
    for row in pq.read_table(file, columns=["sample_id", "task", *TERMS[task]]).to_pylist():
        if row["task"] == task:
            values.setdefault(row["sample_id"], []).append(row)
    return {i: {t: float(np.mean([r[t] for r in rows])) for t in TERMS[task]} for i, rows in values.items()}


def of_parsed(directories: Sequence[Path], model: str, task: str) -> tuple[float, float]:
    """Return (share of sampled answers of all seeds that parsed, mean of the task's main reward term among those)."""
    term = TERMS[task][0]
    files = [d / MODELS[model] / "sampled.parquet" for d in directories]
    tables = [pq.read_table(f, columns=["task", "parsed", term], filters=[("task", "=", task)]) for f in files]
    rows = [r for table in tables for r in table.to_pylist()]
    parsed = [r[term] for r in rows if r["parsed"]]
    return len(parsed) / len(rows), float(np.mean(parsed)) if parsed else float("nan")


def by_photograph(out: Path, task: str) -> dict[str, tuple[int, float, float]]:
    """Map source photograph -> (crops, SRCC after SFT, SRCC after GRPO) on its crops."""
    crops: dict[str, list[dict[str, Any]]] = {}
    for row in _paired(out, task).values():
        crops.setdefault(row["source"], []).append(row)
    result = {}
    for source, rows in sorted(crops.items()):
        target, sft, grpo = (np.nan_to_num([r[k] for r in rows], nan=50.0) for k in ("target", "sft", "grpo"))
        result[source] = (len(rows), srcc(target, sft), srcc(target, grpo))
    return result


def regression_head(model: str, data: Path) -> dict[str, dict[str, float]]:
    """SRCC of a regression head on the base model's frozen tower (demo/tiny/probe.py), by task."""
    command = [sys.executable, "-m", "tatar_dist.demo.tiny.probe", "--model", model, "--data", str(data), "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def markdown(directories: Sequence[Path], head: dict[str, dict[str, float]]) -> str:
    """Format the tables of the README and of demo/README.md: per seed, pooled, and per photograph."""
    summaries = [results(d) for d in directories]
    seeds = [f"seed {k}" for k in range(len(directories))]
    scores: list[list[str]] = []
    changes: list[list[str]] = []
    parsed: list[list[str]] = []
    photographs: list[list[str]] = []
    for task in TASKS:
        for model in ("sft", "grpo"):
            rows = [r for s in summaries for r in s["table"] if (r["task"], r["model"]) == (task, model)]
            cells = [f"{r['srcc']:.3f} ({r['n_parsed']}/{r['n']})" for r in rows]
            scores.append([task, f"{head[task]['test']:.3f}", model, *cells])
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
    tables = (
        (["task", "regression head", "", *seeds], scores),
        (["task", "SFT to GRPO", "pooled change", "95 % interval", "per seed"], changes),
        (["task", "sampled answers", "SFT", "GRPO"], parsed),
        (["task", "photograph", "crops", *seeds], photographs),
    )
    return "\n".join(markdown_table(columns, rows) for columns, rows in tables)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table of text cells as Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:], ""])


def terminal_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Format a table of text cells for the terminal, numbers from the third column on."""
    table = Table(title=title, title_justify="left")
    for k, column in enumerate(columns):
        table.add_column(column, justify="left" if k < 2 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def print_tables(console: Console, summary: dict[str, Any]) -> None:
    """Print scores, changes by GRPO, and times on the terminal."""
    scores = []
    for row in sorted(summary["table"], key=lambda r: TASKS.index(r["task"])):
        srcc, plcc = ("—" if row[k] is None else f"{row[k]:.3f}" for k in ("srcc", "plcc"))
        mae = "—" if row["mae"] is None else f"{row['mae']:.1f}"
        parsed = f"{row['n_parsed'] / row['n']:.1%}"
        scores.append([row["task"], row["model"], str(row["n"]), parsed, srcc, plcc, mae])
    columns = ("task", "model", "images", "parsed", "SRCC", "PLCC", "MAE")
    console.print(terminal_table("Held-out photographs", columns, scores))
    changes = []
    for task, measures in summary["gains"].items():
        for name, values in measures.items():
            value, lo, hi = ("—" if v != v else f"{v:+.3f}" for v in values)
            changes.append([task, name.replace("_", " "), value, f"{lo} to {hi}"])
    title = "What GRPO changed, with 95 % intervals over photographs"
    console.print(terminal_table(title, ("task", "measure", "change", "interval"), changes))
    times = []
    for s in summary["stages"]:
        took = "reused" if s["reused"] else f"{s['seconds']:.0f} s"
        times.append([s["name"].replace("_", " "), took, f"{s['budget_seconds']:.0f} s"])
    total, budget = (sum(s[k] for s in summary["stages"]) for k in ("seconds", "budget_seconds"))
    times.append(["all", f"{total:.0f} s", f"{budget:.0f} s"])
    console.print(terminal_table("Time", ("stage", "took", "budget"), times))
