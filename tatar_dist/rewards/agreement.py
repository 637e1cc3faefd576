"""Kendall's tau-b within groups: do a group's rewards order its completions as another measure does? Pure numpy."""

from __future__ import annotations

import numpy as np

LARGE = 64  # rows of a group


def group_kendall(x: np.ndarray, y: np.ndarray, group: np.ndarray) -> np.ndarray:
    """tau-b (Kendall 1945) of x and y within each group that occurs, in the order of its id; NaN where undefined.

    tau_b = (concordant - discordant) / sqrt((pairs - ties in x)(pairs - ties in y)); undefined when either is constant.
    All pairs of groups of up to LARGE rows at once (8 J G^2 bytes an array for J groups); larger ones go to scipy.

    Args:
        x, y: (N,) finite values.
        group: (N,) int64 ids, in any order.
    """
    _, index = np.unique(group, return_inverse=True)
    order = np.argsort(index, kind="stable")
    index = index[order]
    count = np.bincount(index)
    tau = np.full(len(count), np.nan)
    for j in np.flatnonzero(count > LARGE):
        from scipy.stats import kendalltau

        rows = order[index == j]
        tau[j] = kendalltau(x[rows], y[rows]).statistic
    small = np.flatnonzero(count <= LARGE)
    if len(small):
        tau[small] = _of_small(x, y, order, index, count, small)
    return tau


def _of_small(
    x: np.ndarray, y: np.ndarray, order: np.ndarray, index: np.ndarray, count: np.ndarray, small: np.ndarray
) -> np.ndarray:
    """tau-b of the groups `small`, padded to one block."""
    kept = np.isin(index, small)
    order, index = order[kept], np.searchsorted(small, index[kept])
    count = count[small]
    place = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)
    shape = (len(count), int(count.max()))
    present = np.zeros(shape, bool)
    present[index, place] = True
    pairs = present[:, :, None] & present[:, None, :] & np.triu(np.ones(shape[1:] * 2, bool), 1)

    def signs(values: np.ndarray) -> np.ndarray:
        padded = np.zeros(shape)
        padded[index, place] = values[order]
        return np.where(pairs, np.sign(padded[:, :, None] - padded[:, None, :]), 0.0)

    a, b = signs(x), signs(y)
    agree = (a * b).sum((1, 2))
    scale = np.sqrt(np.abs(a).sum((1, 2)) * np.abs(b).sum((1, 2)))
    return np.divide(agree, scale, out=np.full(len(count), np.nan), where=scale > 0)
