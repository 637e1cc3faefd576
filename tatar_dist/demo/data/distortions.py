"""Technical distortions and the full-reference target of the demo's quality (IQA) half.

Nine families of KADID-10k (Lin, Hosu, Saupe, QoMEX 2019), each with a continuous strength in [0, 1]. The target is a
full-reference index q in [0, 1] between the distorted and the clean crop, mapped to 0-100 by a fixed monotone table.
These crops have no human ratings: the target replaces a mean opinion score by a known truth.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from tatar_dist.demo.data.photos import LUMA, SIZE, soften


@dataclass(frozen=True)
class Distortion:
    family: str
    strength: float  # [0, 1]


def _motion_blur(x: np.ndarray, s: float, rng: np.random.Generator) -> np.ndarray:
    """Apply a line kernel of continuous length along one of four directions."""
    dy, dx = ((0, 1), (1, 0), (1, 1), (1, -1))[int(rng.integers(4))]
    half = (1.0 + 13.0 * s**1.3) / (2 if dy * dx == 0 else 2 * 2**0.5)  # diagonal pixels lie further apart
    reach = int(np.ceil(half))
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    out, total = np.zeros_like(x), 0.0
    for j in range(-reach, reach + 1):
        weight = float(np.clip(half + 0.5 - abs(j), 0, 1))  # share of pixel j that the line covers
        if weight > 0:
            top, left = reach + j * dy, reach + j * dx
            out += np.float32(weight) * padded[top : top + SIZE, left : left + SIZE]
            total += weight
    return out / np.float32(total)


def _jpeg(x: np.ndarray, s: float, rng: np.random.Generator) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(x)).save(buffer, "JPEG", quality=max(2, round(2 + 88 * (1 - s) ** 2.2)))
    return np.asarray(Image.open(buffer), dtype=np.float32)


def _pixelation(x: np.ndarray, s: float, rng: np.random.Generator) -> np.ndarray:
    side = max(10, round(SIZE / (1 + 6 * s**1.5)))
    small = Image.fromarray(to_uint8(x)).resize((side, side), Image.Resampling.BOX)
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.NEAREST), dtype=np.float32)


Apply = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]  # float32 pixels on 0-255, strength in [0, 1]
# In the order a camera and its software would apply them; two distortions are applied in this order.
FAMILIES: dict[str, Apply] = {
    "over_exposure": lambda x, s, rng: x * np.float32(1 + 1.1 * s) + np.float32(95 * s),
    "under_exposure": lambda x, s, rng: x * np.float32(1 - 0.9 * s),
    "low_contrast": lambda x, s, rng: np.float32(128) + np.float32(1 - 0.93 * s) * (x - np.float32(128)),
    "gaussian_blur": lambda x, s, rng: soften(x, 0.25 + 2.5 * s**1.3),
    "motion_blur": _motion_blur,
    "noise": lambda x, s, rng: x + np.float32(1.0 + 75.0 * s**1.3) * rng.standard_normal(x.shape, dtype=np.float32),
    "pixelation": _pixelation,
    "banding": lambda x, s, rng: np.round(x / np.float32(4 + 140 * s)) * np.float32(4 + 140 * s),
    "jpeg": _jpeg,
}
_ORDER = list(FAMILIES)
# Families of one kind, which are not drawn together.
_KINDS = (
    {"over_exposure", "under_exposure", "low_contrast"},
    {"gaussian_blur", "motion_blur"},
    {"pixelation", "jpeg"},
)


def to_uint8(x: np.ndarray) -> np.ndarray:
    return np.clip(x + np.float32(0.5), 0, 255).astype(np.uint8)


def draw_distortions(rng: np.random.Generator) -> tuple[Distortion, ...]:
    """Draw one distortion (10 % almost invisible); in 20 % of cases add one of another kind."""
    first = _ORDER[int(rng.integers(len(_ORDER)))]
    kind = rng.random()
    strength = rng.uniform(0, 0.08) if kind < 0.1 else rng.random()
    drawn = [Distortion(first, float(strength))]
    if kind > 0.8:
        others = [f for f in _ORDER if f != first and not any({f, first} <= kind for kind in _KINDS)]
        drawn.append(Distortion(others[int(rng.integers(len(others)))], float(rng.uniform(0.15, 0.8))))
    return tuple(sorted(drawn, key=lambda d: _ORDER.index(d.family)))


def distort(clean: np.ndarray, distortions: tuple[Distortion, ...], rng: np.random.Generator) -> np.ndarray:
    """Apply distortions in the given order: (112, 112, 3) float32 on 0-255 -> uint8."""
    x = clean
    for d in distortions:
        x = np.clip(FAMILIES[d.family](x, d.strength, rng), 0, 255)
    return to_uint8(x)


def _window(v: np.ndarray, size: int) -> np.ndarray:
    return ndimage.uniform_filter(v, size, mode="nearest")


def _detail(r: np.ndarray, d: np.ndarray) -> tuple[float, float]:
    """Return (kept share of the reference's local detail energy, RMS of unexplained detail)."""
    rh, dh = r - _window(r, 7), d - _window(d, 7)
    energy = rh * rh
    gain = np.clip((_window(rh * dh, 7) + 2.0) / (np.maximum(_window(energy, 7), 0) + 2.0), 0.0, 1.0)
    added = dh - gain * rh
    kept = (float((gain * energy).sum()) + 1.0) / (float(energy.sum()) + 1.0)
    return kept, float(np.sqrt(np.mean(added * added)))


def full_reference(clean: np.ndarray, distorted: np.ndarray) -> float:
    """Return the luma quality index in [0, 1], 1 = identical, of (112, 112, 3) images on 0-255.

    q = detail * addition * luminance, each in [0, 1]. Detail and addition separate lost from added detail, as Li,
    Zhang, Ma, Ngan ("Image quality assessment by separately evaluating detail losses and additive impairments", TMM
    2011) do with wavelets; here in 7x7 windows: high-passed d = g r + a with gain g = clip((cov(r, d) + 2)/(var(r) +
    2), 0, 1); detail = sum(g r²)/sum(r²) and addition = K/(K + rms(a)), K = 14 grey levels, both averaged over full and
    half resolution. Luminance is SSIM's l term (Wang, Bovik, Sheikh, Simoncelli, TIP 2004, eq. 6) on 11x11 means,
    averaged. Relative loss and absolute addition make q depend little on content, so that the distorted crop alone is
    enough to judge it.
    """
    r, d = clean.astype(np.float32) @ LUMA, distorted.astype(np.float32) @ LUMA
    half = [v.reshape(SIZE // 2, 2, SIZE // 2, 2).mean((1, 3)) for v in (r, d)]
    (kept1, added1), (kept2, added2) = _detail(r, d), _detail(half[0], half[1])
    detail, addition = (kept1 + kept2) / 2, 14.0 / (14.0 + (added1 + added2) / 2)
    mr, md = _window(r, 11), _window(d, 11)
    luminance = float(np.mean((2 * mr * md + 200.0) / (mr * mr + md * md + 200.0)))
    return float(np.clip(detail * addition * luminance, 0.0, 1.0))


# Set once, near the quantiles 0, .02, .1, .2 ... .9, .98, 1 of q over 1,500 train-split crops; and their scores.
KNOTS_Q = (0.0, 0.078, 0.154, 0.241, 0.300, 0.375, 0.456, 0.549, 0.650, 0.780, 0.900, 0.967, 1.0)
KNOTS_SCORE = (0.0, 5.0, 12.5, 22.0, 31.5, 41.0, 50.0, 59.0, 68.5, 78.0, 87.5, 95.0, 100.0)


def quality_score(q: float) -> float:
    """Map the index to 0-100 by linear interpolation between fixed knots."""
    return float(np.interp(q, KNOTS_Q, KNOTS_SCORE))
