"""Results of the controlled probes: a table in the paper's form, steadiness of the IAA reward, and two plots.

Reads the directory written by demo/probes.py. Writes probes.json, probes.md and probes.svg there, and prints the
tables. Differences are paired on the same test crops and averaged over seeds, with 95 % intervals resampled by source
photograph. Steadiness is the standard deviation of a step's mean IAA reward around its linear trend, absolute and
relative to its mean, because the two rewards differ in scale.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

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


def write(out: Path, seeds: int, console: Console) -> dict[str, Any]:
    """Compute, write and print all results; returns the content of probes.json."""
    directories = [out / f"seed_{k}" for k in range(seeds)]
    found = {
        "seeds": seeds,
        "probes": [compare(p, directories) for p in PROBES],
        "iaa_reward": steadiness(directories),
    }
    found = _finite(found)  # JSON has no NaN
    (out / "probes.json").write_text(json.dumps(found, indent=1, allow_nan=False))
    (out / "probes.md").write_text(markdown(found))
    plot(found, directories, out / "probes.svg")
    print_tables(console, found)
    console.print(f"Tables and plots: {out / 'probes.md'}, {out / 'probes.svg'}")
    return found


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None, sign: bool = False) -> str:
    return "—" if value is None else f"{value:{'+' if sign else ''}.3f}"


def _mean(values: list[float | None]) -> str:
    """Format the mean; a dash if a value is missing."""
    known = [v for v in values if v is not None]
    return _number(float(np.mean(known)) if len(known) == len(values) else None)


def _differences(row: dict[str, Any]) -> list[float | None]:
    """SRCC of the choice minus that of the other, by seed."""
    pairs = zip(row["srcc_choice"], row["srcc_other"], strict=True)
    return [None if a is None or b is None else a - b for a, b in pairs]


def _answers(directory: Path, task: str) -> dict[str, tuple[float, float, str]]:
    """Map sample id -> (target, prediction or NaN, source photograph)."""
    columns = ["sample_id", "task", "target", "prediction", "source"]
    rows = pq.read_table(directory / "predictions.parquet", columns=columns).to_pylist()
    return {
        r["sample_id"]: (r["target"], np.nan if r["prediction"] is None else r["prediction"], r["source"])
        for r in rows
        if r["task"] == task
    }


def compare(probe: Probe, directories: list[Path]) -> dict[str, Any]:
    """Return one table row: SRCC and PLCC of both sides by seed, and the paired SRCC difference with its interval."""
    sides = [[_answers(d / f"{run}-eval", probe.task) for d in directories] for run in (probe.run, probe.other_run)]
    ids = sorted(sides[0][0])
    target = np.array([sides[0][0][i][0] for i in ids])
    cluster = np.array([sides[0][0][i][2] for i in ids])
    ours, others = (np.array([[seed[i][1] for i in ids] for seed in side]) for side in sides)
    difference = paired_srcc_difference(target, others, ours, cluster, rounds=ROUNDS)
    row: dict[str, Any] = {
        "task": probe.task,
        "choice": probe.choice,
        "other": probe.other,
        "n": len(ids),
        "difference": [difference.estimate, difference.lo, difference.hi],
    }
    for name, values in (("choice", ours), ("other", others)):
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
    if len(series) < 3:
        return series - series.mean()
    steps = np.arange(len(series))
    return series - np.polyval(np.polyfit(steps, series, 1), steps)


def steadiness(directories: list[Path]) -> dict[str, Any]:
    """Return {reward: {term, total: {mean, sd, cv: [by seed]}}} and the ratio of the pooled cv of both rewards.

    The ratio's interval resamples steps; steps draw different images, so they are nearly independent.
    """
    found: dict[str, Any] = {}
    pooled: dict[str, list[tuple[np.ndarray, float]]] = {}
    for label, (run, term) in STEADINESS.items():
        found[label] = {}
        for name, metric in (("term", term), ("total", "total")):
            series = [_series(d / run, f"reward/{metric}/iaa") for d in directories]
            sd = [float(_residuals(s).std()) for s in series]
            means = [float(s.mean()) for s in series]
            cv = [_share(a, b) for a, b in zip(sd, means, strict=True)]
            found[label][name] = {"mean": means, "sd": sd, "cv": cv}
            if name == "term":
                pooled[label] = [(_residuals(s), float(s.mean())) for s in series]
    rng = np.random.default_rng(0)

    def cv(parts: list[tuple[np.ndarray, float]], resample: bool) -> float:
        drawn = [(r[rng.integers(0, len(r), len(r))] if resample else r, m) for r, m in parts]
        return float(np.mean([_share(float(r.std()), m) for r, m in drawn]))

    ratio = _share(cv(pooled["Gaussian"], False), cv(pooled["Thurstone"], False))
    draws = [_share(cv(pooled["Gaussian"], True), cv(pooled["Thurstone"], True)) for _ in range(ROUNDS)]
    lo, hi = np.quantile(draws, [0.025, 0.975])
    found["cv_ratio_gaussian_over_thurstone"] = [ratio, float(lo), float(hi)]
    return found


def _share(part: float, whole: float) -> float:
    """part / whole; NaN if whole is 0, since a reward that is always 0 has no relative spread."""
    return part / whole if whole else math.nan


def _mean_range(values: list[float | None]) -> str:
    if None in values:
        return "—"
    return f"{np.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"  # type: ignore[arg-type, type-var]


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    """Return the comparison table as text cells, for terminal and Markdown."""
    rows = []
    for r in found["probes"]:
        value, lo, hi = r["difference"]
        each = ", ".join(_number(d, sign=True) for d in _differences(r))
        names = [f"{r[k]}: {_mean(r[f'srcc_{k}'])} / {_mean(r[f'plcc_{k}'])}" for k in ("choice", "other")]
        interval = f"{_number(lo, sign=True)} to {_number(hi, sign=True)}"
        rows.append([r["task"].upper(), *names, _number(value, sign=True), interval, each, verdict(r)])
    return rows


def steadiness_rows(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for label in STEADINESS:
        for name, said in (("term", f"{label} term"), ("total", "whole reward")):
            v = found["iaa_reward"][label][name]
            rows.append([label, said, *(_mean_range(v[k]) for k in ("mean", "sd", "cv"))])
    return rows


COLUMNS = (
    "task",
    "method's choice, SRCC / PLCC",
    "other, SRCC / PLCC",
    "SRCC difference",
    "95 % interval",
    "by seed",
    "choice better?",
)
STEADY_COLUMNS = ("IAA reward", "measure", "mean", "SD over steps", "SD / mean")


def _ratio_sentence(found: dict[str, Any]) -> str:
    ratio, lo, hi = (_number(v) for v in found["iaa_reward"]["cv_ratio_gaussian_over_thurstone"])
    return f"SD / mean of the Gaussian term over that of the Thurstone term: {ratio} (95 % {lo} to {hi})."


def markdown(found: dict[str, Any]) -> str:
    """Format both tables as Markdown."""
    lines = []
    for columns, rows in ((COLUMNS, rows_of(found)), (STEADY_COLUMNS, steadiness_rows(found))):
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    return "\n".join([*lines, _ratio_sentence(found), ""])


def print_tables(console: Console, found: dict[str, Any]) -> None:
    """Print both tables on the terminal."""
    for title, columns, rows in (
        (f"Controlled probes, {found['seeds']} seed(s)", COLUMNS, rows_of(found)),
        (
            "Steadiness of the IAA reward over training steps, mean (range over seeds)",
            STEADY_COLUMNS,
            steadiness_rows(found),
        ),
    ):
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(_ratio_sentence(found))


def plot(found: dict[str, Any], directories: list[Path], file: Path) -> None:
    """Plot two SVG panels: SRCC differences with intervals, and the IAA term over steps, one line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "probes"  # the same figures give the same file
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), gridspec_kw={"width_ratios": [1.25, 1]})
    labels = [f"{r['task'].upper()}: {r['choice']}\nover {r['other']}" for r in found["probes"]]
    places = np.arange(len(labels))[::-1]
    for place, r in zip(places, found["probes"], strict=True):
        value, lo, hi = (math.nan if v is None else v for v in r["difference"])
        color = "#2b6cb0" if r["task"] == "iqa" else "#c05621"
        left.plot([lo, hi], [place, place], color=color, linewidth=2)
        left.plot(value, place, "o", color=color)
        each = [math.nan if d is None else d for d in _differences(r)]
        left.plot(each, [place - 0.22] * len(each), "|", color=color, markersize=7)
    left.axvline(0, color="0.6", linewidth=0.8)
    left.set_yticks(places, labels)
    left.set_ylim(-0.6, len(labels) - 0.4)
    left.set_xlabel("SRCC of the method's choice minus the other's\n95 % over photographs; ticks: seeds", fontsize=9)
    for label, color in (("Thurstone", "#c05621"), ("Gaussian", "#718096")):
        run, term = STEADINESS[label]
        for k, directory in enumerate(directories):
            series = _series(directory / run, f"reward/{term}/iaa")
            right.plot(series, color=color, alpha=0.75, linewidth=1, label=f"{label} term" if k == 0 else None)
    right.set_ylim(0, 1)
    right.set_xlabel("GRPO step", fontsize=9)
    right.set_title("IAA reward term, step means, one line a seed", fontsize=9, loc="left")
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
