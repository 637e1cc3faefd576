"""Agreement with mean opinion scores: SRCC, PLCC, KRCC, fitted PLCC, RMSE and MAE.

Pure functions on float64 arrays. Ties get average ranks. Predictions are clamped to 0-100 and never rescaled. Unparsed
outputs are always reported: n and n_parsed accompany every value, and the result names the policy for them. An
undefined value is None, with its reason. scipy is imported where it is used, so importing this module needs only numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tatar_dist.errors import UserError

UNPARSED = ("drop", "midpoint")
MIDPOINT = 50.0
STARTS = 2  # of the logistic fit, which has several optima: the best of a grid
MIN_FIT = 5  # a logistic has four parameters: fewer points fit it perfectly and mean nothing


@dataclass(frozen=True)
class DatasetMetrics:
    """Metrics of one data set. rmse, mae: in points. `reason`: metric name -> why it is None.

    n: rows asked for; n_parsed: rows with an answer; n_missing: images that could not be read (not in n); n_truncated:
    answers cut off by the token limit; n_out_of_range: answers clamped to 0-100; n_distinct: distinct scores among the
    answers; n_commonest: answers that share the commonest. ci95: name -> (lo, hi) or None.
    """

    n: int
    n_parsed: int
    srcc: float | None
    plcc: float | None
    krcc: float | None
    plcc_fitted: float | None
    rmse: float | None
    mae: float | None
    unparsed: str = "drop"
    n_missing: int = 0
    n_truncated: int = 0
    n_out_of_range: int = 0
    n_distinct: int = 0
    n_commonest: int = 0
    ci95: dict[str, tuple[float, float] | None] = field(default_factory=dict)
    reason: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the object that `metrics --json` prints for a data set."""
        return asdict(self)


