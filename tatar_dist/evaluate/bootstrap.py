"""Bootstrap intervals of SRCC and PLCC, and of paired before/after differences.

A resample is a vector of integer row counts. Ranks, means and correlations are computed from the counts, for many
resamples at once, so nothing is sorted per round. Differences are resampled by cluster (source photograph), because
crops of one photograph are not independent. Percentile intervals (Efron & Tibshirani 1993, ch. 13). Results depend on
the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tatar_dist.evaluate.metrics import MIDPOINT

BLOCK = 1 << 20  # counts held at once: rounds x rows of a block
MIN_DEFINED = 0.95  # share of resamples in which the statistic must exist


@dataclass(frozen=True)
class Interval:
    """A statistic on the full data with its percentile interval. `rounds`: resamples in which it is defined.

    p: two-sided, of no difference: 2 (k + 1) / (rounds + 1), k the number of resamples on the rarer side of 0.
    """

    estimate: float
    lo: float
    hi: float
    rounds: int
    p: float = float("nan")


class _Ranks:
    """Average ranks of the values (n,) under row counts, by tie class."""

    def __init__(self, values: np.ndarray) -> None:
        _, self.of_row = np.unique(values, return_inverse=True)
        self.order = np.argsort(self.of_row, kind="stable")
        self.starts = np.unique(self.of_row[self.order], return_index=True)[1]

    def under(self, counts: np.ndarray) -> np.ndarray:
        """Return the (R, n) average ranks of the rows in R resamples given by (R, n) counts."""
        per_class = np.add.reduceat(counts[:, self.order], self.starts, axis=1)
        return (np.cumsum(per_class, axis=1) - 0.5 * (per_class - 1.0))[:, self.of_row]


def _weighted_pearson(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(R,) Pearson's r of rows weighted by (R, n) counts; a, b: (n,) or (R, n). NaN where one is constant."""
    n = counts.sum(axis=1, keepdims=True)
    a = a - (counts * a).sum(axis=1, keepdims=True) / n
    b = b - (counts * b).sum(axis=1, keepdims=True) / n
    aa, bb, ab = ((counts * x * y).sum(axis=1) for x, y in ((a, a), (b, b), (a, b)))
    scale = np.sqrt(aa * bb)
    # Rounding leaves a constant column a variance of about 1e-26 instead of 0.
    defined = (aa > 1e-18 * n[:, 0]) & (bb > 1e-18 * n[:, 0])
    return np.where(defined, ab / np.where(defined, scale, 1.0), np.nan)


def _blocks(rounds: int, n: int) -> list[int]:
    size = max(1, BLOCK // max(n, 1))
    return [min(size, rounds - start) for start in range(0, rounds, size)]


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float] | None:
    defined = values[np.isfinite(values)]
    if len(values) == 0 or len(defined) < MIN_DEFINED * len(values):
        return None
    lo, hi = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def correlation_intervals(
    target: np.ndarray,
    prediction: np.ndarray,
    cluster: np.ndarray | None = None,
    *,
    rounds: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float] | None]:
    """Return percentile intervals {"srcc": (lo, hi), "plcc": (lo, hi)} over resampled rows; None where undefined.

    target, prediction: (n,) float64 without NaN. cluster: (n,) labels resampled as a whole; one cluster gives None.
    """
    n = len(target)
    index = np.arange(n) if cluster is None else np.unique(cluster, return_inverse=True)[1]
    n_clusters = int(index.max()) + 1 if n else 0
    if n_clusters < 2 or rounds < 1:
        return {"srcc": None, "plcc": None}
    rng = np.random.default_rng(seed)
    ranks_t, ranks_p = _Ranks(target), _Ranks(prediction)
    draws: dict[str, list[np.ndarray]] = {"srcc": [], "plcc": []}
    for size in _blocks(rounds, n):
        counts = _row_counts(rng, size, n_clusters)
        counts = counts if cluster is None else counts[:, index]
        draws["srcc"].append(_weighted_pearson(ranks_t.under(counts), ranks_p.under(counts), counts))
        draws["plcc"].append(_weighted_pearson(target, prediction, counts))
    return {name: _percentiles(np.concatenate(parts), level) for name, parts in draws.items()}


def intervals(
    statistics: Mapping[str, Callable[[np.ndarray, np.ndarray], float]],
    target: np.ndarray,
    prediction: np.ndarray,
    *,
    rounds: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float] | None]:
    """Return percentile intervals of any statistic(target, prediction) over resampled rows; None where undefined.

    target, prediction: (n,) float64 without NaN. Every statistic is recomputed in each round.
    """
    rng, n = np.random.default_rng(seed), len(target)
    draws: dict[str, list[float]] = {name: [] for name in statistics}
    for _ in range(rounds if n > 1 else 0):
        rows = rng.integers(0, n, n)
        t, p = target[rows], prediction[rows]
        defined = np.ptp(t) > 0 and np.ptp(p) > 0
        for name, statistic in statistics.items():
            draws[name].append(statistic(t, p) if defined or name in ("rmse", "mae") else np.nan)
    return {name: _percentiles(np.array(values), level) for name, values in draws.items()}


