"""Scatter and calibration charts of held-out answers or, without any, of sampled ones.

Takes `RunFiles` and the `Rollouts` of its last GRPO training; returns plain records for the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from tatar_dist.evaluate.metrics import srcc, usable
from tatar_dist.report.charts import number
from tatar_dist.report.reading import RunFiles, is_number
from tatar_dist.report.rollouts import Rollouts
from tatar_dist.report.squares import bins, calibration, calibration_note, scatter
from tatar_dist.report.verdict import TASK_NAMES, name_of

LEAST = 20  # sampled answers: fewer show nothing
LEAST_BINNED = 10  # answers: fewer have no calibration


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
