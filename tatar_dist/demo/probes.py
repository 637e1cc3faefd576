"""`tatar-dist probes`: the paper's controlled comparisons on the demo set, one change at a time, over several seeds.

The method itself (fast IQA, slow IAA; Gaussian IQA, Thurstone IAA) is one side of every comparison; configs/probes
holds the changes. Rationales are compared after SFT, rewards after GRPO from the method's own SFT model. Writes run
directories DIR/seed_K/RUN/ and DIR/seed_K/RUN-eval/, and the results as DIR/probes.json, probes.md and probes.svg. A
repeated call resumes: runs with a result are skipped.

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
import pyarrow.parquet as pq
from rich.console import Console
from scipy.signal import detrend

from tatar_dist.assets import CONFIGS
from tatar_dist.demo.data.make import make_demo, restyle
from tatar_dist.demo.figures import markdown_table, terminal_table
from tatar_dist.demo.pipeline import FULL, SMOKE, demo_config, same_settings
from tatar_dist.evaluate.bootstrap import paired_srcc_difference
from tatar_dist.evaluate.metrics import plcc, srcc
from tatar_dist.run.directory import read_metrics
from tatar_dist.scoring.export import model_of


@dataclass(frozen=True)
class ProbeRun:
    """One training. change: a file of configs/probes; start: the run whose model it starts from."""

    name: str
    stage: str
    change: str | None = None
    start: str | None = None


@dataclass(frozen=True)
class Probe:
    """One comparison on one task: the method's choice and the alternative, each with its run."""

    task: str
    choice: str
    run: str
    other: str
    other_run: str


RUNS = (
    ProbeRun("sft-tatar", "sft"),
    ProbeRun("sft-slow-iqa", "sft", "slow-iqa"),
    ProbeRun("sft-fast-iaa", "sft", "fast-iaa"),
    ProbeRun("grpo-tatar", "grpo", None, "sft-tatar"),
    ProbeRun("grpo-thurstone-iqa", "grpo", "thurstone-iqa", "sft-tatar"),
    ProbeRun("grpo-gaussian-iaa", "grpo", "gaussian-iaa", "sft-tatar"),
)
PROBES = (
    Probe("iqa", "fast rationale", "sft-tatar", "slow rationale", "sft-slow-iqa"),
    Probe("iaa", "slow rationale", "sft-tatar", "fast rationale", "sft-fast-iaa"),
    Probe("iqa", "Gaussian reward", "grpo-tatar", "Thurstone reward", "grpo-thurstone-iqa"),
    Probe("iaa", "Thurstone reward", "grpo-tatar", "Gaussian reward", "grpo-gaussian-iaa"),
)
STEADINESS = {"Thurstone": ("grpo-tatar", "thurstone"), "Gaussian": ("grpo-gaussian-iaa", "gaussian")}
ROUNDS = 2000
COLORS = {"iqa": "#2b6cb0", "iaa": "#c05621", "Thurstone": "#c05621", "Gaussian": "#718096"}
SIDES = ("method's choice, SRCC / PLCC", "other, SRCC / PLCC")
COMPARISON = ("task", *SIDES, "SRCC difference", "95 % interval", "by seed", "choice better?")
STEADY = ("IAA reward", "measure", "mean", "SD over steps", "SD / mean")


