"""Run the paper's controlled comparisons (single changes) on the demo: `tatar-dist probes`.

The method itself (fast IQA, slow IAA; Gaussian IQA, Thurstone IAA) is one side of every comparison; configs/probes
holds the changes. Writes run directories DIR/seed_K/RUN/ and DIR/seed_K/RUN-eval/, and the results as DIR/probes.json,
probes.md and probes.svg. A repeated call resumes: runs with a result are skipped.

Differences are paired on the same test crops and averaged over seeds, with 95 % intervals resampled by source
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
from rich.console import Console
from scipy.signal import detrend

from tatar_dist.assets import CONFIGS
from tatar_dist.demo.data.make import make_demo, restyle
from tatar_dist.demo.figures import answers, number, print_table
from tatar_dist.demo.pipeline import FULL, SMOKE, demo_config, run_stage, same_settings
from tatar_dist.evaluate.bootstrap import paired_srcc_difference
from tatar_dist.evaluate.metrics import MIDPOINT, plcc, srcc
from tatar_dist.evaluate.tables import markdown
from tatar_dist.run.directory import read_metrics
from tatar_dist.run.files import write_whole
from tatar_dist.scoring.export import model_of


@dataclass(frozen=True)
class Probe:
    """Comparison on one task; `change` (a file of configs/probes) turns `choice` into `other`."""

    task: str
    stage: str
    change: str
    choice: str
    other: str


PROBES = (
    Probe("iqa", "sft", "slow-iqa", "fast rationale", "slow rationale"),
    Probe("iaa", "sft", "fast-iaa", "slow rationale", "fast rationale"),
    Probe("iqa", "grpo", "thurstone-iqa", "Gaussian reward", "Thurstone reward"),
    Probe("iaa", "grpo", "gaussian-iaa", "Thurstone reward", "Gaussian reward"),
)
METHOD = "tatar"  # the run without a change
# (stage, change) of every training, in order: GRPO starts from the model of sft-tatar
RUNS = [(stage, c) for stage in ("sft", "grpo") for c in (METHOD, *(p.change for p in PROBES if p.stage == stage))]
STEADINESS = {"Thurstone": "grpo-tatar", "Gaussian": "grpo-gaussian-iaa"}  # IAA reward -> the run that has it
ROUNDS = 2000
COLORS = {"iqa": "#2b6cb0", "iaa": "#c05621", "Thurstone": "#c05621", "Gaussian": "#718096"}
SIDES = ("method's choice, SRCC / PLCC", "other, SRCC / PLCC")
COMPARISON = ("task", *SIDES, "SRCC difference", "95 % interval", "by seed", "choice better?")
STEADY = ("IAA reward", "measure", "mean", "SD over steps", "SD / mean")
Rewards = dict[str, dict[str, list[np.ndarray]]]  # IAA reward -> {"term", "total"} -> its value by step, by seed


def run(output: str | Path, seeds: int, smoke: bool = False, overrides: list[str] | None = None) -> dict[str, Any]:
    """Make the data, run trainings and evaluations without a result, write and return figures.

    Raises:
        UserError: the directory holds probes with other settings or is not writable, or an override is invalid.
    """
    from tatar_dist.cluster.ray_cluster import Cluster

    out, size, words = Path(output), SMOKE if smoke else FULL, list(overrides or [])
    console = Console(stderr=True)
    same_settings(out, {"smoke": smoke, "seeds": seeds, "overrides": words})
    if smoke:
        words = [*size.overrides, "data.eval_limit=16", *words]
    make_demo(out / "data", **size.data)
    restyle(out / "data")
    base = demo_config(out / "base", out / "data", words, [CONFIGS / "probes" / "probe.yaml"])
    with Cluster(base):  # one Ray for all runs
        for seed in range(seeds):
            for i, (stage, change) in enumerate(RUNS, 1):
                console.print(f"[bold]seed {seed}[/bold]  {stage}-{change} ({i} of {len(RUNS)})")
                _run_one(out / f"seed_{seed}", out / "data", stage, change, [f"seed={seed}", *words])
    return write_figures(out, seeds, console)


def _run_one(directory: Path, data: Path, stage: str, change: str, words: list[str]) -> None:
    """Train and evaluate one run; skips what is done."""
    names = ["probe"] if change == METHOD else ["probe", change]
    files = [CONFIGS / "probes" / f"{name}.yaml" for name in names]
    start = [f"model.path={model_of(directory / f'sft-{METHOD}')}"] if stage == "grpo" else []
    target, evaluation = directory / f"{stage}-{change}", directory / f"{stage}-{change}-eval"
    run_stage(stage, demo_config(target, data, [*words, *start], files))
    run_stage("evaluate", demo_config(evaluation, data, [*words, f"model.path={model_of(target)}"], files))


def write_figures(out: Path, seeds: int, console: Console) -> dict[str, Any]:
    """Compute, write and print all results; returns the content of probes.json."""
    directories = [out / f"seed_{k}" for k in range(seeds)]
    rewards = {label: _rewards([d / name for d in directories], label.lower()) for label, name in STEADINESS.items()}
    comparisons = [compare(p, directories) for p in PROBES]
    text = json.dumps({"seeds": seeds, "probes": comparisons, "iaa_reward": steadiness(rewards)})
    results = json.loads(text, parse_constant=lambda _: None)  # JSON has no NaN
    write_whole(out / "probes.json", json.dumps(results, indent=1))
    steady = results["iaa_reward"]
    rows = (comparison_rows(results["probes"]), steadiness_rows(steady))
    ratio, lo, hi = (number(v) for v in steady["cv_ratio_gaussian_over_thurstone"])
    sentence = f"SD / mean of the Gaussian term over that of the Thurstone term: {ratio} (95 % {lo} to {hi})."
    write_whole(out / "probes.md", "\n".join([markdown(rows[0], COMPARISON), markdown(rows[1], STEADY), sentence, ""]))
    plot(results["probes"], rewards, out / "probes.svg")
    print_table(console, f"Controlled probes, {seeds} seed(s)", COMPARISON, rows[0])
    print_table(console, "Steadiness of the IAA reward over steps, mean (range over seeds)", STEADY, rows[1])
    console.print(sentence)
    console.print(f"Tables and plots: {out / 'probes.md'}, {out / 'probes.svg'}")
    return results


def _rewards(runs: Sequence[Path], term: str) -> dict[str, list[np.ndarray]]:
    """Read the IAA reward term and the whole IAA reward of GRPO runs, (steps,) each."""
    lines = [read_metrics(directory) for directory in runs]
    keys = {"term": f"reward/{term}/iaa", "total": "reward/total/iaa"}
    return {name: [np.array([row[key] for row in run], np.float64) for run in lines] for name, key in keys.items()}


def compare(probe: Probe, directories: Sequence[Path]) -> dict[str, Any]:
    """Return a row: SRCC, PLCC of both sides by seed; paired SRCC difference with its interval."""
    names = [f"{probe.stage}-{change}-eval" for change in (METHOD, probe.change)]
    sides = [[answers(d / name, probe.task) for d in directories] for name in names]
    target, source = (sides[0][0][column].to_numpy() for column in ("target", "source"))
    choice, other = (np.array([seed["prediction"].to_numpy() for seed in side]) for side in sides)
    difference = paired_srcc_difference(target, other, choice, source)
    row: dict[str, Any] = {
        "task": probe.task,
        "choice": probe.choice,
        "other": probe.other,
        "n": len(target),
        "difference": [difference.estimate, difference.lo, difference.hi],
    }
    for name, values in (("choice", choice), ("other", other)):
        predictions = np.clip(np.nan_to_num(values, nan=MIDPOINT), 0, 100)
        row[f"srcc_{name}"] = [float(srcc(target, p)) for p in predictions]
        row[f"plcc_{name}"] = [float(plcc(target, p)) for p in predictions]
        row[f"parsed_{name}"] = float(np.isfinite(values).mean())
    return row


def verdict(row: dict[str, Any]) -> str:
    """Return whether the method's choice was better: yes, no, no difference seen, or undefined."""
    _, lo, hi = row["difference"]
    if lo is None:
        return "undefined"
    return "yes" if lo > 0 else "no, the reverse" if hi < 0 else "no difference seen"


