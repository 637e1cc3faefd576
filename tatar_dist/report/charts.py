"""Inline SVG charts, pure functions: curves, bars over steps, squares of predicted scores.

Colours are CSS variables of the page (`--iqa`, `--iaa`, `--ink`, `--muted`, ...), so one chart serves light and dark
themes. All text is escaped here. A drawing over steps is 360 units wide, about its width on a phone and in the page's
columns, so text keeps its nominal size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from tatar_dist.evaluate.metrics import logistic_map, usable

WIDTH = 360
LEFT, RIGHT, TOP, BOTTOM = 42, 112, 10, 26  # margins; the right one holds the direct labels
BAR_RIGHT = 40  # right margin of a chart without direct labels
SIDE = 162  # of a square chart
MAX_POINTS = 240  # more steps than this are averaged into bins: a pixel shows no more
LABEL_GAP = 14  # units between the baselines of two direct labels
BINS = 10  # of ten points each
CURVE_POINTS = 60
MOST_DOTS = 1500  # of a scatter


@dataclass(frozen=True)
class Line:
    """One curve. x, y: (n,); color: CSS variable without --; smooth: raw curve faintly behind."""

    label: str
    x: np.ndarray
    y: np.ndarray
    color: str
    smooth: bool = True
    dashed: bool = False


@dataclass(frozen=True)
class Area:
    """Part of a drawing that shows data, in drawing units. x, y: their ranges (low, high)."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Map data to drawing units."""
        (x0, x1), (y0, y1) = self.x, self.y
        return (
            self.left + self.width * (x - x0) / ((x1 - x0) or 1.0),
            self.top + self.height * (1 - (y - y0) / ((y1 - y0) or 1.0)),
        )

    def path(self, points: Iterable[Sequence[float]]) -> str:
        """Return the SVG path through (x, y) points; a lone one is a dot by the round line cap."""
        places = ["{:.1f} {:.1f}".format(*self.at(*point)) for point in points]
        return "M" + "L".join(places) + ("h0" if len(places) == 1 else "")

    def grid(self, x_ticks: Sequence[float], y_ticks: Sequence[float], vertical: bool = False) -> Markup:
        """Draw a line and label at each y tick, a label at each x tick, with `vertical` a line too."""
        right, bottom = self.left + self.width, self.top + self.height
        step = y_ticks[1] - y_ticks[0] if len(y_ticks) > 1 else abs(y_ticks[0]) or 1.0
        parts = []
        for t in y_ticks:
            y = self.at(self.x[0], t)[1]
            parts.append(_path("grid", f"M{self.left} {y:.1f}H{right}"))
            parts.append(_text("end", self.left - 6, y + 4, _tick(t, step)))
        for t in x_ticks:
            x = self.at(t, self.y[0])[0]
            if vertical:
                parts.append(_path("grid", f"M{x:.1f} {self.top}V{bottom}"))
            parts.append(_text("mid", x, bottom + 17, _tick(t, 1)))
        return Markup("").join(parts)


SQUARE = Area(30, 8, SIDE, SIDE, (0.0, 100.0), (0.0, 100.0))


def _path(kind: str, d: str, style: str = "") -> Markup:
    return Markup('<path class="{}" style="{}" d="{}"/>').format(kind, style, d)


def _text(kind: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, text)


def _svg(width: float, height: float, label: str, parts: Iterable[Markup]) -> Markup:
    start = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, label)
    return start + Markup("").join(parts) + Markup("</svg>")


def smoothed(y: np.ndarray) -> np.ndarray:
    """Average (n,) values exponentially, span max(3, n / 10) steps, without start-up bias."""
    from scipy.signal import lfilter

    alpha = 2.0 / (max(3.0, len(y) / 10) + 1.0)
    total, weight = (lfilter([alpha], [1.0, alpha - 1.0], values) for values in (y, np.ones(len(y))))
    return total / weight


