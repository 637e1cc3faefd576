"""Inline SVG charts over steps, lines with direct labels and stacked bars, as pure functions that return Markup.

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

WIDTH = 360
Point = Callable[[float, float], tuple[float, float]]  # data -> drawing units
LEFT, RIGHT, TOP, BOTTOM = 42, 112, 10, 26  # margins; the right one holds the direct labels
MAX_POINTS = 240  # more steps than this are averaged into bins: a pixel shows no more
LABEL_GAP = 14  # units between the baselines of two direct labels


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
    places = _spread([y for _, _, (_, y) in ends], TOP + 4, height - BOTTOM)
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
