"""Results of the controlled probes: a table in the paper's form, steadiness of the IAA reward, and two plots.

Reads the directory written by demo/probes.py. Writes probes.json, probes.md and probes.svg there, and prints the
tables. Differences are paired on the same test crops and averaged over seeds, with 95 % intervals resampled by source
photograph. Steadiness is the standard deviation of a step's mean IAA reward around its linear trend, absolute and
relative to its mean, because the two rewards differ in scale.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from scipy.signal import detrend

from tatar_dist.demo.figures import markdown_table, terminal_table
from tatar_dist.evaluate.bootstrap import paired_srcc_difference
from tatar_dist.evaluate.metrics import plcc, srcc
from tatar_dist.run.directory import read_metrics


@dataclass(frozen=True)
class Probe:
    """One comparison on one task: the method's choice and the alternative, each with its run."""

    task: str
    choice: str
    run: str
    other: str
    other_run: str


PROBES = (
    Probe("iqa", "fast rationale", "sft-tatar", "slow rationale", "sft-slow-iqa"),
    Probe("iaa", "slow rationale", "sft-tatar", "fast rationale", "sft-fast-iaa"),
    Probe("iqa", "Gaussian reward", "grpo-tatar", "Thurstone reward", "grpo-thurstone-iqa"),
    Probe("iaa", "Thurstone reward", "grpo-tatar", "Gaussian reward", "grpo-gaussian-iaa"),
)
STEADINESS = {"Thurstone": ("grpo-tatar", "thurstone"), "Gaussian": ("grpo-gaussian-iaa", "gaussian")}
ROUNDS = 2000
COLORS = {"iqa": "#2b6cb0", "iaa": "#c05621", "Thurstone": "#c05621", "Gaussian": "#718096"}
COMPARISON = (
    "task",
    "method's choice, SRCC / PLCC",
    "other, SRCC / PLCC",
    "SRCC difference",
    "95 % interval",
    "by seed",
    "choice better?",
)
STEADY = ("IAA reward", "measure", "mean", "SD over steps", "SD / mean")


def write(out: Path, seeds: int, console: Console) -> dict[str, Any]:
    """Compute, write and print all results; returns the content of probes.json."""
    directories = [out / f"seed_{k}" for k in range(seeds)]
    rows = [compare(p, directories) for p in PROBES]
    text = json.dumps({"seeds": seeds, "probes": rows, "iaa_reward": steadiness(directories)})
    results = json.loads(text, parse_constant=lambda _: None)  # JSON has no NaN
    (out / "probes.json").write_text(json.dumps(results, indent=1, allow_nan=False))
    tables = [(COMPARISON, comparison_rows(results)), (STEADY, steadiness_rows(results))]
    ratio, lo, hi = (_number(v) for v in results["iaa_reward"]["cv_ratio_gaussian_over_thurstone"])
    sentence = f"SD / mean of the Gaussian term over that of the Thurstone term: {ratio} (95 % {lo} to {hi})."
    markdown = [markdown_table(columns, cells) for columns, cells in tables]
    (out / "probes.md").write_text("\n".join([*markdown, sentence, ""]))
    plot(results, directories, out / "probes.svg")
    titles = (f"Controlled probes, {seeds} seed(s)", "Steadiness of the IAA reward over steps, mean (range over seeds)")
    for title, (columns, cells) in zip(titles, tables, strict=True):
        console.print(terminal_table(title, columns, cells))
    console.print(sentence)
    console.print(f"Tables and plots: {out / 'probes.md'}, {out / 'probes.svg'}")
    return results


def _answers(directory: Path, task: str) -> dict[str, tuple[float, float, str]]:
    """Map sample id -> (target, prediction or NaN, source photograph)."""
    columns = ["sample_id", "target", "prediction", "source"]
    table = pq.read_table(directory / "predictions.parquet", columns=columns, filters=[("task", "=", task)])
    return {
        r["sample_id"]: (r["target"], np.nan if r["prediction"] is None else r["prediction"], r["source"])
        for r in table.to_pylist()
    }


def compare(probe: Probe, directories: Sequence[Path]) -> dict[str, Any]:
    """Return one table row: SRCC and PLCC of both sides by seed, and the paired SRCC difference with its interval."""
    sides = [[_answers(d / f"{run}-eval", probe.task) for d in directories] for run in (probe.run, probe.other_run)]
    ids = sorted(sides[0][0])
    target = np.array([sides[0][0][i][0] for i in ids])
    cluster = np.array([sides[0][0][i][2] for i in ids])
    choice, other = (np.array([[seed[i][1] for i in ids] for seed in side]) for side in sides)
    difference = paired_srcc_difference(target, other, choice, cluster)
    row: dict[str, Any] = {
        "task": probe.task,
        "choice": probe.choice,
        "other": probe.other,
        "n": len(ids),
        "difference": [difference.estimate, difference.lo, difference.hi],
    }
    for name, values in (("choice", choice), ("other", other)):
        filled = np.clip(np.nan_to_num(values, nan=50.0), 0, 100)
        row[f"srcc_{name}"] = [float(srcc(target, p)) for p in filled]
        row[f"plcc_{name}"] = [float(plcc(target, p)) for p in filled]
        row[f"parsed_{name}"] = float(np.isfinite(values).mean())
    return row


def verdict(row: dict[str, Any]) -> str:
    """Whether the method's choice was better: yes, no, no difference seen, or undefined."""
    _, lo, hi = row["difference"]
    if lo is None:
        return "undefined"
    return "yes" if lo > 0 else "no, the reverse" if hi < 0 else "no difference seen"


