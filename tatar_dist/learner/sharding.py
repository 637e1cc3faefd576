"""Turn scored groups or SFT rows into one shard per rank, a list of micro-batches of rows.

Before the groups are distributed, every row gets its weight in the global loss; a row of weight 0 (in a dropped group,
or a masked truncated completion) is distributed like the others. packing.py decides which rank gets which rows. Every
rank gets the same number of micro-batches, because all ranks must make the same collective calls; a micro-batch that
would be empty holds a filler, a row of weight 0. Pure and deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tatar_dist.algo.aggregation import token_weights
from tatar_dist.config.schema import Aggregation
from tatar_dist.learner.packing import pack
from tatar_dist.models.costs import RowCosts, Unit
from tatar_dist.types import LearnerRow, ScoredGroup

Shard = list[list[LearnerRow]]


def global_weights(
    groups: Sequence[ScoredGroup], aggregation: Aggregation, limit: int, mask_truncated: bool = False
) -> list[np.ndarray]:
    """Compute each group's (G,) token weights, normalised over all groups (algo/aggregation.py)."""
    completions = [(s.trained, c) for s in groups for c in s.group.completions]
    trained = [kept and not (mask_truncated and c.finish_reason == "length") for kept, c in completions]
    lengths = np.array([len(c.token_ids) for _, c in completions])
    weights = token_weights(lengths, np.array(trained, bool), aggregation, limit)
    return np.split(weights, np.cumsum([len(s.group.completions) for s in groups])[:-1])


def group_rows(scored: ScoredGroup, weights: np.ndarray) -> list[LearnerRow]:
    """Make the learner rows of one scored group; `weights` (G,) from `global_weights`."""
    prompt = scored.group.prompt
    return [
        LearnerRow(
            image_id=prompt.group_id,
            image=prompt.sample.image,
            prompt_text=prompt.text + prompt.begun,
            completion_ids=c.token_ids,
            task=prompt.sample.task,
            advantage=float(scored.advantage[i]),
            weight=float(weights[i]),
            sampled_logprobs=c.logprobs,
            prompt_token_ids=scored.group.prompt_token_ids,
            prompt_tokens=len(scored.group.prompt_token_ids),
        )
        for i, c in enumerate(scored.group.completions)
    ]


def shard_groups(
    groups: Sequence[ScoredGroup], ranks: int, weights: Sequence[np.ndarray], budget: int, costs: RowCosts
) -> list[Shard]:
    """Shard scored groups. `weights`: one (G,) array per group, from `global_weights`."""
    pairs = zip(groups, weights, strict=True)
    return shard_rows([row for g, w in pairs for row in group_rows(g, w)], ranks, budget, costs)


def shard_rows(rows: Sequence[LearnerRow], ranks: int, budget: int, costs: RowCosts = RowCosts()) -> list[Shard]:  # noqa: B008
    """Pack rows into each rank's micro-batches of at most `budget` tokens (packing.py)."""
    ordered = sorted(rows, key=lambda r: (r.image_id, -len(r.completion_ids)))
    members: dict[str, list[int]] = {}
    for i, row in enumerate(ordered):
        members.setdefault(row.image_id, []).append(i)
    units = [
        Unit(tuple(own), ordered[own[0]].prompt_tokens, tuple(len(ordered[i].completion_ids) for i in own))
        for own in members.values()
    ]
    filler = replace(min(rows, key=_tokens), filler=True, weight=0.0)
    return [
        [[ordered[i] for unit in batch for i in unit.rows] or [filler] for batch in batches]
        for batches in pack(units, ranks, budget, costs)
    ]


def _tokens(row: LearnerRow) -> int:
    return row.prompt_tokens + len(row.completion_ids)
