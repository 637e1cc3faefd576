"""Pairwise soft rank: each completion against each other completion of its pool.

    P = L((g_i - g_j) / tau), Q = L((q_i - q_j) / tau) clamped to [eps, 1 - eps], L logistic, scores in points
    r_i = clamp(1 - mean_w BCE(P, Q) / (-ln eps), 0, 1),  w = exp(-|g_i - g_j| / m)

(The soft rank of TATAR's public code, rewritten from its formula.) Ours compares only completions of different groups
in one data set; `siblings: true` and `pool: list` give the released behaviour, which compares whatever stands in the
list, siblings of one image included. Cost: completion x completion, so N^2 pairs, in blocks of BLOCK pairs (5 MiB of
temporaries).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tatar_dist.rewards import links
from tatar_dist.rewards.thurstone import Epsilon, RankingParams, gap_weights

BLOCK = 1 << 16


@dataclass(frozen=True)
class PairwiseParams(RankingParams):
    eps: Epsilon = 1e-4
    siblings: bool = False  # True: completions of the same image are compared too (released)


def pairwise(q: np.ndarray, g: np.ndarray, group: np.ndarray, pool: np.ndarray, params: PairwiseParams) -> np.ndarray:
    """Return (N,) float64 rewards in [0, 1]; 0 where unparsed or without any opponent.

    Args:
        q: (N,) clamped scores in points, NaN where unparsed.
        g: (N,) targets in points.
        group, pool: (N,) int64 ids.
    """
    reward = np.zeros(len(q))
    limit = links.clamp_limit(params.eps, "logistic")
    for one in np.unique(pool):
        rows = np.flatnonzero((pool == one) & ~np.isnan(q))
        step = max(1, BLOCK // max(len(rows), 1))
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            opponent = block[:, None] != rows[None] if params.siblings else group[block, None] != group[None, rows]
            gap = g[block, None] - g[None, rows]
            p, _ = links.probabilities(gap / params.tau, "logistic")
            w = gap_weights(gap, opponent, params.m)
            z = np.clip((q[block, None] - q[None, rows]) / params.tau, -limit, limit)
            mean = np.einsum("rj,rj->r", w, links.cross_entropy(p, z, "logistic"))
            reward[block] = np.where(opponent.any(axis=1), np.clip(1.0 + mean / math.log(params.eps), 0.0, 1.0), 0.0)
    return reward