def _row_counts(rng: np.random.Generator, rounds: int, n: int) -> np.ndarray:
    """Draw n of n rows with replacement in each round; return the (rounds, n) float64 counts of each row."""
    drawn = rng.integers(0, n, (rounds, n)) + n * np.arange(rounds)[:, None]
    return np.bincount(drawn.ravel(), minlength=rounds * n).reshape(rounds, n).astype(np.float64)


def paired_mean_difference(
    before: np.ndarray,
    after: np.ndarray,
    cluster: np.ndarray,
    *,
    rounds: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Interval of mean(after - before), resampled by cluster; averaged over seeds if they are the first axis.

    Args:
        before, after: (n,) or (S, n) values of a reward term for the same rows (and seeds), finite.
        cluster: (n,) labels, the source photograph of each row.

    Raises:
        ValueError: different shapes, NaN, or no rows.
    """
    before, after = _paired(before, after, cluster)
    difference = (after - before).mean(axis=0)
    _, index = np.unique(np.asarray(cluster), return_inverse=True)
    total, n = np.bincount(index, weights=difference), np.bincount(index)
    counts = _row_counts(np.random.default_rng(seed), rounds, len(n))
    draws = (counts @ total) / (counts @ n)
    lo, hi = _percentiles(draws, level) or (np.nan, np.nan)
    return Interval(float(difference.mean()), float(lo), float(hi), rounds)


def paired_srcc_difference(
    target: np.ndarray, before: np.ndarray, after: np.ndarray, cluster: np.ndarray, **how: Any
) -> Interval:
    """`paired_difference` of SRCC."""
    return paired_difference("srcc", target, before, after, cluster, **how)


def paired_difference(
    statistic: Literal["srcc", "plcc"],
    target: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    cluster: np.ndarray,
    *,
    rounds: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Interval of the correlation with `after` minus that with `before`, resampled by cluster.

    With seeds as first axis, the difference is averaged over seeds. All seeds share each resample, so that effects
    common to the photographs are not averaged away. Unparsed predictions (NaN) count as the midpoint 50, so that before
    and after keep the same rows. Predictions are clamped to 0-100.

    Args:
        target: (n,); before, after: (n,) or (S, n) predictions; cluster: (n,) labels.

    Raises:
        ValueError: different shapes, or no rows.
    """
    before, after = (np.clip(np.where(np.isnan(x), MIDPOINT, x), 0.0, 100.0) for x in (before, after))
    before, after = _paired(before, after, cluster)
    target = np.asarray(target, np.float64)
    if target.shape != before.shape[1:]:
        raise ValueError(f"target {target.shape} and predictions {before.shape} do not have the same rows")
    under = [_values(statistic, x) for x in (target, *before, *after)]
    _, index = np.unique(np.asarray(cluster), return_inverse=True)
    n_clusters = int(index.max()) + 1

    def differences(counts: np.ndarray) -> np.ndarray:
        t = under[0](counts)
        each = [_weighted_pearson(t, u(counts), counts) for u in under[1:]]
        return np.mean(each[len(before) :], axis=0) - np.mean(each[: len(before)], axis=0)

    rng = np.random.default_rng(seed)
    draws = np.concatenate(
        [differences(_row_counts(rng, size, n_clusters)[:, index]) for size in _blocks(rounds, len(target))]
    )
    lo, hi = _percentiles(draws, level) or (np.nan, np.nan)
    estimate = float(differences(np.ones((1, len(target))))[0])
    defined = draws[np.isfinite(draws)]
    rarer = min((defined <= 0).sum(), (defined >= 0).sum())
    p = min(1.0, 2 * (int(rarer) + 1) / (len(defined) + 1))
    return Interval(estimate, float(lo), float(hi), len(defined), p)


def _values(statistic: str, values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from (R, n) counts to the values to correlate: average ranks or raw values."""
    return _Ranks(values).under if statistic == "srcc" else lambda counts: values


def _paired(before: np.ndarray, after: np.ndarray, cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both as (S, n) float64 after validation."""
    before, after = np.atleast_2d(np.asarray(before, np.float64)), np.atleast_2d(np.asarray(after, np.float64))
    if before.shape != after.shape or before.shape[1] != len(cluster):
        raise ValueError(f"before {before.shape}, after {after.shape} and {len(cluster)} cluster labels do not match")
    if before.size == 0:
        raise ValueError("no rows to compare")
    if np.isnan(before).any() or np.isnan(after).any():
        raise ValueError("NaN in paired values: a row must count in both or in neither")
    return before, after
