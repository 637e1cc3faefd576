"""Square charts of predicted against target scores: scatter with fitted logistic, and calibration by bin.

Targets and predictions are in points. Charts are Markup and use the page's CSS variables, as in charts.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from tatar_dist.evaluate.metrics import MIN_FIT, logistic_map, usable
from tatar_dist.report.charts import number, open_svg

LEFT, TOP, SIDE, RIGHT, BOTTOM = 30, 8, 162, 14, 22
BINS = 10  # of ten points each
CURVE_POINTS = 60
Scale = Callable[[float], float]  # points on 0-100 -> drawing units


@dataclass(frozen=True)
class Bin:
    """Calibration bin of answers between `low` and `high` points: count, mean prediction and mean target."""

    low: float
    high: float
    n: int
    predicted: float
    target: float


def bins(target: np.ndarray, prediction: np.ndarray) -> list[Bin]:
    """Return the non-empty bins of the predictions.
    target, prediction: (n,) in points. Unparsed predictions (NaN) are dropped, the others clamped to 0-100."""
    t, p = usable(target, prediction)
    of = np.minimum((p / 100 * BINS).astype(int), BINS - 1)
    found = []
    for k in np.unique(of):
        own, width = of == k, 100 / BINS
        found.append(Bin(k * width, (k + 1) * width, int(own.sum()), float(p[own].mean()), float(t[own].mean())))
    return found


def miscalibration(found: Sequence[Bin]) -> float | None:
    """Mean absolute difference of prediction and target over bins in points, weighted by n; None without bins."""
    n = sum(b.n for b in found)
    return sum(b.n * abs(b.predicted - b.target) for b in found) / n if n else None


def _frame(title: str) -> tuple[list[Markup], Scale, Scale]:
    """Draw grid, tick labels and diagonal of a 0-100 square; return them with the x and y scales."""

    def px(value: float) -> float:
        return LEFT + SIDE * min(max(value, 0.0), 100.0) / 100

    def py(value: float) -> float:
        return TOP + SIDE * (1 - min(max(value, 0.0), 100.0) / 100)

    out = [open_svg(LEFT + SIDE + RIGHT, TOP + SIDE + BOTTOM, title)]
    for t in (0, 50, 100):
        grid = Markup('<path class="grid" d="M{:.1f} {:.1f}H{:.1f}M{:.1f} {:.1f}V{:.1f}"/>')
        out.append(grid.format(LEFT, py(t), px(100), px(t), py(0), py(100)))
        out.append(Markup('<text class="end" x="{}" y="{:.1f}">{}</text>').format(LEFT - 5, py(t) + 4, t))
        out.append(Markup('<text class="mid" x="{:.1f}" y="{:.1f}">{}</text>').format(px(t), py(0) + 15, t))
    out.append(Markup('<path class="diagonal" d="M{} {:.1f}L{} {:.1f}"/>').format(LEFT, py(0), px(100), py(100)))
    return out, px, py


def scatter(target: Sequence[float], prediction: Sequence[float], color: str, title: str, most: int = 1500) -> Markup:
    """Plot predictions over targets on 0-100, with the diagonal and the fitted logistic, if any.
    The logistic has four parameters and maps predictions to targets. More than `most` points are thinned evenly."""
    out, px, py = _frame(title)
    pairs = list(zip(target, prediction, strict=True))
    thinned = pairs[:: max(1, math.ceil(len(pairs) / most))]
    dots = "".join(f"M{px(t):.1f} {py(p):.1f}h0" for t, p in thinned)  # a line of no length with round caps
    opacity = 0.35 if len(thinned) > 150 else 0.6
    path = Markup('<path class="dots" style="stroke:var(--{});stroke-opacity:{}" d="{}"/>')
    out.append(path.format(color, opacity, dots))
    fitted = _fitted(np.array(pairs, np.float64).reshape(-1, 2))
    if fitted is not None:
        line = "L".join(f"{px(t):.1f} {py(p):.1f}" for t, p in fitted)
        out.append(Markup('<path class="fit" d="M{}"/>').format(line))
    return Markup("").join([*out, Markup("</svg>")])


def _fitted(pairs: np.ndarray) -> np.ndarray | None:
    """Fit the logistic and return (m, 2) points (fitted target, prediction) over the range of the predictions.
    Returns None for fewer than `MIN_FIT` points, a constant side or a flat fit."""
    target, prediction = usable(pairs[:, 0], pairs[:, 1])
    if len(target) < MIN_FIT or np.ptp(target) == 0 or np.ptp(prediction) == 0:
        return None
    p = np.linspace(prediction.min(), prediction.max(), CURVE_POINTS)
    t = logistic_map(target, prediction)(p)
    return np.stack([t, p], axis=1) if np.isfinite(t).all() and np.ptp(t) > 1e-6 * target.std() else None


def calibration(found: Sequence[Bin], color: str, title: str) -> Markup:
    """Plot mean target (y) over mean prediction (x) per bin; dot area follows n, and the tooltip shows n."""
    out, px, py = _frame(title)
    most = max((b.n for b in found), default=1)
    line = "L".join(f"{px(b.predicted):.1f} {py(b.target):.1f}" for b in found)
    if len(found) > 1:
        out.append(
            Markup('<path class="line" style="stroke:var(--{});stroke-opacity:.5" d="M{}"/>').format(color, line)
        )
    for b in found:
        dot = Markup('<circle r="{:.1f}" cx="{:.1f}" cy="{:.1f}" style="fill:var(--{})"><title>{}</title></circle>')
        said = (
            f"scores {b.low:.0f} to {b.high:.0f}: n = {b.n:,}, mean score {b.predicted:.1f}, mean target {b.target:.1f}"
        )
        out.append(dot.format(1.8 + 4.2 * math.sqrt(b.n / most), px(b.predicted), py(b.target), color, said))
    return Markup("").join([*out, Markup("</svg>")])


def calibration_note(found: Sequence[Bin]) -> str:
    """Return the caption of the calibration chart."""
    off = miscalibration(found)
    return "no score" if off is None else f"off by {number(off)} points"