def nice_ticks(lo: float, hi: float, count: int = 4) -> list[float]:
    """Return about `count` round values from lo to hi; steps are 1, 2, 2.5 or 5 times 10^k."""
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
    elif 0 < size < 0.01:
        text = f"{value:.0e}".replace("e-0", "e-")
    else:
        text = f"{value:.{0 if size >= 100 or value == 0 else 1 if size >= 10 else 2}f}"
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
    """Average consecutive steps of a curve to at most `most` points. x: (n,); y: (n,) or (k, n)."""
    if len(x) <= most:
        return x, y
    edges = np.linspace(0, len(x), most + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, len(x)))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges, axis=-1) / counts


def _spread(wanted: list[float], lo: float, hi: float) -> list[float]:
    """Place labels in order LABEL_GAP or more apart, near `wanted`, and in [lo, hi] if they fit."""
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


def _over_steps(x: tuple[float, float], y: tuple[float, float], height: int, right: float) -> tuple[Area, Markup]:
    """Return the area of a chart over steps with its grid and labels."""
    area = Area(LEFT, TOP, WIDTH - LEFT - right, height - TOP - BOTTOM, x, y)
    steps = [t for t in nice_ticks(*x, 4) if t == int(t)]
    grid = area.grid(steps, nice_ticks(*y, 4 if height > 140 else 2))
    return area, grid + _text("", WIDTH - right + 8, height - 9, "step")


def line_chart(
    lines: Sequence[Line], title: str, *, y_range: tuple[float, float] | None = None, height: int = 210
) -> Markup:
    """Draw curves over steps, each labelled at its end with its last (smoothed) value.

    y_range: minimum range of the axis, by default that of the data. Returns empty Markup if no curve has a point.
    """
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return Markup("")
    xs, ys = np.concatenate([line.x for line in lines]), np.concatenate([line.y for line in lines])
    within = [*(y_range or ()), float(ys.min()), float(ys.max())]
    lo, hi = min(within), max(within)
    if hi == lo:
        lo, hi = lo - (abs(lo) or 1.0) * 0.1, hi + (abs(hi) or 1.0) * 0.1
    area, grid = _over_steps((float(xs.min()), float(xs.max())), (lo, hi), height, RIGHT)
    parts, ends = [grid], []
    for line in lines:
        soft = smoothed(line.y) if line.smooth else line.y
        x, (raw, curve) = binned(line.x, np.stack([line.y, soft]))
        stroke = f"stroke:var(--{line.color})"
        if line.smooth and len(x) > 1:
            parts.append(_path("raw", area.path(zip(x, raw, strict=True)), stroke))
        kind = "line dashed" if line.dashed else "line"
        parts.append(_path(kind, area.path(zip(x, curve, strict=True)), stroke))
        ends.append((line, float(soft[-1]), area.at(line.x[-1], soft[-1])))
    places = _spread([y for _, _, (_, y) in ends], TOP + 4, height - BOTTOM - 4)
    for (line, value, (x, y)), place in zip(ends, places, strict=True):
        fill = f"fill:var(--{line.color})"
        parts.append(Markup('<circle r="2.6" cx="{:.1f}" cy="{:.1f}" style="{}"/>').format(x, y, fill))
        text = Markup('<text class="name" x="{}" y="{:.1f}" style="{}">{} <tspan class="val">{}</tspan></text>')
        parts.append(text.format(WIDTH - RIGHT + 8, place + 4, fill, line.label, number(value)))
    return _svg(WIDTH, height, title, parts)


def stacked_bars(x: np.ndarray, heights: Sequence[tuple[np.ndarray, str]], title: str, height: int = 210) -> Markup:
    """Draw a stacked bar per step, from below. x: (n,); heights: ((n,) >= 0, CSS variable)."""
    if not len(x) or not heights:
        return Markup("")
    x, values = binned(x, np.stack([v for v, _ in heights]), 90)
    tops = np.cumsum(values, axis=0)
    y_range = (0.0, float(tops[-1].max()) or 1.0)
    area, grid = _over_steps((float(x[0]) - 0.5, float(x[-1]) + 0.5), y_range, height, BAR_RIGHT)
    width = max(1.0, 0.8 * area.width / len(x))
    parts = [grid]
    for (_, color), of_part, top_of in zip(heights, values, tops, strict=True):
        bars = []
        for step, value, top in zip(x, of_part, top_of, strict=True):
            (middle, upper), (_, lower) = area.at(step, top), area.at(step, top - value)
            if lower - upper > 0.05:
                bars.append(f"M{middle - width / 2:.1f} {lower:.1f}V{upper:.1f}h{width:.1f}V{lower:.1f}z")
        parts.append(_path("bar", "".join(bars), f"fill:var(--{color})"))
    return _svg(WIDTH, height, title, parts)


