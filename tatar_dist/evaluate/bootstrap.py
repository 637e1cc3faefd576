"""Bootstrap intervals of metrics, and of paired before/after differences.

Each round draws as many clusters as there are, with replacement, and recomputes the statistic on their rows. A cluster
is a source photograph, because crops of one photograph are not independent, or else a single row. Percentile intervals
(Efron & Tibshirani 1993, ch. 13) at 95 %, where asked expanded for few clusters (Hesterberg 2015, doi
10.1080/00031305.2015.1089789, section 5). Results depend on the seed alone. One resample is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tatar_dist.evaluate.metrics import MIDPOINT, srcc

LEVEL = 0.95
MIN_DEFINED = 0.95  # share of resamples in which the statistic must exist
Statistic = Callable[[np.ndarray, np.ndarray], float]  # (target, prediction), (n,) each -> value, NaN where undefined


@dataclass(frozen=True)
class Interval:
    """A statistic on the full data with its percentile interval, NaN if it is seldom defined.

    p: two-sided, of no difference: 2 (k + 1) / (R + 1), with k of R resamples on the rarer side of 0, at most 1.
    """

    estimate: float
    lo: float
    hi: float
    p: float


def resamples(cluster: np.ndarray, rounds: int, seed: int) -> Iterator[np.ndarray]:
    """Yield row indices of each resample. cluster: (n,) labels; rows of a label drawn together."""
    rng = np.random.default_rng(seed)
    _, label, sizes = np.unique(cluster, return_inverse=True, return_counts=True)
    by_cluster = np.argsort(label, kind="stable")
    starts = np.cumsum(sizes) - sizes
    for _ in range(rounds):
        drawn = rng.integers(0, len(sizes), len(sizes))
        counts = sizes[drawn]
        first = np.cumsum(counts) - counts  # position of each drawn cluster in the resample
        yield by_cluster[np.repeat(starts[drawn] - first, counts) + np.arange(counts.sum())]


def intervals(
    statistics: Mapping[str, Statistic],
    target: np.ndarray,
    prediction: np.ndarray,
    cluster: np.ndarray | None = None,
    *,
    rounds: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float] | None]:
    """Return each statistic's percentile interval; None if undefined or fewer than two clusters.

    target, prediction: (n,) float64 without NaN. cluster: (n,) labels to resample as a whole; None: by row.
    """
    cluster = np.arange(len(target)) if cluster is None else cluster
    if len(np.unique(cluster)) < 2:
        return dict.fromkeys(statistics)
    draws = [
        [statistic(target[rows], prediction[rows]) for statistic in statistics.values()]
        for rows in resamples(cluster, rounds, seed)
    ]
    bounds = map(_interval, np.array(draws).T)
    return {name: None if math.isnan(lo) else (lo, hi) for name, (lo, hi, _) in zip(statistics, bounds, strict=True)}


def _interval(draws: np.ndarray, expand: int = 0) -> tuple[float, float, float]:
    """Return lo, hi and p of an `Interval` from the values of the resamples, (R,).

    expand: n clusters, for tails of Phi(sqrt(n / (n - 1)) t(n - 1)) instead of those of the level, t being Student's
    quantile of it: resamples of n spread by (n - 1) / n too little, and with few n tails are longer. p accordingly.
    """
    defined = draws[np.isfinite(draws)]
    lo = hi = math.nan
    rarer = min((defined <= 0).sum(), (defined >= 0).sum())
    tail, share = (1 - LEVEL) / 2, min(0.5, (int(rarer) + 1) / (len(defined) + 1))
    if expand:
        from scipy.stats import norm, t

        width = math.sqrt(expand / (expand - 1))
        tail = norm.cdf(width * t.ppf(tail, expand - 1))
        share = float(t.cdf(norm.ppf(share) / width, expand - 1))
    if len(defined) >= MIN_DEFINED * len(draws):
        lo, hi = np.quantile(defined, [tail, 1 - tail]).tolist()
    return lo, hi, 2 * share


def _bootstrap(
    value: Callable[[np.ndarray], float], cluster: np.ndarray, rounds: int, seed: int, expand: bool = False
) -> Interval:
    """Return the interval of `value`, a function of row indices, over resamples of the clusters."""
    draws = np.array([value(rows) for rows in resamples(cluster, rounds, seed)])
    return Interval(value(np.arange(len(cluster))), *_interval(draws, len(np.unique(cluster)) if expand else 0))


def paired_mean_difference(
    before: np.ndarray, after: np.ndarray, cluster: np.ndarray, *, rounds: int = 2000, seed: int = 0
) -> Interval:
    """Bootstrap the 95 % interval of mean(after - before) by cluster; seeds are averaged first.

    Args:
        before, after: (n,) or (S, n), S seeds: finite values of a reward term for the same rows (and seeds).
        cluster: (n,) labels, the source photograph of each row.

    Raises:
        ValueError: different shapes, or NaN.
    """
    before, after = _paired(before, after, cluster)
    difference = (after - before).mean(axis=0)
    return _bootstrap(lambda rows: float(difference[rows].mean()), cluster, rounds, seed)


def paired_difference(
    statistic: Statistic,
    target: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    cluster: np.ndarray,
    *,
    rounds: int = 2000,
    seed: int = 0,
    expand: bool = False,
    seeds_too: bool = False,
) -> Interval:
    """Bootstrap the statistic with `after` minus that with `before`, resampling by cluster.

    With seeds as first axis, the difference is averaged over seeds. All seeds share each resample, so that effects
    common to the photographs are not averaged away. Unparsed predictions (NaN) count as the midpoint 50, so that before
    and after keep the same rows. Predictions are clamped to 0-100.

    Args:
        target: (n,); before, after: (n,) or (S, n) predictions; cluster: (n,) labels.
        expand: wider percentiles for few clusters.
        seeds_too: every resample also draws as many seeds as there are, with replacement (crossed with the clusters).
    """
    before, after = (np.clip(np.where(np.isnan(x), MIDPOINT, x), 0.0, 100.0) for x in (before, after))
    pairs = list(zip(*_paired(before, after, cluster), strict=True))

    def difference(rows: np.ndarray, drawn: Sequence[int] = range(len(pairs))) -> float:
        t, of = target[rows], [pairs[k] for k in drawn]
        return float(np.mean([statistic(t, a[rows]) - statistic(t, b[rows]) for b, a in of]))

    if not seeds_too:
        return _bootstrap(difference, cluster, rounds, seed, expand)
    rng = np.random.default_rng((seed, len(pairs)))
    draws = [difference(r, rng.integers(0, len(pairs), len(pairs)).tolist()) for r in resamples(cluster, rounds, seed)]
    clusters = len(np.unique(cluster)) if expand else 0
    return Interval(difference(np.arange(len(cluster))), *_interval(np.array(draws), clusters))


paired_srcc_difference = partial(paired_difference, srcc)


def _paired(before: np.ndarray, after: np.ndarray, cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both as (S, n) float64. Raises ValueError for shapes that do not match, or NaN."""
    before, after = np.atleast_2d(np.asarray(before, np.float64)), np.atleast_2d(np.asarray(after, np.float64))
    if before.shape != after.shape or before.shape[1] != len(cluster):
        raise ValueError(f"before {before.shape}, after {after.shape} and {len(cluster)} cluster labels do not match")
    if np.isnan(before).any() or np.isnan(after).any():
        raise ValueError("NaN in paired values: a row must count in both or in neither")
    return before, after
