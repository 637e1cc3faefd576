"""Rank each completion against the other images of its pool by Thurstone's model.

For completion k of group i and every other group j of the same pool that has a parsed completion (all in points):

    P_ij   = L((g_i - g_j) / tau)                           preference by the opinion scores; scale shared: / s_ij
    Q_ik,j = L((q_ik - mu_j) / s_ij)                        preference by the completion
    s_ij   = sqrt(max(v_i + v_j, floor^2))                  mu, v over parsed rows, v population variance
    w_ij   = exp(-|g_i - g_j| / m)                          near pairs weigh more
    r_ik   = clamp(1 - mean_w BCE(P, Q) / (-ln eps), 0, 1)  measure bce, Q clamped to [eps, 1 - eps]
    r_ik   = exp(-mean_w KL(P || Q) / kappa)                measure regret, KL = BCE(P, Q) - BCE(P, P), clamped likewise
    r_ik   = mean_w (sqrt(PQ) + sqrt((1-P)(1-Q)))           measure fidelity

BCE holds the entropy of P, which no answer can lower, so `bce` lives near 1 and differs little between the answers of a
group; `regret` is 1 where an answer says what the opinions say, whatever their entropy. With scale tau, answers that
scatter by more than tau are drawn apart: the best score lies outside the opponents' targets. With `scale: shared` the
best score is the target whatever the spread, if the other groups' means are theirs.

With `rater_sd` the raters' own spread counts, as in Thurstone's case III: tau^2 and s_ij^2 grow by sd_i^2 + sd_j^2, the
`score_std` of both images, 0 where unknown. (His dispersions are normal; a logistic link is as wide at 1.7 times less.)

With floor >= tau, exact answers score above a tie and a tie above the reversed order, for every link and measure. A
smaller floor is refused: once the spread has collapsed, the right order would score below a tie. `floor: null` (only in
`released`) means s = sqrt(v_i + v_j + 0.01).

Pairs are completion x group, one group's rows at a time and at most BLOCK pairs, so memory is bounded whatever the
batch. For C completions and J groups in a pool: C * J pairs, about 10 float64 passes over a block that stays in cache
(logistic BCE: one exp and one log a pair), 6 temporaries * BLOCK * 8 bytes = 3 MiB, and J values of P, w and s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Lt

from tatar_dist.config.validate import Finite
from tatar_dist.rewards import links
from tatar_dist.rewards.terms import Positive, Term

BLOCK = 1 << 16  # pairs held at once
RELEASED_VARIANCE_EPS = 1e-6 * 100.0**2  # the released code adds 1e-6 on the 0-1 scale

Epsilon = Annotated[Finite, Ge(1e-300), Lt(0.5)]


@dataclass(frozen=True)
class RankingParams(Term):
    """Parameters of both ranking terms."""

    tau: Positive = 8.0  # points
    m: Positive = 12.0  # points
    eps: Epsilon = 1e-6
    pool: Literal["dataset", "list"] = "dataset"  # list: opponents come from the whole batch (released)


@dataclass(frozen=True)
class ThurstoneParams(RankingParams):
    link: links.Link = "logistic"
    measure: Literal["bce", "fidelity", "regret"] = "bce"
    scale: Literal["tau", "shared"] = "tau"  # of P; shared: that of Q
    kappa: Positive = 0.2  # nats of regret that leave 1 / e
    rater_sd: bool = False  # opinions are as uncertain as the raters' `score_std` says
    floor: Finite | None = 8.0  # points

    def __post_init__(self) -> None:
        if self.scale == "tau" and self.floor is not None and self.floor < self.tau:
            raise ValueError(
                f"floor={self.floor:g} is under tau={self.tau:g}: with collapsed groups a right order would score "
                "below a tie; raise the floor to tau or lower tau"
            )


@dataclass(frozen=True)
class Groups:
    """Statistics of J groups: target g, mean mu and population variance v of parsed scores,
    in points; number of parsed rows; pool index; the (N,) index of each row's group; the raters' variance."""

    g: np.ndarray
    mu: np.ndarray
    v: np.ndarray
    n_parsed: np.ndarray
    pool: np.ndarray
    of_row: np.ndarray
    rater_variance: np.ndarray

    @property
    def unrankable(self) -> np.ndarray:
        """Return a mask, (J,) bool, of groups whose pool holds no other group with a parsed row."""
        ranked = self.n_parsed > 0
        _, pool = np.unique(self.pool, return_inverse=True)
        return np.bincount(pool, ranked)[pool] - ranked < 1


def group_statistics(
    q: np.ndarray, g: np.ndarray, group: np.ndarray, pool: np.ndarray, rater_sd: np.ndarray | float = 0.0
) -> Groups:
    """Return the statistics of each group; its rows need not be adjacent.

    Args:
        q: (N,) clamped scores, NaN where unparsed.
        g: (N,) targets.
        group: (N,) int64 ids 0..J-1, each used at least once.
        pool: (N,) int64 pool of each row; constant within a group.
        rater_sd: (N,) or one number, points; NaN counts as 0; constant within a group.
    """
    n_groups = int(group.max()) + 1 if len(group) else 0
    parsed = ~np.isnan(q)
    first = np.zeros(n_groups, np.int64)
    first[group[::-1]] = np.arange(len(group))[::-1]
    n = np.bincount(group[parsed], minlength=n_groups)
    safe = np.maximum(n, 1)
    mu = np.bincount(group[parsed], weights=q[parsed], minlength=n_groups) / safe
    v = np.bincount(group[parsed], weights=(q[parsed] - mu[group[parsed]]) ** 2, minlength=n_groups) / safe
    variance = np.nan_to_num(np.broadcast_to(rater_sd, len(q))[first]) ** 2
    return Groups(g[first], mu, v, n, pool[first], group, variance)


def pair_scale(v_i: np.ndarray, v_j: np.ndarray, params: ThurstoneParams) -> np.ndarray:
    """Return s_ij in points, broadcast over v_i and v_j."""
    if params.floor is None:
        return np.sqrt(v_i + v_j + RELEASED_VARIANCE_EPS)
    return np.sqrt(np.maximum(v_i + v_j, params.floor**2))


def pair_terms(p: np.ndarray, not_p: np.ndarray, z: np.ndarray, params: ThurstoneParams) -> np.ndarray:
    """Return BCE in nats (regret: too), or fidelity, of each pair. p, not_p broadcast against z."""
    if params.measure == "fidelity":
        return links.fidelity(p, not_p, z, params.link)
    limit = links.clamp_limit(params.eps, params.link)
    return links.cross_entropy(p, np.clip(z, -limit, limit), params.link)


def reward_of_mean(mean: np.ndarray, params: ThurstoneParams) -> np.ndarray:
    """Turn `pair_terms`' mean, less the entropy, into a reward; a BCE >= -ln eps gives 0."""
    if params.measure == "bce":
        mean = 1.0 + mean / math.log(params.eps)
    elif params.measure == "regret":
        mean = np.exp(-mean / params.kappa)
    return np.clip(mean, 0.0, 1.0)