def _series(directory: Path, name: str) -> np.ndarray:
    return np.array([line[name] for line in read_metrics(directory)], np.float64)


def _residuals(series: np.ndarray) -> np.ndarray:
    """Residuals from the least-squares line, or from the mean of fewer than three points."""
    return detrend(series, type="linear" if len(series) >= 3 else "constant")


def _cv(residuals: np.ndarray, mean: float) -> float:
    """SD / mean; NaN for a mean of 0, since a reward that is always 0 has no relative spread."""
    return float(residuals.std()) / mean if mean else math.nan


def steadiness(directories: Sequence[Path]) -> dict[str, Any]:
    """Return {reward: {term, total: {mean, sd, cv: [by seed]}}} and the ratio of the pooled cv of both rewards.

    The ratio's interval resamples steps; steps draw different images, so they are nearly independent.
    """
    result: dict[str, Any] = {}
    for label, (run, term) in STEADINESS.items():
        result[label] = {}
        for name, metric in (("term", term), ("total", "total")):
            series = [_series(d / run, f"reward/{metric}/iaa") for d in directories]
            means = [float(s.mean()) for s in series]
            sd = [float(_residuals(s).std()) for s in series]
            cv = [_cv(_residuals(s), mean) for s, mean in zip(series, means, strict=True)]
            result[label][name] = {"mean": means, "sd": sd, "cv": cv}
    rng = np.random.default_rng(0)

    def resampled(label: str) -> np.ndarray:
        """Draw the cv of the term, averaged over seeds, (ROUNDS,)."""
        run, term = STEADINESS[label]
        draws = np.zeros(ROUNDS)
        for directory in directories:
            series = _series(directory / run, f"reward/{term}/iaa")
            drawn = rng.choice(_residuals(series), (ROUNDS, len(series)))
            draws += drawn.std(axis=1) / (series.mean() or math.nan) / len(directories)
        return draws

    gaussian, thurstone = (float(np.mean(result[label]["term"]["cv"])) for label in ("Gaussian", "Thurstone"))
    lo, hi = np.quantile(resampled("Gaussian") / resampled("Thurstone"), [0.025, 0.975])
    ratio = gaussian / thurstone if thurstone else math.nan
    result["cv_ratio_gaussian_over_thurstone"] = [ratio, float(lo), float(hi)]
    return result


def _number(value: float | None, form: str = ".3f") -> str:
    return "—" if value is None else f"{value:{form}}"


def _mean(values: Sequence[float | None], with_range: bool = False) -> str:
    """Format the mean over seeds, optionally with the range; a dash if a value is undefined."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return "—"
    return f"{np.mean(known):.3f}" + (f" ({min(known):.3f}–{max(known):.3f})" if with_range else "")


def _differences(row: dict[str, Any]) -> list[float | None]:
    """SRCC of the choice minus that of the other, by seed."""
    pairs = zip(row["srcc_choice"], row["srcc_other"], strict=True)
    return [None if a is None or b is None else a - b for a, b in pairs]


def comparison_rows(results: dict[str, Any]) -> list[list[str]]:
    """Return the comparison table as text cells."""
    rows = []
    for r in results["probes"]:
        value, lo, hi = (_number(v, "+.3f") for v in r["difference"])
        by_seed = ", ".join(_number(d, "+.3f") for d in _differences(r))
        sides = [f"{r[k]}: {_mean(r[f'srcc_{k}'])} / {_mean(r[f'plcc_{k}'])}" for k in ("choice", "other")]
        rows.append([r["task"].upper(), *sides, value, f"{lo} to {hi}", by_seed, verdict(r)])
    return rows


def steadiness_rows(results: dict[str, Any]) -> list[list[str]]:
    rows = []
    for label in STEADINESS:
        for name, measure in (("term", f"{label} term"), ("total", "whole reward")):
            values = results["iaa_reward"][label][name]
            rows.append([label, measure, *(_mean(values[k], with_range=True) for k in ("mean", "sd", "cv"))])
    return rows


def plot(results: dict[str, Any], directories: Sequence[Path], file: Path) -> None:
    """Plot two SVG panels: SRCC differences with intervals, and the IAA term over steps, one line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {"svg.hashsalt": "probes", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with plt.rc_context(style):  # the salt: the same figures give the same file
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=(1.25, 1), layout="tight")
        for place, r in enumerate(reversed(results["probes"])):
            color = COLORS[r["task"]]
            value, lo, hi = np.array(r["difference"], np.float64)
            left.plot([lo, hi], [place, place], color=color, linewidth=2)
            left.plot(value, place, "o", color=color)
            by_seed = np.array(_differences(r), np.float64)
            left.plot(by_seed, np.full(len(by_seed), place - 0.22), "|", color=color, markersize=7)
        left.axvline(0, color="0.6", linewidth=0.8)
        labels = [f"{r['task'].upper()}: {r['choice']}\nover {r['other']}" for r in reversed(results["probes"])]
        left.set_yticks(range(len(labels)), labels)
        left.set_ylim(-0.6, len(labels) - 0.4)
        left.set_xlabel("SRCC of the method's choice minus the other's\n95 % over photographs; ticks: seeds")
        for label, (run, term) in STEADINESS.items():
            for k, directory in enumerate(directories):
                series = _series(directory / run, f"reward/{term}/iaa")
                name = f"{label} term" if k == 0 else None
                right.plot(series, color=COLORS[label], alpha=0.75, linewidth=1, label=name)
        right.set_ylim(0, 1)
        right.set_xlabel("GRPO step")
        right.set_title("IAA reward term, step means, one line a seed", fontsize=9, loc="left")
        right.legend(frameon=False)
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)
