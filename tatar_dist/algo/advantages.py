"""Group advantages: how much better a completion is than its siblings.

    std       A = (R - mean_G) / (std_G + eps), unbiased std (n - 1)   GRPO, the default
    mean      A = R - mean_G                                           Dr. GRPO
    per_term  A = sum_t weight_t * (r_t - mean_G) / (std_G + eps)      each term on its own scale before summing

Groups are named by explicit ids, never by adjacency. A group whose rewards are all equal, or of one row, gets exactly
0. Pure numpy, float64.
"""

from __future__ import annotations

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


def group_advantage(reward: np.ndarray, group: np.ndarray, mode: str = "std", eps: float = 1e-4) -> np.ndarray:
    """Return (N,) advantages of (N,) rewards by (N,) int64 group ids; mode: std or mean."""
    if len(reward) == 0:
        return np.zeros(0)
    std = group_std(reward, group)
    centred = np.where(std[group] > 0, reward - group_mean(reward, group)[group], 0.0)
    return centred if mode == "mean" else centred / (std[group] + eps)


def advantages(
    terms: Mapping[str, np.ndarray],
    weights: Mapping[str, float],
    group: np.ndarray,
    mode: str = "std",
    eps: float = 1e-4,
) -> np.ndarray:
    """Return (N,) advantages from (N,) reward terms, NaN where one does not apply, and weights.

    Raises:
        UserError: an unknown mode.
    """
    if mode not in MODES:
        raise UserError(f"advantage mode {mode!r}: must be one of {', '.join(MODES)}")
    if mode == "per_term":
        parts = [w * group_advantage(np.nan_to_num(terms[t], nan=0.0), group, "std", eps) for t, w in weights.items()]
        return np.sum(parts, axis=0) if parts else np.zeros(len(group))
    return group_advantage(total_reward(terms, weights, len(group)), group, mode, eps)


def total_reward(terms: Mapping[str, np.ndarray], weights: Mapping[str, float], n: int) -> np.ndarray:
    """Return the (N,) weighted sum of the terms; a NaN (does not apply to the row) adds nothing."""
    total = np.zeros(n)
    for name, weight in weights.items():
        total += weight * np.nan_to_num(terms[name], nan=0.0)
    return total
