"""Kendall's tau-b within groups: do a group's rewards order its completions as another measure does? Pure numpy."""

from __future__ import annotations

import numpy as np

LARGE = 64  # rows; all pairs of a larger group would take too much memory


def group_kendall(x: np.ndarray, y: np.ndarray, group: np.ndarray) -> np.ndarray:
    """tau-b (Kendall 1945) of x and y within each group that occurs, in the order of its id; NaN where undefined.

    tau_b = (concordant - discordant) / sqrt((pairs - ties in x)(pairs - ties in y)); undefined when either is constant.
    Groups of G rows are computed together from their G (G - 1) / 2 pairs; those over LARGE rows by scipy.

    Args:
        x, y: (N,) finite values.
        group: (N,) int64 ids, in any order.
    """
    _, index, counts = np.unique(group, return_inverse=True, return_counts=True)
    order, starts = np.argsort(index, kind="stable"), np.cumsum(counts) - counts
    tau = np.full(len(counts), np.nan)
    for size in np.unique(counts):
        members = np.flatnonzero(counts == size)
        rows = order[starts[members, None] + np.arange(size)]  # (J, G)
        if size > LARGE:
            from scipy.stats import kendalltau

            tau[members] = [kendalltau(x[r], y[r]).statistic for r in rows]
            continue
        first, second = np.triu_indices(size, 1)
        a, b = (np.sign(v[rows[:, first]] - v[rows[:, second]]) for v in (x, y))
        scale = np.sqrt(np.abs(a).sum(1) * np.abs(b).sum(1))
        tau[members] = np.divide((a * b).sum(1), scale, out=np.full(len(members), np.nan), where=scale > 0)
    return tau
