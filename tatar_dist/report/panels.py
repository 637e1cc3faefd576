"""Charts of the page: learning curves, scatters with calibration, and SRCC per photograph.

Functions of `RunFiles` and `Rollouts` that return plain records for the template. Curves that were not logged are
omitted, as are panels without curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
from markupsafe import Markup

from tatar_dist.evaluate.metrics import srcc, usable
from tatar_dist.report.charts import (
    Bin,
    Line,
    bins,
    calibration,
    line_chart,
    miscalibration,
    number,
    scatter,
    stacked_bars,
)
from tatar_dist.report.reading import Rollouts, RunFiles, Training, is_number
from tatar_dist.report.verdict import TASK_NAMES, arrow, name_of

MAIN_TERMS = ("gaussian", "thurstone", "pairwise", "binary")  # the others only guard the reward
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


@dataclass(frozen=True)
class Curves:
    """One chart of a panel. lines: (metric, label, CSS variable), with True if dashed;
    top: least upper end of the axis from 0, None for the range of the data."""

    name: str
    lines: tuple[tuple[str, str, str] | tuple[str, str, str, bool], ...]
    top: float | None = 1e-9


def _by_task(metric: str) -> tuple[tuple[str, str, str], ...]:
    return tuple((f"{metric}/{task}", name, task) for task, name in TASK_NAMES.items())


def _single(metric: str, name: str, color: str = "ink") -> Curves:
    return Curves(name, ((metric, name, color),))


Table = tuple[tuple[str, str, tuple[Curves, ...]], ...]  # title, caption, charts of each panel
MAIN: dict[str, Table] = {
    "sft": (
        (
            "SFT loss",
            "Cross-entropy in nats a token, assistant turn only. In colour: held-out images.",
            (Curves("SFT loss", (("loss/total", "training", "ink"), *_by_task("eval/loss")), None),),
        ),
    ),
    "grpo": (
        (
            "Reward and nearness",
            "Kendall's tau of a group's rewards with nearness to its own target: 1 where nearer always pays more.",
            (Curves("Agreement", _by_task("reward/agreement"), 1.0),),
        ),
        (
            "Completion length",
            "Tokens per completion, and below the words of its thought where a run logs them.",
            (
                Curves("Completion length", _by_task("completion/tokens"), 1.0),
                Curves("Words of thought", _by_task("completion/think_words"), 1.0),
            ),
        ),
        (
            "Policy",
            "Distance from the SFT model, and how varied the answers still are, in nats a token.",
            (_single("loss/kl", "KL"), _single("policy/entropy", "entropy", "muted")),
        ),
    ),
}
MORE: Table = (
    (
        "Sync gap",
        "How far log-probabilities of engine and learner differ, in nats a token: mean, and largest.",
        (_single("sync/logprob_gap", "mean gap"), _single("sync/logprob_gap_max", "largest")),
    ),
    (
        "Groups that teach nothing",
        "Share of groups whose completions all got one reward.",
        (Curves("Groups that teach nothing", _by_task("reward/frac_zero_std/total"), 1.0),),
    ),
    (
        "Unparsed, and cut off",
        "Shares of the sampled completions: without a score above, cut off below.",
        (
            Curves("Unparsed completions", _by_task("completion/parse_failures"), 0.1),
            Curves("Completions cut off", _by_task("completion/clipped_ratio"), 0.1),
        ),
    ),
    (
        "Optimiser",
        "Norm of the gradient before clipping, and the learning rate.",
        (_single("optim/grad_norm", "gradient"), _single("optim/lr", "rate")),
    ),
    (
        "Speed",
        "Sampled tokens a second, and the share of a step in which each side waits.",
        (
            _single("perf/tokens_per_second", "tokens/s"),
            Curves(
                "Idle share", (("perf/rollout_idle", "engines", "t1"), ("perf/learner_idle", "learners", "t2")), 1.0
            ),
        ),
    ),
)


def panels(run: RunFiles) -> list[Panel]:
    """Return all panels with data, in the order of the stages."""
    result = []
    for training in run.trainings:
        held_out = tuple((f"eval/{d}/srcc", d, "iaa" if "iaa" in d else "iqa") for d in training.held_out)
        title, caption = f"Held-out SRCC during {training.kind.upper()}", "Rank correlation with the targets."
        table = (*_rewards(training), *MAIN[training.kind], (title, caption, (Curves("Held-out SRCC", held_out, 1.0),)))
        result += drawn(training, table)
    return result + [panel for t in run.trainings[-1:] if (panel := _step_time(t))]


def drawn(training: Training, table: Table) -> list[Panel]:
    """Draw the panels of a table, without charts and panels that have no data."""
    result = []
    for title, caption, charts in table:
        logged = [c for c in charts if any(len(training.values(metric)) for metric, *_ in c.lines)]
        drawings = [
            line_chart(
                [line(training, *of) for of in c.lines],
                f"{c.name} over steps",
                y_range=None if c.top is None else (0.0, c.top),
                height=210 if len(logged) == 1 else 105,
            )
            for c in logged
        ]
        if drawings:
            result.append(Panel(title, caption, drawings))
    return result


def line(training: Training, metric: str, label: str, color: str, dashed: bool = False) -> Line:
    """Return a metric's curve, smoothed unless it is from an evaluation or the learning rate."""
    smooth = not metric.startswith(("eval/", "optim/lr"))
    return Line(label, *training.series(metric), color, smooth=smooth, dashed=dashed)


