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
    found: dict[str, Interval] = {}
    for term in TERMS[task]:
        before, after = (np.array([[r[k][term] for r in seed] for seed in rows]) for k in ("sft_terms", "grpo_terms"))
        found[f"reward_{term}"] = paired_mean_difference(before, after, cluster)
    before, after = (np.array([[r[k] for r in seed] for seed in rows]) for k in ("sft", "grpo"))
    found["srcc"] = paired_srcc_difference(np.array([r["target"] for r in rows[0]]), before, after, cluster)
    return {name: [i.estimate, i.lo, i.hi] for name, i in found.items()}


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
    own = TERMS[task][0]
    tables = [
        pq.read_table(d / MODELS[model] / "sampled.parquet", columns=["task", "parsed", own]) for d in directories
    ]
    rows = [r for table in tables for r in table.to_pylist() if r["task"] == task]
    parsed = [r[own] for r in rows if r["parsed"]]
    return len(parsed) / len(rows), float(np.mean(parsed)) if parsed else float("nan")


def by_photograph(out: Path, task: str) -> dict[str, tuple[int, float, float]]:
    """Map source photograph -> (crops, SRCC after SFT, SRCC after GRPO) on its crops."""
    rows = _paired(out, task).values()
    found = {}
    for source in sorted({r["source"] for r in rows}):
        own = [r for r in rows if r["source"] == source]
        target = np.array([r["target"] for r in own])
        answers = (np.array([r[m] for r in own]) for m in ("sft", "grpo"))
        found[source] = (len(own), *(srcc(target, np.nan_to_num(a, nan=50.0)) for a in answers))
    return found


def regression_head(model: str, data: Path) -> dict[str, dict[str, float]]:
    """SRCC of a regression head on the base model's frozen tower (demo/tiny/probe.py), by task."""
    command = [sys.executable, "-m", "tatar_dist.demo.tiny.probe", "--model", model, "--data", str(data), "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def markdown(directories: Sequence[Path], head: dict[str, dict[str, float]]) -> str:
    """Format the tables of the README and of demo/README.md: per seed, pooled, and per photograph."""
    summaries = [results(d) for d in directories]
    lines = [
        "| task | regression head | | " + " | ".join(f"seed {k}" for k in range(len(directories))) + " |",
        "|---|---|---|" + "---|" * len(directories),
    ]
    for task in TASKS:
        for model in ("sft", "grpo"):
            cells = []
            for s in summaries:
                (row,) = [r for r in s["table"] if r["task"] == task and r["model"] == model]
                cells.append(f"{row['srcc']:.3f} ({row['n_parsed']}/{row['n']})")
            lines.append(f"| {task} | {head[task]['test']:.3f} | {model} | " + " | ".join(cells) + " |")
    lines += ["", "| task | SFT to GRPO | pooled change | 95 % interval | per seed |", "|---|---|---|---|---|"]
    for task in TASKS:
        for name, (value, lo, hi) in gains(directories, task).items():
            each = ", ".join(f"{s['gains'][task][name][0]:+.3f}" for s in summaries)
            lines.append(f"| {task} | {name.replace('_', ' ')} | {value:+.3f} | {lo:+.3f} to {hi:+.3f} | {each} |")
    lines += ["", "| task | sampled answers | SFT | GRPO |", "|---|---|---|---|"]
    for task in TASKS:
        (share, term), (share_after, term_after) = (of_parsed(directories, model, task) for model in ("sft", "grpo"))
        lines.append(f"| {task} | that parse | {share:.1%} | {share_after:.1%} |")
        lines.append(f"| {task} | {TERMS[task][0]} among these | {term:.3f} | {term_after:.3f} |")
    lines += ["", "| task | photograph | crops | " + " | ".join(f"seed {k}" for k in range(len(directories))) + " |"]
    lines.append("|---|---|---|" + "---|" * len(directories))
    for task in TASKS:
        each_seed = [by_photograph(d, task) for d in directories]
        for source, (n, *_) in each_seed[0].items():
            cells = [f"{s[source][1]:.2f} → {s[source][2]:.2f}" for s in each_seed]
            lines.append(f"| {task} | {source.replace('_', ' ')} | {n} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def print_tables(console: Console, summary: dict[str, Any]) -> None:
    """Print scores, changes by GRPO, and times on the terminal."""
    table = Table(title="Held-out photographs", title_justify="left")
    for column in ("task", "model", "images", "parsed", "SRCC", "PLCC", "MAE"):
        table.add_column(column, justify="left" if column in ("task", "model") else "right")
    for task in TASKS:
        for row in summary["table"]:
            if row["task"] == task:
                values = ["—" if row[k] is None else f"{row[k]:.3f}" for k in ("srcc", "plcc")]
                mae = "—" if row["mae"] is None else f"{row['mae']:.1f}"
                parsed = f"{row['n_parsed'] / row['n']:.1%}"
                table.add_row(task, row["model"], str(row["n"]), parsed, *values, mae)
        table.add_section()
    console.print(table)
    changes = Table(title="What GRPO changed, with 95 % intervals over photographs", title_justify="left")
    for column in ("task", "measure", "change", "interval"):
        changes.add_column(column, justify="left" if column in ("task", "measure") else "right")
    for task, found in summary["gains"].items():
        for name, values in found.items():
            value, lo, hi = ("—" if v != v else f"{v:+.3f}" for v in values)
            changes.add_row(task, name.replace("_", " "), value, f"{lo} to {hi}")
        changes.add_section()
    console.print(changes)
    times = Table(title="Time", title_justify="left", show_footer=True)
    total, budget = (sum(s[k] for s in summary["stages"]) for k in ("seconds", "budget_seconds"))
    times.add_column("stage", footer="all")
    times.add_column("took", justify="right", footer=f"{total:.0f} s")
    times.add_column("budget", justify="right", footer=f"{budget:.0f} s")
    for s in summary["stages"]:
        took = "reused" if s["reused"] else f"{s['seconds']:.0f} s"
        times.add_row(s["name"].replace("_", " "), took, f"{s['budget_seconds']:.0f} s")
    console.print(times)
