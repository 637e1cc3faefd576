"""Inline SVG charts as pure functions that return Markup: curves and bars over steps, squares of predicted scores.

Colours are CSS variables of the page (`--iqa`, `--iaa`, `--ink`, `--muted`, ...), so one chart serves light and dark
themes. All text is escaped here. A drawing is 360 units wide, about its width on a phone and in the page's columns, so
text keeps its nominal size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from tatar_dist.evaluate.metrics import MIN_FIT, logistic_map, usable

WIDTH = 360
Point = Callable[[float, float], tuple[float, float]]  # data -> drawing units
LEFT, RIGHT, TOP, BOTTOM = 42, 112, 10, 26  # margins; the right one holds the direct labels
MAX_POINTS = 240  # more steps than this are averaged into bins: a pixel shows no more
LABEL_GAP = 14  # units between the baselines of two direct labels
SQUARE_LEFT, SQUARE_TOP, SIDE, SQUARE_RIGHT, SQUARE_BOTTOM = 30, 8, 162, 14, 22
BINS = 10  # of ten points each
CURVE_POINTS = 60
Scale = Callable[[float], float]  # points on 0-100 -> drawing units


@dataclass(frozen=True)
class Line:
    """One curve. x, y: (n,); color: CSS variable without dashes; `smooth`: draw the raw curve faintly behind."""

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    color: str
    smooth: bool = True
    dashed: bool = False


def smoothed(y: np.ndarray) -> np.ndarray:
    """Exponential moving average of (n,) values without start-up bias, with a span of max(3, n / 10) steps."""
    alpha = 2.0 / (max(3.0, len(y) / 10) + 1.0)
    out, total, weight = np.empty(len(y)), 0.0, 0.0
    for i, value in enumerate(y):
        total, weight = (1 - alpha) * total + alpha * value, (1 - alpha) * weight + alpha
        out[i] = total / weight
    return out


def nice_ticks(lo: float, hi: float, count: int = 4) -> list[float]:
    """Return about `count` round values from lo to hi, in steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not hi > lo:
        return [lo]
    raw = (hi - lo) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """Format with about three significant digits, as short as possible, and a true minus sign."""
    size = abs(value)
    if size >= 10_000:
        text = f"{value / 1000:.0f}k"
    elif size >= 100 or value == 0:
        text = f"{value:.0f}"
    elif size >= 10:
        text = f"{value:.1f}"
    elif size >= 0.01:
        text = f"{value:.2f}"
    else:
        text = f"{value:.0e}".replace("e-0", "e-")
    return text.replace("-", "\N{MINUS SIGN}")


def percent(share: float) -> str:
    """Format a share with one decimal; 100% without."""
    return f"{share:.1%}" if share < 1 else "100%"


def _tick(value: float, step: float) -> str:
    if step < 1e-3:  # more decimals than the margin has room for
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("-", "\N{MINUS SIGN}") if value else "0"
    digits = next((d for d in range(6) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 6)
    return (f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.{digits}f}").replace("-", "\N{MINUS SIGN}")


def binned(x: np.ndarray, y: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve to at most `most` points, the means of consecutive steps. x: (n,); y: (n,) or (k, n)."""
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(x), most + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges, axis=-1) / counts


def _spread(wanted: list[float], lo: float, hi: float) -> list[float]:
    """Place labels in order at least LABEL_GAP apart, near the wanted positions and in [lo, hi] if they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    at = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        low = at[order[rank - 1]] + LABEL_GAP if rank else lo
        at[i] = max(wanted[i], low)
    limit = hi
    for i in reversed(order):
        at[i] = min(at[i], limit)
        limit = at[i] - LABEL_GAP
    return at


def open_svg(width: float, height: float, label: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, label)


def _axes(x0: float, x1: float, y0: float, y1: float, height: int, x_label: str, right: float) -> tuple[Markup, Point]:
    """Draw grid and tick labels; return them with the mapping from (x, y) to drawing units."""
    w, h = WIDTH - LEFT - right, height - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + w * (x - x0) / ((x1 - x0) or 1.0), TOP + h * (1 - (y - y0) / ((y1 - y0) or 1.0))

    parts = []
    ticks = nice_ticks(y0, y1, 4 if h > 100 else 2)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) or 1.0
    for t in ticks:
        y = at(x0, t)[1]
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, y, WIDTH - right))
        parts.append(Markup('<text class="end" x="{}" y="{:.1f}">{}</text>').format(LEFT - 6, y + 4, _tick(t, step)))
    for t in nice_ticks(x0, x1, 4):
        if t == int(t):
            x = at(t, y0)[0]
            parts.append(Markup('<text class="mid" x="{:.1f}" y="{}">{}</text>').format(x, height - 9, _tick(t, 1)))
    parts.append(Markup('<text x="{}" y="{}">{}</text>').format(WIDTH - right + 8, height - 9, x_label))
    return Markup("").join(parts), at