def _rewards(training: Training) -> Table:
    """Return a panel of reward terms per task: MAIN_TERMS as solid lines, the others dashed."""
    table, shares = [], []
    for task, name in TASK_NAMES.items():
        total = training.values(f"reward/total/{task}")
        terms = training.terms(task)
        scoring = [(f"reward/{t}/{task}", t, task) for t in terms if t in MAIN_TERMS]
        guards = [t for t in terms if t not in MAIN_TERMS]
        dashed = [(f"reward/{t}/{task}", t, color, True) for t, color in zip(guards, cycle(TERM_COLORS))]
        if len(total):
            caption = f"Mean of the sampled completions, by term. Their sum, first to last fifth: {arrow(total)}."
            table.append((f"Reward, {name}", caption, (Curves(f"Reward, {name}", (*scoring, *dashed), 1.0),)))
        parts = [(metric.replace("/", "/share/", 1), *look) for metric, *look in (*scoring, *dashed)]
        shares.append(Curves(f"Share of the advantage, {name}", (*parts,), 1.0))
    caption = "What the advantage followed: the covariance of each term's part with it, over its variance."
    return (*table, ("Share of the advantage", caption, (*shares,)))


def _step_time(training: Training) -> Panel | None:
    step, total = training.series("time/step")
    if not len(step):
        return None
    parts = []
    for name, color in TIME_PARTS:
        seconds = dict(zip(*training.series(f"time/{name}"), strict=True))
        if seconds:
            parts.append((name, color, np.array([seconds.get(s, 0.0) for s in step])))
    known = sum((seconds for *_, seconds in parts), np.zeros(len(step)))
    other = np.maximum(total - known, 0.0)
    if other.mean() > 0.01 * total.mean():
        parts.append(("other", "t5", other))
    caption = f"Seconds of each {training.kind.upper()} step; {total.mean():.1f} s on average."
    if known.mean() > 1.02 * total.mean():
        caption += " The parts add up to more: engines sampled ahead while the learners worked."
    chart = stacked_bars(step, [(seconds, color) for _, color, seconds in parts], "Seconds per step by part")
    return Panel("Step time", caption, [chart], [(name, color, _seconds(s, total)) for name, color, s in parts])


def _seconds(part: np.ndarray, total: np.ndarray) -> str:
    """Format the mean seconds of a part of the step and its share of the total."""
    mean = float(part.mean())
    share = f", {mean / total.mean():.0%}" if total.mean() > 0 else ""
    return (f"{mean:.1f} s" if mean >= 0.1 else f"{1000 * mean:.0f} ms") + share


@dataclass(frozen=True)
class Clouds:
    """Charts of one data set, or of a task's sampled completions.

    charts: (model or "Calibration", note, chart). bins: of the last model's calibration.
    """

    name: str
    task: str
    charts: list[tuple[str, str, Markup]]
    bins: list[Bin]


Scores = tuple[str, float | None, np.ndarray]  # model, SRCC, (2, n) targets and predictions


