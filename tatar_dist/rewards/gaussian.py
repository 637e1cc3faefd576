"""Gaussian reward: how near the score is to the mean opinion score.

    d = |p - g|,  sigma = T / sqrt(2 ln 2) * (1 + alpha * d / 100),  r = min(cap, scale * exp(-d^2 / 2 sigma^2))

(TATAR, arXiv 2603.19779, and its public code.) T is the distance, in points, at which a fixed-width bell would pay one
half; alpha widens it for far answers, so that they still feel a slope, more for IAA than for IQA. Word gates exist for
the `released` preset alone: there a word more or less flips the reward between 0 and 1, which is why ours is a
separate ramp (terms.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tatar_dist.errors import UserError


@dataclass(frozen=True)
class GaussianParams:
    threshold: float = 8.75  # T, points
    alpha_iqa: float = 0.8
    alpha_iaa: float = 2.0
    scale_iqa: float = 1.0
    scale_iaa: float = 1.0
    cap: float = 1.0
    gate_iqa_max_words: float | None = None  # words of the whole completion, tags included; above: 0
    gate_iaa_min_words: float | None = None  # below: 0

    def check(self) -> None:
        if self.threshold <= 0:
            raise UserError(f"gaussian threshold={self.threshold}: must be positive (points)")
        if min(self.alpha_iqa, self.alpha_iaa, self.scale_iqa, self.scale_iaa, self.cap) < 0:
            raise UserError("gaussian alpha, scale and cap must not be negative")


def gaussian(q: np.ndarray, g: np.ndarray, iaa: np.ndarray, words: np.ndarray, params: GaussianParams) -> np.ndarray:
    """(N,) float64 in [0, cap]; 0 where unparsed.

    Args:
        q: (N,) predicted scores in points, clamped to [0, 100]; NaN where unparsed.
        g: (N,) targets in points.
        iaa: (N,) bool, True for IAA rows.
        words: (N,) words of the whole completion, for the gates.
    """
    d = np.abs(q - g)
    sigma0 = params.threshold / math.sqrt(2.0 * math.log(2.0))
    sigma = sigma0 * (1.0 + np.where(iaa, params.alpha_iaa, params.alpha_iqa) * d / 100.0)
    r = np.minimum(params.cap, np.where(iaa, params.scale_iaa, params.scale_iqa) * np.exp(-0.5 * (d / sigma) ** 2))
    if params.gate_iqa_max_words is not None:
        r = np.where(~iaa & (words > params.gate_iqa_max_words), 0.0, r)
    if params.gate_iaa_min_words is not None:
        r = np.where(iaa & (words < params.gate_iaa_min_words), 0.0, r)
    return np.where(np.isnan(q), 0.0, r)