def gap_weights(gap: np.ndarray, opponent: np.ndarray, m: float) -> np.ndarray:
    """Return exp(-|gap| / m), normalised over opponents; rows without an opponent are all 0.

    The smallest gap is subtracted first, so that a small m cannot underflow all weights to 0 / 0.
    """
    far = np.where(opponent, np.abs(gap), np.inf)
    near = far.min(axis=1, keepdims=True, initial=np.inf)
    w = np.where(opponent, np.exp(-(np.abs(gap) - np.where(np.isinf(near), 0.0, near)).clip(min=0.0) / m), 0.0)
    return w / np.maximum(w.sum(axis=1, keepdims=True), 1e-300)


def thurstone(q: np.ndarray, groups: Groups, params: ThurstoneParams) -> np.ndarray:
    """Return rewards in [0, 1], (N,) float64; 0 where unparsed or without an opponent.

    Args:
        q: (N,) clamped scores in points, NaN where unparsed.
        groups: their statistics, from `group_statistics` with pools already chosen.
    """
    reward = np.zeros(len(q))
    rows = np.flatnonzero(~np.isnan(q))
    rows = rows[np.argsort(groups.of_row[rows], kind="stable")]
    starts = np.searchsorted(groups.of_row[rows], np.arange(len(groups.g) + 1))
    for pool in np.unique(groups.pool):
        rivals = np.flatnonzero((groups.pool == pool) & (groups.n_parsed > 0))
        if len(rivals) < 2:
            continue
        step = max(1, BLOCK // len(rivals))
        for i in rivals:
            comparison = comparison_of(i, rivals, groups, params)
            for start in range(starts[i], starts[i + 1], step):
                block = rows[start : min(start + step, starts[i + 1])]
                reward[block] = comparison.rewards(q[block], params)
    return reward


@dataclass(frozen=True)
class Comparison:
    """One group against the J of its pool: (J,) weights (0 for itself), P, 1 - P, means, 1 / s.

    entropy: (J,) nats of BCE that the best Q leaves, which `regret` subtracts; else 0.
    """

    w: np.ndarray
    p: np.ndarray
    not_p: np.ndarray
    mu: np.ndarray
    inverse_scale: np.ndarray
    entropy: np.ndarray

    def rewards(self, q: np.ndarray, params: ThurstoneParams) -> np.ndarray:
        """Return (R,) rewards of R parsed rows of the group."""
        z = (q[:, None] - self.mu) * self.inverse_scale
        return reward_of_mean(pair_terms(self.p, self.not_p, z, params) @ self.w - self.entropy @ self.w, params)


def comparison_of(i: int, rivals: np.ndarray, groups: Groups, params: ThurstoneParams) -> Comparison:
    gap = groups.g[i] - groups.g[rivals]
    raters = groups.rater_variance[i] + groups.rater_variance[rivals] if params.rater_sd else 0.0
    inverse = 1.0 / np.sqrt(pair_scale(groups.v[i], groups.v[rivals], params) ** 2 + raters)
    z = gap * inverse if params.scale == "shared" else gap / np.sqrt(params.tau**2 + raters)
    p, not_p = links.probabilities(z, params.link)
    w = gap_weights(gap[None], (rivals != i)[None], params.m)[0]
    entropy = pair_terms(p, not_p, z, params) if params.measure == "regret" else np.zeros(len(rivals))
    return Comparison(w, p, not_p, groups.mu[rivals], inverse, entropy)
