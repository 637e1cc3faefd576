"""Group advantages: how much better a completion is than its siblings.

    std       A = (R - mean_G) / (std_G + eps), unbiased std (n - 1)   GRPO, the default
    mean      A = R - mean_G                                           Dr. GRPO
    per_term  A = sum_t weight_t * (r_t - mean_G) / (std_G + eps)      each term on its own scale before summing

With `scale: batch` the spread of the whole batch divides: that of R - mean_G instead of std_G (std), and that of the
sum after the terms' own (per_term, which is GDPO, arXiv 2601.05242). Groups are named by explicit ids, never by
adjacency. A group whose rewards are all equal, or of one row, gets exactly 0. Pure numpy, float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tatar_dist.errors import UserError

MODES = ("std", "mean", "per_term")
ZERO_STD = 1e-6  # spread of a group's rewards below which there is no advantage


def group_mean(x: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return (J,) means of (N,) values by (N,) int64 group ids 0..J-1; 0 for an unused id."""
    n = np.bincount(group)
    return np.bincount(group, weights=x) / np.maximum(n, 1)


def group_std(x: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return (J,) unbiased standard deviations; exactly 0 for groups of one row or equal values."""
    n = np.bincount(group)
    deviation = x - group_mean(x, group)[group]
    std = np.sqrt(np.bincount(group, weights=deviation**2) / np.maximum(n - 1, 1))
    low, high = np.full(len(n), np.inf), np.full(len(n), -np.inf)
    np.minimum.at(low, group, x)
    np.maximum.at(high, group, x)
    return np.where((n > 1) & (high > low), std, 0.0)


def contributions(
    terms: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    group: np.ndarray,
    mode: str = "std",
    eps: float = 1e-4,
    scale: str = "group",
) -> dict[str, np.ndarray]:
    """Return what each weighted term adds to the advantage, (N,) by name; they sum to it.

    Args:
        terms: (N,) values by name, NaN where a term does not apply.
        group: (N,) int64 ids 0..J-1.

    Raises:
        UserError: an unknown mode.
    """
    if mode not in MODES:
        raise UserError(f"advantage mode {mode!r}: must be one of {', '.join(MODES)}")
    total = group_std(total_reward(terms, weights, len(group)), group)
    parts: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        x = np.nan_to_num(terms[name], nan=0.0)
        std = group_std(x, group) if mode == "per_term" else total
        plain = mode == "mean" or (mode == "std" and scale == "batch")
        factor = np.where(std > 0, 1.0 / (1.0 if plain else std + eps), 0.0)
        parts[name] = weight * (x - group_mean(x, group)[group]) * factor[group]
    if scale == "batch" and len(group) > 1:
        spread = np.std(np.sum([*parts.values()], axis=0), ddof=1) + eps
        parts = {name: part / spread for name, part in parts.items()}
    return parts


def shares(parts: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, float]:
    """Return Cov(part, A) / Var(A) of each term at `rows`, A their sum; NaN where A is 0.

    The shares sum to 1. Parts are centred in each group, so `rows` must be whole groups.
    """
    total = np.sum([part[rows] for part in parts.values()], axis=0)
    variance = float(total @ total)
    return {name: float(part[rows] @ total) / variance if variance else math.nan for name, part in parts.items()}


def total_reward(terms: Mapping[str, np.ndarray], weights: Mapping[str, float], n: int) -> np.ndarray:
    """Return the (N,) weighted sum of the terms; a NaN (does not apply to the row) adds nothing."""
    total = np.zeros(n)
    for name, weight in weights.items():
        total += weight * np.nan_to_num(terms[name], nan=0.0)
    return total
