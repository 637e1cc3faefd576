"""Charts of the page: learning curves, scatters with calibration, and SRCC per photograph.

Functions of `RunFiles` and `Rollouts` that return plain records for the template. Curves that were not logged are
omitted, as are panels without curves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from tatar_dist.evaluate.metrics import srcc, usable
from tatar_dist.report.charts import (
    Line,
    bins,
    calibration,
    calibration_note,
    line_chart,
    number,
    scatter,
    stacked_bars,
)
from tatar_dist.report.reading import EvaluationFiles, Rollouts, RunFiles, Training, is_number
from tatar_dist.report.verdict import TASK_NAMES, edges, name_of

MAIN_TERMS = (
    "gaussian",
    "thurstone",
    "pairwise",
    "binary",
)  # what the reward is about; format and length only guard it
TIME_PARTS = (("generate", "t1"), ("learn", "t2"), ("sync", "t3"), ("reward", "t4"))
MOST_SOURCES = 12
MIN_PER_SOURCE = 8  # images: fewer give no rank correlation worth printing
TERM_COLORS = ("muted", "faint", "ink")
LEAST = 20  # sampled answers: fewer show nothing
LEAST_BINNED = 10  # answers: fewer have no calibration


@dataclass(frozen=True)
class Panel:
    """One titled figure. legend: (name, CSS variable, text)."""

    title: str
    caption: str
    charts: list[Markup]
    legend: list[tuple[str, str, str]] = field(default_factory=list)


def panels(run: RunFiles) -> list[Panel]:
    """Return all panels with data, in the order of the stages."""
    found: list[Panel | None] = []
    for training in run.trainings:
        if training.kind == "sft":
            found.append(_loss(training))
        else:
            found += [_reward(training, task) for task in TASK_NAMES]
            found += [_agreement(training), _length(training), _policy(training)]
        found.append(_held_out_srcc(training))
    found += [_step_time(t) for t in run.trainings[-1:]]
    return [p for p in found if p is not None and any(p.charts)]


def _arrow(values: np.ndarray) -> str:
    first, last = edges(values)
    return f"{number(first)} \N{RIGHTWARDS ARROW} {number(last)}"


def _loss(training: Training) -> Panel:
    lines = [Line("training", *training.series("loss/total"), "ink")]
    lines += [Line(n, *training.series(f"eval/loss/{t}"), t, smooth=False) for t, n in TASK_NAMES.items()]
    shown = line_chart(lines, "SFT loss over steps")
    has_eval = any(len(line.x) for line in lines[1:])
    end = " In colour: held-out images." if has_eval else ""
    return Panel("SFT loss", f"Cross-entropy in nats a token, assistant turn only.{end}", [shown])


def _reward(training: Training, task: str) -> Panel | None:
    terms = sorted(training.terms(task), key=lambda t: t not in MAIN_TERMS)
    lines, rest = [], iter(TERM_COLORS * 3)
    for term in terms:
        main = term in MAIN_TERMS
        lines.append(
            Line(term, *training.series(f"reward/{term}/{task}"), task if main else next(rest), dashed=not main)
        )
    total = training.series(f"reward/total/{task}")[1]
    if not lines or not len(total):
        return None
    title = f"Reward, {TASK_NAMES[task]}"
    caption = f"Mean of the sampled completions, by term. Their sum, first to last fifth: {_arrow(total)}."
    return Panel(title, caption, [line_chart(lines, title, y_range=(0.0, 1.0))])


def _agreement(training: Training) -> Panel | None:
    lines = [Line(n, *training.series(f"reward/agreement/{t}"), t) for t, n in TASK_NAMES.items()]
    if not any(len(line.x) for line in lines):  # a run of before this metric
        return None
    caption = "Kendall's tau of a group's rewards with nearness to its own target: 1 where nearer always pays more."
    return Panel("Reward and nearness", caption, [line_chart(lines, "Agreement over steps", y_range=(0.0, 1.0))])


def _length(training: Training) -> Panel:
    lines = [Line(n, *training.series(f"completion/tokens/{t}"), t) for t, n in TASK_NAMES.items()]
    words = [(n, training.series(f"completion/think_words/{t}")[1]) for t, n in TASK_NAMES.items()]
    late = ", ".join(f"{n} {edges(v)[1]:.0f}" for n, v in words if len(v))
    caption = "Tokens per completion." + (f" Words of thought at the end: {late}." if late else "")
    return Panel("Completion length", caption, [line_chart(lines, "Completion length over steps", y_range=(0.0, 1.0))])


def _policy(training: Training) -> Panel:
    kl = line_chart([Line("KL", *training.series("loss/kl"), "ink")], "KL over steps", y_range=(0.0, 1e-6), height=105)
    entropy = [Line("entropy", *training.series("policy/entropy"), "muted")]
    charts = [kl, line_chart(entropy, "Entropy over steps", y_range=(0.0, 1e-6), height=105)]
    return Panel(
        "Policy", "Distance from the SFT model, and how varied the answers still are, in nats a token.", charts
    )


def _held_out_srcc(training: Training) -> Panel | None:
    lines = [
        Line(d, *training.series(f"eval/{d}/srcc"), "iaa" if "iaa" in d else "iqa", smooth=False)
        for d in training.held_out
    ]
    if not lines:
        return None
    shown = line_chart(lines, "Held-out SRCC over steps", y_range=(0.0, 1.0))
    return Panel(f"Held-out SRCC during {training.kind.upper()}", "Rank correlation with the targets.", [shown])


def _step_time(training: Training) -> Panel | None:
    step, total = training.series("time/step")
    if not len(step):
        return None
    parts, legend, known = [], [], np.zeros(len(step))
    for name, color in TIME_PARTS:
        at, seconds = training.series(f"time/{name}")
        if not len(at):
            continue
        values = np.array([dict(zip(at, seconds, strict=True)).get(s, 0.0) for s in step])
        known += values
        parts.append((values, color))
        legend.append((name, color, _seconds(values, total)))
    other = np.maximum(total - known, 0.0)
    if other.mean() > 0.01 * total.mean():
        parts.append((other, "t5"))
        legend.append(("other", "t5", _seconds(other, total)))
    caption = f"Seconds of each {training.kind.upper()} step; {total.mean():.1f} s on average."
    if known.mean() > 1.02 * total.mean():
        caption += " The parts add up to more: engines sampled ahead while the learners worked."
    return Panel("Step time", caption, [stacked_bars(step, parts, "Seconds per step by part")], legend)


def _seconds(part: np.ndarray, total: np.ndarray) -> str:
    """Format the mean seconds of a part of the step and its share of the total."""
    mean = float(part.mean())
    share = f", {mean / total.mean():.0%}" if total.mean() > 0 else ""
    return (f"{mean:.1f} s" if mean >= 0.1 else f"{1000 * mean:.0f} ms") + share


@dataclass(frozen=True)
class Cloud:
    """One square chart: a model's scores on one data set, or their calibration."""

    model: str
    note: str
    chart: Markup