def residuals(series: np.ndarray) -> np.ndarray:
    """Return residuals (n,) from the least-squares line, or from the mean if n < 3."""
    return detrend(series, type="linear" if len(series) >= 3 else "constant")


def steadiness(rewards: Rewards) -> dict[str, Any]:
    """Return {reward: {term, total: {mean, sd, cv: [by seed]}}} and the ratio of both terms' cv.

    cv is SD / mean, NaN for a mean of 0. The ratio is of means over seeds; its interval resamples steps, which draw
    different images and so are nearly independent.
    """
    result: dict[str, Any] = {label: {} for label in rewards}
    rng = np.random.default_rng(0)
    drawn: dict[str, np.ndarray] = {}  # (ROUNDS,) the term's cv over resampled steps, averaged over seeds
    for label, measures in rewards.items():
        for name, seeds in measures.items():
            mean, sd = np.array([s.mean() for s in seeds]), np.array([residuals(s).std() for s in seeds])
            values = {"mean": mean, "sd": sd, "cv": sd / np.where(mean == 0, np.nan, mean)}
            result[label][name] = {key: by_seed.tolist() for key, by_seed in values.items()}
        samples = [rng.choice(residuals(s), (ROUNDS, len(s))).std(axis=1) for s in measures["term"]]
        drawn[label] = np.mean(
            [sd / (s.mean() or math.nan) for sd, s in zip(samples, measures["term"], strict=True)], 0
        )
    gaussian, thurstone = (float(np.mean(result[label]["term"]["cv"])) for label in ("Gaussian", "Thurstone"))
    lo, hi = np.quantile(drawn["Gaussian"] / drawn["Thurstone"], [0.025, 0.975])
    ratio = gaussian / (thurstone or math.nan)
    result["cv_ratio_gaussian_over_thurstone"] = [ratio, float(lo), float(hi)]
    return result


