"""The comparisons behind one completion's Thurstone reward, for `rewards --explain` and the report."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tatar_dist.rewards import links
from tatar_dist.rewards.batch import Batch, read_answers
from tatar_dist.rewards.presets import Preset
from tatar_dist.rewards.score import ranked_groups, rows_of_term
from tatar_dist.rewards.thurstone import Groups, ThurstoneParams, comparison_of, pair_terms


@dataclass(frozen=True)
class Opponent:
    """One comparison. Scores in points; `weight` is its share of the mean."""

    group: int
    target: float
    mean: float
    variance: float
    p: float
    q: float
    weight: float
    reward: float


def opponents(row: int, q: np.ndarray, groups: Groups, params: ThurstoneParams) -> list[Opponent]:
    """The opponents of one parsed row, heaviest first; empty when the row is unparsed or its pool cannot rank.

    The weighted mean of their rewards is the row's reward before its clamp to [0, 1].
    """
    i = int(groups.of_row[row])
    rivals = np.flatnonzero((groups.pool == groups.pool[i]) & (groups.n_parsed > 0))
    rivals = rivals[rivals != i]
    if np.isnan(q[row]) or not len(rivals):
        return []
    c = comparison_of(i, rivals, groups, params)
    z = (q[row] - c.mu) * c.inverse_scale
    prob, _ = links.probabilities(z, params.link)
    r = pair_terms(c.p, c.not_p, z, params)
    r = 1.0 + r / math.log(params.eps) if params.measure == "bce" else r
    columns = (groups.g[rivals], groups.mu[rivals], groups.v[rivals], c.p, prob, c.w, r)
    table = [Opponent(int(j), *values) for j, *values in zip(rivals, *(x.tolist() for x in columns), strict=True)]
    return sorted(table, key=lambda o: -o.weight)


def explain(batch: Batch, preset: Preset, row: int, strict: bool = True) -> list[tuple[str, Opponent]]:
    """`opponents` of row `row` of a batch, each with its group id; empty where the term does not apply."""
    index = rows_of_term(batch, preset, "thurstone")
    if row not in index:
        return []
    q, stats, groups = ranked_groups(batch, read_answers(batch.completions, strict), preset, index)
    table = opponents(int(np.searchsorted(index, row)), q, stats, preset.thurstone)
    return [(str(batch.group_ids[groups[o.group]]), o) for o in table]