def set_names(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return (data set, task) -> display name.
    A name used for both tasks is split into NAME/iqa and NAME/iaa, since their scores are not comparable."""
    distinct = set(pairs)
    names = [name for name, _ in distinct]
    return {(name, task): name if names.count(name) == 1 else f"{name}/{task}" for name, task in distinct}


def usable(target: ArrayLike, prediction: ArrayLike, unparsed: str = "drop") -> tuple[np.ndarray, np.ndarray]:
    """Return (target, prediction clamped to 0-100); unparsed rows (NaN) dropped or set to 50.

    Raises UserError for an unknown policy.
    """
    if unparsed not in UNPARSED:
        raise UserError(f"unparsed policy {unparsed!r}: must be one of {', '.join(UNPARSED)}")
    target, prediction = np.asarray(target, np.float64), np.clip(np.asarray(prediction, np.float64), 0.0, 100.0)
    missing = np.isnan(prediction)
    if unparsed == "midpoint":
        return target, np.where(missing, MIDPOINT, prediction)
    return target[~missing], prediction[~missing]


def score_metrics(
    target: ArrayLike,
    prediction: ArrayLike,
    *,
    unparsed: str = "drop",
    n_missing: int = 0,
    n_truncated: int = 0,
    bootstrap: int = 0,
    ci_all: bool = False,
    cluster: np.ndarray | None = None,
    seed: int = 0,
) -> DatasetMetrics:
    """Compute all metrics of one data set.

    Args:
        target: (n,) mean opinion scores in points, finite.
        prediction: (n,) predicted scores in points, before clamping, NaN or None where unparsed.
        unparsed: drop | midpoint (50).
        n_missing, n_truncated: counts to include in the result.
        bootstrap: rounds for 95 % percentile intervals of SRCC and PLCC; 0 = none.
        ci_all: compute intervals of the other metrics too.
        cluster: (n,) labels of clusters (crops of one photograph) to resample as a whole; None = by rows.
    """
    raw = np.asarray(prediction, np.float64)
    t, p = usable(target, raw, unparsed)
    values: dict[str, float | None] = {}
    reason: dict[str, str] = {}
    undefined = _undefined(t, p)
    for name, statistic in STATISTICS.items():
        why = undefined if name in CORRELATIONS else None if len(t) else "no usable row"
        if why is None and name == "plcc_fitted" and len(t) < MIN_FIT:
            why = f"{len(t)} usable rows, a four-parameter fit needs {MIN_FIT}"
        value = math.nan if why else statistic(t, p)
        values[name] = value if math.isfinite(value) else None
        if values[name] is None:
            reason[name] = why or "the best rising logistic is flat: predictions do not rise with the target"
    ci95: dict[str, tuple[float, float] | None] = {}
    if bootstrap > 0:
        from tatar_dist.evaluate.bootstrap import intervals

        if cluster is not None and unparsed == "drop":
            cluster = cluster[~np.isnan(raw)]
        asked = STATISTICS if ci_all else {"srcc": srcc, "plcc": plcc}
        known = {name: statistic for name, statistic in asked.items() if values[name] is not None}
        ci95 = dict.fromkeys(asked) | intervals(known, t, p, cluster, rounds=bootstrap, seed=seed)
        for name, interval in ci95.items():
            if interval is None:
                reason[f"ci95.{name}"] = undefined or reason.get(name) or "too many resamples are constant"
    times = np.unique(usable(target, raw)[1], return_counts=True)[1]
    return DatasetMetrics(
        n=len(raw),
        n_parsed=int((~np.isnan(raw)).sum()),
        unparsed=unparsed,
        n_missing=n_missing,
        n_truncated=n_truncated,
        n_out_of_range=int(((raw < 0) | (raw > 100)).sum()),
        n_distinct=len(times),
        n_commonest=int(times.max(initial=0)),
        ci95=ci95,
        reason=reason,
        **values,
    )


def _undefined(target: np.ndarray, prediction: np.ndarray) -> str | None:
    """Return why the correlations are undefined, or None."""
    if len(target) < 2:
        return "1 usable row" if len(target) else "no usable row"
    if np.ptp(prediction) == 0:
        return "constant prediction"
    return "constant target" if np.ptp(target) == 0 else None


def plcc(target: np.ndarray, prediction: np.ndarray) -> float:
    """Return Pearson's r; NaN if either is constant."""
    if np.ptp(target) == 0 or np.ptp(prediction) == 0:
        return math.nan
    t, p = target - target.mean(), prediction - prediction.mean()
    return float(np.clip((t @ p) / (math.sqrt(float(t @ t)) * math.sqrt(float(p @ p))), -1.0, 1.0))


def srcc(target: np.ndarray, prediction: np.ndarray) -> float:
    """Return Spearman's rho, Pearson's r of scipy's average ranks; NaN if either is constant."""
    from scipy.stats import rankdata

    return plcc(rankdata(target), rankdata(prediction))


def krcc(target: np.ndarray, prediction: np.ndarray) -> float:
    """Return Kendall's tau-b; NaN if either is constant."""
    from scipy.stats import kendalltau

    return float(kendalltau(prediction, target).statistic)


def spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return mean and standard deviation (n - 1) in points of parsed scores; None with too few."""
    parsed = np.array([v for v in values if v is not None], np.float64)
    return (
        float(parsed.mean()) if len(parsed) else None,
        float(parsed.std(ddof=1)) if len(parsed) > 1 else None,
    )


def plcc_fitted(target: np.ndarray, prediction: np.ndarray) -> float:
    """Return Pearson's r after `logistic_map` of the predictions; NaN where there is none."""
    curve = logistic_map(target, prediction)
    return math.nan if curve is None else plcc(target, curve(prediction))


def logistic_map(target: np.ndarray, prediction: np.ndarray) -> Callable[[np.ndarray], np.ndarray] | None:
    """Fit the monotone logistic map (VQEG) from predictions to targets by least squares.

    Both are (n,) float64 in points. The map is low + (high - low) / (1 + exp(-(x - c) / s)) with high >= low and s > 0:
    a free sign would reward reversed order. Straight lines are a limit, so the fitted PLCC is not below the plain one.
    None for fewer than MIN_FIT points, a constant side or a flat best map.
    """
    if len(target) < MIN_FIT or np.ptp(target) == 0 or np.ptp(prediction) == 0:
        return None
    from scipy.optimize import least_squares
    from scipy.special import expit

    middle, width = prediction.mean(), prediction.std()
    level, spread = target.mean(), target.std()
    x, y = (prediction - middle) / width, (target - level) / spread

    def mapped(b: np.ndarray, x: np.ndarray = x) -> np.ndarray:
        return b[0] + b[1] * expit((x - b[2]) / b[3])

    def jacobian(b: np.ndarray) -> np.ndarray:
        u = (x - b[2]) / b[3]
        q = expit(u)
        slope = b[1] * q * expit(-u) / b[3]
        return np.stack([np.ones_like(x), q, -slope, -slope * u], axis=1)

    bounds = ([-np.inf, 0.0, -np.inf, 1e-3], [np.inf] * 4)
    grid = np.array(list(product(np.quantile(x, np.linspace(0, 1, 11)), (0.02, 0.1, 0.3, 1.0, 3.0, 30.0))))
    shapes = expit((x - grid[:, :1]) / grid[:, 1:])  # those of width 30 are straight lines
    centred = shapes - shapes.mean(1, keepdims=True)
    along = np.maximum(centred @ y, 0.0)
    rise = along / np.maximum(np.square(centred).sum(1), 1e-12)  # of least squares, as y has the mean 0
    candidates = np.column_stack([-rise * shapes.mean(1), rise, grid])
    starts = candidates[np.argsort(-along * rise, kind="stable")[:STARTS]]
    precision = {"x_scale": "jac", "max_nfev": 1000, "ftol": 1e-14, "xtol": 1e-12, "gtol": 1e-12}
    fits = [least_squares(lambda b: mapped(b) - y, s, jac=jacobian, bounds=bounds, **precision) for s in starts]
    best = min(fits, key=lambda f: f.cost).x
    if np.ptp(mapped(best)) <= 1e-6:
        return None
    return lambda points: level + spread * mapped(best, (points - middle) / width)


CORRELATIONS = {"srcc": srcc, "plcc": plcc, "krcc": krcc, "plcc_fitted": plcc_fitted}
STATISTICS = CORRELATIONS | {
    "rmse": lambda target, prediction: float(np.sqrt(np.mean((prediction - target) ** 2))),
    "mae": lambda target, prediction: float(np.mean(np.abs(prediction - target))),
}
