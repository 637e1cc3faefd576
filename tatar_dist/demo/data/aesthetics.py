"""Aesthetic (IAA) half of the demo: attributes of a crop, and the score, their weighted sum.

Takes the final uint8 pixels and the subject's box; returns attributes in [0, 1] and a score on 0-100. There are no
human ratings: attributes formalise a photographer's rules of thumb, and the score stands in for a mean opinion score,
with known truth. Weights favour what is visible at a glance. Formulas are our own unless `measure` cites a source.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from tatar_dist.demo.data.photos import LUMA, Box, Scene, grade, soften

# Weights of the attributes in the score; they sum to 1.
WEIGHTS: dict[str, float] = {
    "exposure": 0.22,
    "contrast": 0.18,
    "colour": 0.20,
    "sharpness": 0.20,
    "harmony": 0.05,
    "placement": 0.06,
    "separation": 0.05,
    "simplicity": 0.04,
}

POWER_POINTS = tuple((x, y) for x in (1 / 3, 2 / 3) for y in (1 / 3, 2 / 3))  # of the rule of thirds


def _ramp(value: float, low: float, high: float) -> float:
    """Compute a smoothstep from 0 at `low` to 1 at `high`."""
    t = min(max((value - low) / (high - low), 0.0), 1.0)
    return t * t * (3 - 2 * t)


def measure(pixels: np.ndarray, box: Box | None) -> dict[str, float]:
    """Measure attributes in [0, 1] of a (112, 112, 3) uint8 crop; `box`: subject in fractions.

    exposure: exp(-((m - 0.46) / 0.17)²) of mean luma m in [0, 1], times 1 - share of pixels clipped at either end.
    contrast: luma's 5-95 % range, ramp 0.15..0.8.
    colour: colourfulness M = sd_rgyb + 0.3 mean_rgyb (Hasler, Suesstrunk, SPIE 2003), ramp 5..85.
    sharpness: energy of detail finer than 1 pixel over that of 1-2 pixels: a ratio, so contrast cancels; ramp in log.
    harmony: chroma-weighted concentration of doubled hue angles: 1 for one hue or a complementary pair (the I template
      of Cohen-Or et al., SIGGRAPH 2006).
    placement: subject's centre near a power point of the thirds, and its area near a fifth to half of the frame.
    separation: colour distance of the subject's inside and its surround. simplicity: 1 - ramp of edge pixels' share.
    warmth (no weight, mood only): mean red - blue, ramp -60..60. brightness (no weight): mean luma.
    """
    x = pixels.astype(np.float32)
    luma = x @ LUMA
    mean = float(luma.mean()) / 255
    clipped = float(np.mean((luma < 6) | (luma > 249)))
    low, high = np.percentile(luma, (5, 95))
    rg, yb = x[..., 0] - x[..., 1], (x[..., 0] + x[..., 1]) / 2 - x[..., 2]
    colourfulness = float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))
    g1, g2 = (ndimage.gaussian_filter(luma, s, mode="nearest", truncate=3.0) for s in (1.0, 2.0))
    fine, coarse = float(np.mean((luma - g1) ** 2)), float(np.mean((g1 - g2) ** 2))
    sharp = 0.5 * np.log((fine + 0.3) / (coarse + 1.0))
    chroma2 = rg * rg + yb * yb + 1e-3
    cos2, sin2 = (rg * rg - yb * yb), 2 * rg * yb
    concentration = float(np.hypot(cos2.sum(), sin2.sum()) / chroma2.sum())
    gy, gx = np.gradient(g1)
    edges = float(np.mean(gx * gx + gy * gy > 64.0))
    placement, separation = 0.15, 0.15  # a frame without its subject
    if box is not None:
        x0, y0, x1, y1 = box
        cx, cy, area = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) * (y1 - y0)
        near = min(float(np.hypot(cx - px, cy - py)) for px, py in POWER_POINTS)
        size = float(np.exp(-((np.log(area / 0.3) / 1.0) ** 2)))
        placement = 0.6 * float(np.exp(-((near / 0.17) ** 2))) + 0.4 * size
        separation = _separation(x, box)
    return {
        "exposure": float(np.exp(-(((mean - 0.46) / 0.17) ** 2))) * (1 - clipped),
        "contrast": _ramp(float(high - low) / 255, 0.15, 0.8),
        "colour": _ramp(colourfulness, 5, 85),
        "sharpness": _ramp(float(sharp), -1.1, 0.3),
        "harmony": _ramp(concentration, 0.4, 1.0),
        "placement": placement,
        "separation": separation,
        "simplicity": 1 - _ramp(edges, 0.02, 0.5),
        "warmth": _ramp(float((x[..., 0] - x[..., 2]).mean()), -60, 60),
        "brightness": mean,
    }


def _separation(x: np.ndarray, box: Box) -> float:
    h, w = x.shape[:2]
    x0, y0 = int(box[0] * w), int(box[1] * h)
    x1, y1 = max(x0 + 1, round(box[2] * w)), max(y0 + 1, round(box[3] * h))
    inside = x[y0:y1, x0:x1].reshape(-1, 3)
    n_out = h * w - len(inside)
    if n_out < 0.05 * h * w:
        return 0.3  # the subject fills the frame: nothing to stand out from
    total = x.reshape(-1, 3).sum(0)
    surround = (total - inside.sum(0)) / n_out
    return _ramp(float(np.linalg.norm(inside.mean(0) - surround)), 5, 110)


def vary(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Apply a strong, random photographic treatment; returns (112, 112, 3) float32 on 0-255."""
    pixels = scene.pixels
    if rng.random() < 0.6:
        pixels = soften(pixels, 0.4 + 1.8 * rng.random() ** 1.5)
    stops = rng.normal(0, 1.1) if rng.random() < 0.75 else rng.normal(0, 0.25)
    contrast = float(np.exp(rng.normal(-0.1, 0.45)))
    saturation = float(np.clip(rng.normal(1.0, 0.65), 0, 2.6))
    tint = (float(rng.normal(0, 0.10)), float(rng.normal(0, 0.03)))
    vignette = rng.uniform(0, 0.9) if rng.random() < 0.25 else 0.0
    return grade(pixels, float(stops), contrast, saturation, tint, float(vignette))


# Quantiles 0, .02, .1, .2 ... .9, .98, 1 of the weighted sum over 1,500 train-split crops (ends rounded outward).
KNOTS_RAW = (0.10, 0.248, 0.352, 0.413, 0.463, 0.508, 0.548, 0.588, 0.634, 0.685, 0.762, 0.849, 0.95)
KNOTS_SCORE = (0.0, 5.0, 12.5, 22.0, 31.5, 41.0, 50.0, 59.0, 68.5, 78.0, 87.5, 95.0, 100.0)


def aesthetic_score(raw: float) -> float:
    """Map the weighted sum to 0-100 by linear interpolation between fixed knots."""
    return float(np.interp(raw, KNOTS_RAW, KNOTS_SCORE))