@dataclass(frozen=True)
class Clouds:
    """Charts of one data set: a scatter per model, and the calibration of the last model.
    counts: (bin, n, mean score, mean target) of the calibration."""

    name: str
    task: str
    charts: list[Cloud]
    counts: list[tuple[str, int, float, float]]


def clouds(run: RunFiles, rollouts: Rollouts | None) -> tuple[list[Clouds], bool]:
    """Return the charts, and whether they show held-out answers instead of sampled completions."""
    if any(e.predictions for e in run.evaluations):
        return _held_out(run), True
    return (_sampled(rollouts) if rollouts is not None else []), False


def _held_out(run: RunFiles) -> list[Clouds]:
    result = []
    for dataset in run.datasets:
        models = []
        for evaluation in run.evaluations:
            points = [p for p in evaluation.of(dataset) if is_number(p["prediction"])]
            if points:
                value = evaluation.metrics.get(dataset, {}).get("srcc")
                pairs = [p["target"] for p in points], [p["prediction"] for p in points]
                models.append((evaluation.model, value if is_number(value) else None, *pairs))
        if models:
            result.append(_clouds(name_of(run, dataset), run.task(dataset), models))
    return result


def _sampled(rollouts: Rollouts) -> list[Clouds]:
    result = []
    for task, name in TASK_NAMES.items():
        parts = {True: rollouts.part(True, task)}
        if len(rollouts.files) > 1:
            parts = {False: rollouts.part(False, task)} | parts
        models = []
        for late, positions in parts.items():
            t, p = rollouts.target[positions], rollouts.prediction[positions]
            t, p = t[~np.isnan(p)], p[~np.isnan(p)]
            if len(t) >= LEAST:
                value = srcc(*usable(t, p)) if np.ptp(t) and np.ptp(np.clip(p, 0, 100)) else None
                models.append(("late" if late else "early", value, t.tolist(), p.tolist()))
        if models:
            result.append(_clouds(name, task, models))
    return result