def _mean(values: Sequence[float | None], with_range: bool = False) -> str:
    """Format the mean over seeds, optionally with the range; a dash if a value is undefined."""
    if None in values:
        return "—"
    return f"{np.mean(values):.3f}" + (f" ({min(values):.3f}–{max(values):.3f})" if with_range else "")


def _differences(row: dict[str, Any]) -> np.ndarray:
    """Return SRCC of the choice minus that of the other, by seed; NaN where one is undefined."""
    return np.array(row["srcc_choice"], np.float64) - np.array(row["srcc_other"], np.float64)


def comparison_rows(comparisons: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the comparison table as text cells."""
    rows = []
    for r in comparisons:
        value, lo, hi = (number(v, "+.3f") for v in r["difference"])
        by_seed = ", ".join(number(d, "+.3f") for d in _differences(r))
        sides = [f"{r[k]}: {_mean(r[f'srcc_{k}'])} / {_mean(r[f'plcc_{k}'])}" for k in ("choice", "other")]
        rows.append([r["task"].upper(), *sides, value, f"{lo} to {hi}", by_seed, verdict(r)])
    return rows


def steadiness_rows(steady: dict[str, Any]) -> list[list[str]]:
    """Return the steadiness table as text cells."""
    rows = []
    for label in STEADINESS:
        for name, measure in (("term", f"{label} term"), ("total", "whole reward")):
            cells = [_mean(steady[label][name][key], with_range=True) for key in ("mean", "sd", "cv")]
            rows.append([label, measure, *cells])
    return rows


def plot(comparisons: Sequence[dict[str, Any]], rewards: Rewards, file: Path) -> None:
    """Plot an SVG: SRCC differences with intervals, and the IAA term over steps by seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {"svg.hashsalt": "probes", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with plt.rc_context(style):  # the salt: the same figures give the same file
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=(1.25, 1), layout="tight")
        labels = [f"{r['task'].upper()}: {r['choice']}\nover {r['other']}" for r in comparisons]
        left.set_yticks(range(len(labels)), labels)
        left.set_ylim(len(labels) - 0.4, -0.6)
        for place, r in enumerate(comparisons):
            color, by_seed = COLORS[r["task"]], _differences(r)
            value, *interval = np.array(r["difference"], np.float64)
            left.plot(interval, [place, place], color=color, linewidth=2)
            left.plot(value, place, "o", color=color)
            left.plot(by_seed, np.full(len(by_seed), place + 0.22), "|", color=color, markersize=7)
        left.axvline(0, color="0.6", linewidth=0.8)
        left.set_xlabel("SRCC of the method's choice minus the other's\n95 % over photographs; ticks: seeds")
        for label, measures in rewards.items():
            for k, series in enumerate(measures["term"]):
                right.plot(
                    series, color=COLORS[label], alpha=0.75, linewidth=1, label=f"{label} term" if not k else None
                )
        right.set_ylim(0, 1)
        right.set_xlabel("GRPO step")
        right.set_title("IAA reward term, step means, one line a seed", fontsize=9, loc="left")
        right.legend(frameon=False)
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)