def clouds(run: RunFiles, rollouts: Rollouts | None) -> tuple[list[Clouds], bool]:
    """Return the charts, and whether they show held-out answers instead of sampled completions."""
    held_out = any(e.predictions for e in run.evaluations)
    if held_out:
        entries = [(name_of(run, d), run.task(d), _held_out(run, d)) for d in run.datasets]
    else:
        entries = [(name, task, _sampled(rollouts, task)) for task, name in TASK_NAMES.items()] if rollouts else []
    return [_clouds(name, task, models) for name, task, models in entries if models], held_out


def _held_out(run: RunFiles, dataset: str) -> list[Scores]:
    models: list[Scores] = []
    for e in run.evaluations:
        points = _parsed(e.of(dataset))
        if points.size:
            value = e.metrics.get(dataset, {}).get("srcc")
            models.append((e.model, value if is_number(value) else None, points))
    return models


def _sampled(rollouts: Rollouts, task: str) -> list[Scores]:
    models: list[Scores] = []
    for late in (False, True) if len(rollouts.files) > 1 else (True,):
        points = _parsed([r for r in rollouts.part(late) if r["task"] == task])
        if points.shape[1] >= LEAST:
            models.append(("late" if late else "early", correlation(*points), points))
    return models


def _parsed(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the targets and predictions of the parsed answers, (2, n)."""
    points = [(r["target"], r["prediction"]) for r in rows if is_number(r["prediction"])]
    return np.array(points, np.float64).reshape(-1, 2).T


def _clouds(name: str, task: str, models: Sequence[Scores]) -> Clouds:
    charts = []
    for model, value, points in models:
        note = f"SRCC {number(value)}" if value is not None else "no SRCC"
        chart = scatter(*points, task or "ink", f"{name}, {model}: prediction over target")
        charts.append((model, f"{note}, n = {points.shape[1]:,}", chart))
    model, _, points = models[-1]
    calibrated = bins(*points) if points.shape[1] >= LEAST_BINNED else []
    if calibrated:
        chart = calibration(calibrated, task or "ink", f"{name}, {model}: mean target by predicted score")
        charts.append(("Calibration", f"off by {number(miscalibration(calibrated))} points", chart))
    return Clouds(name, task, charts, calibrated)


def correlation(target: np.ndarray, prediction: np.ndarray) -> float | None:
    """Return the SRCC of (n,) parsed scores; None with too few rows or a constant side."""
    t, p = usable(target, prediction)
    return srcc(t, p) if len(t) >= MIN_PER_SOURCE and np.ptp(t) and np.ptp(p) else None


@dataclass(frozen=True)
class Photographs:
    """SRCC within each source photograph.

    columns: (display name, task, model). rows: (photograph, number of predictions per data set, SRCC per column or
    None). hidden: number of further photographs that are not shown.
    """

    columns: list[tuple[str, str, str]]
    rows: list[tuple[str, list[int], list[float | None]]]
    hidden: int


def photographs(run: RunFiles) -> Photographs | None:
    """Tabulate source photographs, lowest SRCC first; None with fewer than two known sources."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}  # predictions by (photograph, data set, model)
    for e in run.evaluations[-2:]:
        for p in e.predictions:
            if p["source"]:
                groups.setdefault((p["source"], p["dataset"], e.model), []).append(p)
    sources = sorted({source for source, *_ in groups})
    datasets = [d for d in run.datasets if any(d == dataset for _, dataset, _ in groups)]
    large = {model for (*_, model), rows in groups.items() if len(rows) >= MIN_PER_SOURCE}
    models = [e.model for e in run.evaluations[-2:] if e.model in large]
    if len(sources) < 2 or not models:
        return None
    columns = [(d, m) for d in datasets for m in models]
    rows = []
    for source in sources:
        counts = [len(groups.get((source, d, models[-1]), [])) for d in datasets]
        rows.append((source, counts, [correlation(*_parsed(groups.get((source, *c), []))) for c in columns]))
    last = slice(len(models) - 1, None, len(models))  # the columns of the last model
    rows.sort(key=lambda row: min((v for v in row[2][last] if v is not None), default=2.0))
    names = [(name_of(run, d), run.task(d), m) for d, m in columns]
    return Photographs(names, rows[:MOST_SOURCES], max(0, len(rows) - MOST_SOURCES))