def _clouds(
    name: str, task: str, models: Sequence[tuple[str, float | None, Sequence[float], Sequence[float]]]
) -> Clouds:
    charts = []
    for model, value, target, prediction in models:
        note = f"SRCC {number(value)}" if value is not None else "no SRCC"
        chart = scatter(target, prediction, task or "ink", f"{name}, {model}: prediction over target")
        charts.append(Cloud(model, f"{note}, n = {len(target):,}", chart))
    model, _, target, prediction = models[-1]
    found = bins(np.array(target), np.array(prediction)) if len(target) >= LEAST_BINNED else []
    if found:
        drawn = calibration(found, task or "ink", f"{name}, {model}: mean target by predicted score")
        charts.append(Cloud("Calibration", calibration_note(found), drawn))
    counts = [(f"{b.low:.0f} to {b.high:.0f}", b.n, b.predicted, b.target) for b in found]
    return Clouds(name, task, charts, counts)


def correlation(rows: Sequence[dict[str, Any]]) -> float | None:
    """SRCC of prediction rows without unparsed ones; None with too few rows or a constant side."""
    target = np.array([r["target"] for r in rows], np.float64)
    prediction = np.array([r["prediction"] if is_number(r["prediction"]) else np.nan for r in rows], np.float64)
    t, p = usable(target, prediction)
    if len(t) < MIN_PER_SOURCE or np.ptp(t) == 0 or np.ptp(p) == 0:
        return None
    return srcc(t, p)


@dataclass(frozen=True)
class Photographs:
    """SRCC within each source photograph. columns: (display name, task, model); rows: (photo, n, values)."""

    columns: list[tuple[str, str, str]]
    rows: list[tuple[str, list[int], list[float | None]]]
    hidden: int


def photographs(run: RunFiles) -> Photographs | None:
    """Return the table of source photographs, lowest SRCC first; None with fewer than two known sources."""
    late = run.evaluations[-2:]
    by: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for evaluation in late:
        for p in evaluation.predictions:
            if p.get("source"):
                by.setdefault((p["source"], p["dataset"], evaluation.model), []).append(p)
    sources, datasets = sorted({k[0] for k in by}), [d for d in run.datasets if any(k[1] == d for k in by)]
    if len(sources) < 2:
        return None
    models = [e.model for e in late if _says_enough(e, by)]
    keys = [(d, m) for d in datasets for m in models]
    if not keys:
        return None
    rows = []
    for source in sources:
        counts = [len(by.get((source, d, models[-1]), [])) for d in datasets]
        rows.append((source, counts, [correlation(by.get((source, *key), [])) for key in keys]))
    last = [keys.index((d, models[-1])) for d in datasets]
    rows.sort(key=lambda r: min((v for i in last if (v := r[2][i]) is not None), default=2.0))
    columns = [(name_of(run, d), run.task(d), m) for d, m in keys]
    return Photographs(columns, rows[:MOST_SOURCES], max(0, len(rows) - MOST_SOURCES))


def _says_enough(evaluation: EvaluationFiles, by: dict[tuple[str, str, str], list[dict[str, Any]]]) -> bool:
    return any(len(rows) >= MIN_PER_SOURCE for key, rows in by.items() if key[2] == evaluation.model)