def run(output: str | Path, seeds: int, smoke: bool = False, overrides: list[str] | None = None) -> dict[str, Any]:
    """Make the data, run all trainings and evaluations without a result, write the figures and return them.

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
            for number, probe_run in enumerate(RUNS, 1):
                console.print(f"[bold]seed {seed}[/bold]  {probe_run.name} ({number} of {len(RUNS)})")
                _run_one(out / f"seed_{seed}", out / "data", probe_run, [f"seed={seed}", *words])
    return write_figures(out, seeds, console)


def _run_one(directory: Path, data: Path, probe_run: ProbeRun, words: list[str]) -> None:
    """Train and evaluate one run; skips what is done."""
    from tatar_dist import grpo, sft
    from tatar_dist.evaluate import runner

    files = [CONFIGS / "probes" / f"{name}.yaml" for name in ("probe", probe_run.change) if name]
    target = directory / probe_run.name
    done = target / "finished"
    if not done.exists():
        start = [f"model.path={model_of(directory / probe_run.start)}"] if probe_run.start else []
        config = demo_config(target, data, [*start, *words], files)
        (sft if probe_run.stage == "sft" else grpo).run(config)
        done.touch()
    evaluation = directory / f"{probe_run.name}-eval"
    if not (evaluation / "metrics.json").exists():
        runner.run(demo_config(evaluation, data, [f"model.path={model_of(target)}", *words], files))


def write_figures(out: Path, seeds: int, console: Console) -> dict[str, Any]:
    """Compute, write and print all results; returns the content of probes.json."""
    directories = [out / f"seed_{k}" for k in range(seeds)]
    rewards = {label: [_rewards(d / run, term) for d in directories] for label, (run, term) in STEADINESS.items()}
    comparisons = [compare(p, directories) for p in PROBES]
    text = json.dumps({"seeds": seeds, "probes": comparisons, "iaa_reward": steadiness(rewards)})
    results = json.loads(text, parse_constant=lambda _: None)  # JSON has no NaN
    (out / "probes.json").write_text(json.dumps(results, indent=1))
    steady = results["iaa_reward"]
    titles = (f"Controlled probes, {seeds} seed(s)", "Steadiness of the IAA reward over steps, mean (range over seeds)")
    tables = ((COMPARISON, comparison_rows(results["probes"])), (STEADY, steadiness_rows(steady)))
    ratio, lo, hi = (_number(v) for v in steady["cv_ratio_gaussian_over_thurstone"])
    sentence = f"SD / mean of the Gaussian term over that of the Thurstone term: {ratio} (95 % {lo} to {hi})."
    (out / "probes.md").write_text("\n".join([*(markdown_table(*table) for table in tables), sentence, ""]))
    plot(results["probes"], rewards, out / "probes.svg")
    for title, (columns, cells) in zip(titles, tables, strict=True):
        console.print(terminal_table(title, columns, cells))
    console.print(sentence)
    console.print(f"Tables and plots: {out / 'probes.md'}, {out / 'probes.svg'}")
    return results


def _rewards(directory: Path, term: str) -> dict[str, np.ndarray]:
    """Return {"term", "total": the IAA reward term and the whole reward by step, (steps,)} of a GRPO run."""
    lines = read_metrics(directory)
    keys = {"term": f"reward/{term}/iaa", "total": "reward/total/iaa"}
    return {name: np.array([line[key] for line in lines], np.float64) for name, key in keys.items()}


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


def residuals(series: np.ndarray) -> np.ndarray:
    """Residuals from the least-squares line, or from the mean of fewer than three points."""
    return detrend(series, type="linear" if len(series) >= 3 else "constant")


def steadiness(rewards: dict[str, list[dict[str, np.ndarray]]]) -> dict[str, Any]:
    """Return {reward: {term, total: {mean, sd, cv: [by seed]}}} and the ratio of the mean cv of both rewards' terms.

    cv is SD / mean, NaN for a mean of 0. The ratio's interval resamples steps; steps draw different images, so they are
    nearly independent.
    """
    result: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    drawn: dict[str, np.ndarray] = {}  # (ROUNDS,) the term's cv over resampled steps, averaged over seeds
    for label, seeds in rewards.items():
        result[label], drawn[label] = {}, np.zeros(ROUNDS)
        for name in ("term", "total"):
            series = [seed[name] for seed in seeds]
            means = [float(s.mean()) for s in series]
            sd = [float(residuals(s).std()) for s in series]
            cv = [s / (mean or math.nan) for s, mean in zip(sd, means, strict=True)]
            result[label][name] = {"mean": means, "sd": sd, "cv": cv}
        for s in (seed["term"] for seed in seeds):
            sample = rng.choice(residuals(s), (ROUNDS, len(s)))
            drawn[label] += sample.std(axis=1) / (s.mean() or math.nan) / len(seeds)
    gaussian, thurstone = (float(np.mean(result[label]["term"]["cv"])) for label in ("Gaussian", "Thurstone"))
    lo, hi = np.quantile(drawn["Gaussian"] / drawn["Thurstone"], [0.025, 0.975])
    ratio = gaussian / (thurstone or math.nan)
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


def comparison_rows(comparisons: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the comparison table as text cells."""
    rows = []
    for r in comparisons:
        value, lo, hi = (_number(v, "+.3f") for v in r["difference"])
        by_seed = ", ".join(_number(d, "+.3f") for d in _differences(r))
        sides = [f"{r[k]}: {_mean(r[f'srcc_{k}'])} / {_mean(r[f'plcc_{k}'])}" for k in ("choice", "other")]
        rows.append([r["task"].upper(), *sides, value, f"{lo} to {hi}", by_seed, verdict(r)])
    return rows


def steadiness_rows(steady: dict[str, Any]) -> list[list[str]]:
    """Return the steadiness table as text cells."""
    rows = []
    for label in STEADINESS:
        for name, measure in (("term", f"{label} term"), ("total", "whole reward")):
            values = steady[label][name]
            rows.append([label, measure, *(_mean(values[k], with_range=True) for k in ("mean", "sd", "cv"))])
    return rows


def plot(comparisons: Sequence[dict[str, Any]], rewards: dict[str, list[dict[str, np.ndarray]]], file: Path) -> None:
    """Plot two SVG panels: SRCC differences with intervals, and the IAA term over steps, one line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {"svg.hashsalt": "probes", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with plt.rc_context(style):  # the salt: the same figures give the same file
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=(1.25, 1), layout="tight")
        for place, r in enumerate(reversed(comparisons)):
            color = COLORS[r["task"]]
            value, lo, hi = np.array(r["difference"], np.float64)
            left.plot([lo, hi], [place, place], color=color, linewidth=2)
            left.plot(value, place, "o", color=color)
            by_seed = np.array(_differences(r), np.float64)
            left.plot(by_seed, np.full(len(by_seed), place - 0.22), "|", color=color, markersize=7)
        left.axvline(0, color="0.6", linewidth=0.8)
        labels = [f"{r['task'].upper()}: {r['choice']}\nover {r['other']}" for r in reversed(comparisons)]
        left.set_yticks(range(len(labels)), labels)
        left.set_ylim(-0.6, len(labels) - 0.4)
        left.set_xlabel("SRCC of the method's choice minus the other's\n95 % over photographs; ticks: seeds")
        for label, seeds in rewards.items():
            for k, seed in enumerate(seeds):
                name = f"{label} term" if k == 0 else None
                right.plot(seed["term"], color=COLORS[label], alpha=0.75, linewidth=1, label=name)
        right.set_ylim(0, 1)
        right.set_xlabel("GRPO step")
        right.set_title("IAA reward term, step means, one line a seed", fontsize=9, loc="left")
        right.legend(frameon=False)
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)
