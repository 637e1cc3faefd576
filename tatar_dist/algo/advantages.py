"""Group advantages: how much better a completion is than its siblings.

    std       A = (R - mean_G) / (std_G + eps), unbiased std (n - 1)   GRPO, the default
    mean      A = R - mean_G                                           Dr. GRPO
    per_term  A = sum_t weight_t * (r_t - mean_G) / (std_G + eps)      each term on its own scale before summing

With `scale: batch` the spread of the whole batch divides: that of R - mean_G instead of std_G (std), and that of the
sum after the terms' own (per_term, which is GDPO, arXiv 2601.05242). Groups without an advantage do not count in it, so
that steps do not grow where `grpo.zero_std` drops them. `std` with `batch` keeps the ranges of the tasks' rewards: one
with a small spread then hardly trains. Groups are named by explicit ids, never by
adjacency. A group whose rewards are all equal, or of one row, gets exactly 0. Pure numpy, float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tatar_dist.errors import UserError

MODES, SCALES = ("std", "mean", "per_term"), ("group", "batch")
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
        UserError: an unknown mode or scale.
    """
    for name, value, known in (("mode", mode, MODES), ("scale", scale, SCALES)):
        if value not in known:
            raise UserError(f"advantage {name} {value!r}: must be one of {', '.join(known)}")
    total = group_std(total_reward(terms, weights, len(group)), group)
    parts: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        x = np.nan_to_num(terms[name], nan=0.0)
        std = group_std(x, group) if mode == "per_term" else total
        plain = mode == "mean" or (mode == "std" and scale == "batch")
        factor = np.where(std > 0, 1.0 / np.where(plain | (std == 0), 1.0, std + eps), 0.0)
        parts[name] = weight * (x - group_mean(x, group)[group]) * factor[group]
    if scale == "batch":
        sums = np.sum([*parts.values()], axis=0)
        live = sums[group_std(sums, group)[group] >= ZERO_STD]
        if len(live):
            parts = {name: part / (np.std(live, ddof=1) + eps) for name, part in parts.items()}
    return parts


def shares(parts: Mapping[str, np.ndarray], rows: np.ndarray, group: np.ndarray) -> dict[str, float]:
    """Return Cov(part, A) / Var(A) of each term within groups, A their sum; NaN where A is 0.

    The shares sum to 1. `rows` are looked at, each group's centred by themselves; `group`: (N,) int64 ids of all rows.
    """
    label = np.unique(group[rows], return_inverse=True)[1]
    centred = {name: part[rows] - group_mean(part[rows], label)[label] for name, part in parts.items()}
    total = np.sum([*centred.values()], axis=0)
    variance = float(total @ total)
    flat = variance < ZERO_STD**2 * max(1, len(rows))
    return {name: math.nan if flat else float(part @ total) / variance for name, part in centred.items()}


def total_reward(terms: Mapping[str, np.ndarray], weights: Mapping[str, float], n: int) -> np.ndarray:
    """Return the (N,) weighted sum of the terms; a NaN (does not apply to the row) adds nothing."""
    total = np.zeros(n)
    for name, weight in weights.items():
        total += weight * np.nan_to_num(terms[name], nan=0.0)
    return total