@dataclass(frozen=True)
class Bin:
    """Calibration bin of answers of `low` to `high` points: count, mean prediction and target."""

    low: float
    high: float
    n: int
    predicted: float
    target: float


def bins(target: np.ndarray, prediction: np.ndarray) -> list[Bin]:
    """Return the non-empty bins of the predictions.
    target, prediction: (n,) in points. Unparsed predictions (NaN) are dropped, the others clamped to 0-100."""
    t, p = usable(target, prediction)
    edges = np.linspace(0, 100, BINS + 1)
    index = np.digitize(p, edges[1:-1])
    parts = [(k, index == k) for k in np.unique(index)]
    return [Bin(edges[k], edges[k + 1], int(i.sum()), float(p[i].mean()), float(t[i].mean())) for k, i in parts]


def miscalibration(of: Sequence[Bin]) -> float:
    """Average |prediction - target| of the bins, in points, weighted by n."""
    return sum(b.n * abs(b.predicted - b.target) for b in of) / sum(b.n for b in of)


def _square(title: str, parts: Sequence[Markup]) -> Markup:
    """Draw parts in SQUARE over its grid and diagonal."""
    grid = SQUARE.grid((0, 50, 100), (0, 50, 100), vertical=True)
    return _svg(206, 192, title, [grid, _path("diagonal", SQUARE.path([(0, 0), (100, 100)])), *parts])


def scatter(target: np.ndarray, prediction: np.ndarray, color: str, title: str) -> Markup:
    """Plot predictions over targets on 0-100, with the diagonal and the fitted logistic, if any.
    The logistic has four parameters and maps predictions to targets. More than MOST_DOTS points are thinned evenly."""
    points = np.clip(np.stack([target, prediction], axis=1), 0.0, 100.0)
    shown = points[:: max(1, math.ceil(len(points) / MOST_DOTS))]
    style = f"stroke:var(--{color});stroke-opacity:{0.35 if len(shown) > 150 else 0.6}"
    parts = [_path("dots", "".join(SQUARE.path([point]) for point in shown), style)]
    curve = logistic_map(*usable(target, prediction))
    if curve is not None:
        p = np.linspace(points[:, 1].min(), points[:, 1].max(), CURVE_POINTS)
        parts.append(_path("fit", SQUARE.path(np.clip(np.stack([curve(p), p], axis=1), 0.0, 100.0))))
    return _square(title, parts)


def calibration(bars: Sequence[Bin], color: str, title: str) -> Markup:
    """Plot mean target (y) over mean prediction (x) per bin; dot area and tooltip show n."""
    most = max(b.n for b in bars)
    line = SQUARE.path(np.clip([(b.predicted, b.target) for b in bars], 0.0, 100.0))
    parts = [_path("line", line, f"stroke:var(--{color});stroke-opacity:.5")]
    dot = Markup('<circle r="{:.1f}" cx="{:.1f}" cy="{:.1f}" style="fill:var(--{})"><title>{}</title></circle>')
    for b in bars:
        means = f"mean score {b.predicted:.1f}, mean target {b.target:.1f}"
        note = f"scores {b.low:.0f} to {b.high:.0f}: n = {b.n:,}, {means}"
        x, y = SQUARE.at(b.predicted, min(max(b.target, 0.0), 100.0))
        parts.append(dot.format(1.8 + 4.2 * math.sqrt(b.n / most), x, y, color, note))
    return _square(title, parts)