def line_chart(
    lines: Sequence[Line],
    title: str,
    *,
    y_range: tuple[float, float] | None = None,
    height: int = 210,
    x_label: str = "step",
) -> Markup:
    """Draw curves over steps, each labelled at its end with its last (smoothed) value.

    y_range: minimum range of the axis, by default that of the data. Returns empty Markup if no curve has a point.
    """
    drawn = []
    for line in lines:
        x, y = np.asarray(line.x, np.float64), np.asarray(line.y, np.float64)
        ok = np.isfinite(x) & np.isfinite(y)
        if ok.any():
            drawn.append((line, x[ok], y[ok]))
    if not drawn:
        return Markup("")
    every_y = np.concatenate([y for _, _, y in drawn])
    lo, hi = y_range or (float(every_y.min()), float(every_y.max()))
    lo, hi = min(lo, float(every_y.min())), max(hi, float(every_y.max()))
    if hi == lo:
        lo, hi = lo - (abs(lo) or 1.0) * 0.1, hi + (abs(hi) or 1.0) * 0.1
    xs = np.concatenate([x for _, x, _ in drawn])
    axes, at = _axes(float(xs.min()), float(xs.max()), lo, hi, height, x_label, RIGHT)
    parts, ends = [open_svg(WIDTH, height, title), axes], []
    for line, x, y in drawn:
        soft = smoothed(y) if line.smooth else y
        bx, by = binned(x, np.stack([y, soft]))
        stroke = Markup("stroke:var(--{})").format(line.color)
        if line.smooth and len(bx) > 1:
            parts.append(Markup('<path class="raw" style="{}" d="{}"/>').format(stroke, _path(bx, by[0], at)))
        kind = "line dashed" if line.dashed else "line"
        parts.append(Markup('<path class="{}" style="{}" d="{}"/>').format(kind, stroke, _path(bx, by[1], at)))
        ends.append((line, float(soft[-1]), at(x[-1], soft[-1])))
    places = _spread([y for _, _, (_, y) in ends], TOP + 4, height - BOTTOM - 4)
    for (line, value, (x, y)), place in zip(ends, places, strict=True):
        fill = Markup("fill:var(--{})").format(line.color)
        parts.append(Markup('<circle r="2.6" cx="{:.1f}" cy="{:.1f}" style="{}"/>').format(x, y, fill))
        text = Markup('<text class="name" x="{}" y="{:.1f}" style="{}">{} <tspan class="val">{}</tspan></text>')
        parts.append(text.format(WIDTH - RIGHT + 8, place + 4, fill, line.label, number(value)))
    return Markup("").join([*parts, Markup("</svg>")])


def _path(x: np.ndarray, y: np.ndarray, at: Point) -> Markup:
    if len(x) == 1:  # a lone point: a dot drawn by the round line cap
        return Markup("M{:.1f} {:.1f}h0").format(*at(x[0], y[0]))
    return Markup("M" + "L".join("{:.1f} {:.1f}".format(*at(a, b)) for a, b in zip(x, y, strict=True)))


def stacked_bars(x: np.ndarray, parts: Sequence[tuple[np.ndarray, str]], title: str, height: int = 210) -> Markup:
    """Draw one stacked bar per step, from below. x: (n,); parts: ((n,) heights >= 0, CSS variable)."""
    if not len(x) or not parts:
        return Markup("")
    x, values = binned(np.asarray(x, np.float64), np.stack([np.asarray(v, np.float64) for v, _ in parts]), 90)
    top = np.cumsum(values, axis=0)
    axes, at = _axes(float(x[0]) - 0.5, float(x[-1]) + 0.5, 0.0, float(top[-1].max()) or 1.0, height, "step", 40)
    width = max(1.0, 0.8 * (WIDTH - LEFT - 40) / len(x))
    out = [open_svg(WIDTH, height, title), axes]
    for k, (_, color) in enumerate(parts):
        bars = []
        for i, at_x in enumerate(x):
            left, upper = at(at_x, top[k, i])
            _, lower = at(at_x, top[k, i] - values[k, i])
            if lower - upper > 0.05:
                bars.append(f"M{left - width / 2:.1f} {lower:.1f}V{upper:.1f}h{width:.1f}V{lower:.1f}z")
        out.append(Markup('<path style="fill:var(--{})" d="{}"/>').format(color, "".join(bars)))
    return Markup("").join([*out, Markup("</svg>")])


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
        inside, width = of == k, 100 / BINS
        mean_p, mean_t = float(p[inside].mean()), float(t[inside].mean())
        found.append(Bin(k * width, (k + 1) * width, int(inside.sum()), mean_p, mean_t))
    return found


def miscalibration(found: Sequence[Bin]) -> float | None:
    """Mean absolute difference of prediction and target over bins in points, weighted by n; None without bins."""
    n = sum(b.n for b in found)
    return sum(b.n * abs(b.predicted - b.target) for b in found) / n if n else None


def _frame(title: str) -> tuple[list[Markup], Scale, Scale]:
    """Draw grid, tick labels and diagonal of a 0-100 square; return them with the x and y scales."""

    def px(value: float) -> float:
        return SQUARE_LEFT + SIDE * min(max(value, 0.0), 100.0) / 100

    def py(value: float) -> float:
        return SQUARE_TOP + SIDE * (1 - min(max(value, 0.0), 100.0) / 100)

    out = [open_svg(SQUARE_LEFT + SIDE + SQUARE_RIGHT, SQUARE_TOP + SIDE + SQUARE_BOTTOM, title)]
    for t in (0, 50, 100):
        grid = Markup('<path class="grid" d="M{:.1f} {:.1f}H{:.1f}M{:.1f} {:.1f}V{:.1f}"/>')
        out.append(grid.format(SQUARE_LEFT, py(t), px(100), px(t), py(0), py(100)))
        out.append(Markup('<text class="end" x="{}" y="{:.1f}">{}</text>').format(SQUARE_LEFT - 5, py(t) + 4, t))
        out.append(Markup('<text class="mid" x="{:.1f}" y="{:.1f}">{}</text>').format(px(t), py(0) + 15, t))
    out.append(Markup('<path class="diagonal" d="M{} {:.1f}L{} {:.1f}"/>').format(SQUARE_LEFT, py(0), px(100), py(100)))
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
