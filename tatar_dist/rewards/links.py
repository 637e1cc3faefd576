"""Links between a gap and a probability, and binary cross-entropy, for both ranking terms.

    logistic  L(z) = 1 / (1 + exp(-z))          probit  L(z) = Phi(z), the standard normal distribution function

Everything is computed from the smaller tail, so nothing overflows and no 1 - Q loses its digits.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Link = Literal["logistic", "probit"]


def tails(z: np.ndarray, link: str) -> np.ndarray:
    """Return L(-|z|), the smaller of Q, 1 - Q, at full relative precision: z's shape, float64."""
    if link == "logistic":
        e = np.exp(-np.abs(z))
        return e / (1.0 + e)
    from scipy.special import ndtr

    return ndtr(-np.abs(z))


def probabilities(z: np.ndarray, link: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (L(z), 1 - L(z)), each precise in its own small tail."""
    small = tails(z, link)
    large = 1.0 - small
    return np.where(z >= 0, large, small), np.where(z >= 0, small, large)


def clamp_limit(eps: float, link: str) -> float:
    """Return the |z| at which L(z) = 1 - eps: clamping z there clamps Q to [eps, 1 - eps]."""
    if link == "logistic":
        return math.log1p(-eps) - math.log(eps)
    from scipy.special import ndtri

    return float(-ndtri(eps))


def cross_entropy(p: np.ndarray, z: np.ndarray, link: str) -> np.ndarray:
    """Return BCE(P, L(z)) = -P log L(z) - (1 - P) log L(-z) in nats; z is already clamped.

    p broadcasts against z. Logistic: softplus(z) - P z, softplus(z) = max(z, 0) + log(1 + exp(-|z|)); one exp, one log.
    """
    if link == "logistic":
        a = np.abs(z)  # in place from here on: this is the inner loop of ranking
        np.negative(a, out=a)
        np.exp(a, out=a)
        np.add(a, 1.0, out=a)
        np.log(a, out=a)
        a += np.maximum(z, 0.0)
        a -= p * z
        return a
    small = tails(z, link)
    side = np.where(z >= 0, p, 1.0 - p)  # the weight of the larger of Q and 1 - Q
    return -(side * np.log1p(-small) + (1.0 - side) * np.log(small))


def fidelity(p: np.ndarray, not_p: np.ndarray, z: np.ndarray, link: str) -> np.ndarray:
    """Return sqrt(P Q) + sqrt((1 - P)(1 - Q)), Q = L(z) (as VisualQuality-R1); 1 iff Q = P."""
    q, not_q = probabilities(z, link)
    return np.sqrt(p * q) + np.sqrt(not_p * not_q)
