"""The batcher: turns scored groups or SFT rows into equal shards, one list of rows a rank.

Before it deals the groups it gives every row its weight in the global loss; a row of weight 0 (a dropped group, a
truncated completion that is masked) is dealt like the others, so that all ranks keep the same number of calls.

Every rank gets the same number of rows (they make the same number of collective calls) and, where the groups divide
evenly, about the same number of tokens; rows of one image stay together, so that a micro-batch encodes it once. Pure
and deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tatar_dist.algo.aggregation import token_weights
from tatar_dist.records import LearnerRow, ScoredGroup


def global_weights(
    groups: Sequence[ScoredGroup], aggregation: str, limit: int, mask_truncated: bool = False
) -> list[np.ndarray]:
    """For each group the (G,) weights of its completions' tokens, normalised over all groups (algo/aggregation.py)."""
    completions = [(s.trained, c) for s in groups for c in s.group.completions]
    trained = [kept and not (mask_truncated and c.finish_reason == "length") for kept, c in completions]
    lengths = np.array([len(c.token_ids) for _, c in completions])
    weights = token_weights(lengths, np.array(trained, bool), aggregation, limit)
    return np.split(weights, np.cumsum([len(s.group.completions) for s in groups])[:-1])


def group_rows(scored: ScoredGroup, weights: np.ndarray) -> list[LearnerRow]:
    """The learner rows of one scored group; `weights` (G,) from `global_weights`."""
    prompt = scored.group.prompt
    return [
        LearnerRow(
            image_id=prompt.group_id,
            image=prompt.sample.image,
            prompt_text=prompt.text,
            completion_ids=c.token_ids,
            task=prompt.sample.task,
            advantage=float(scored.advantage[i]),
            weight=float(weights[i]),
            sampled_logprobs=c.logprobs,
            prompt_token_ids=scored.group.prompt_token_ids,
        )
        for i, c in enumerate(scored.group.completions)
    ]


def _tokens(rows: Sequence[LearnerRow]) -> int:
    return sum(len(r.completion_ids) for r in rows)


def shard_groups(groups: Sequence[ScoredGroup], ranks: int, weights: Sequence[np.ndarray]) -> list[list[LearnerRow]]:
    """Deal groups over ranks, longest first, back and forth; a remainder of groups is split by rows.

    `weights`: one (G,) array a group, from `global_weights`.

    Raises:
        ValueError: the rows do not divide by the ranks (the plan refuses such a config before a run starts).
    """
    pairs = zip(groups, weights, strict=True)
    units = sorted((group_rows(g, w) for g, w in pairs), key=lambda rows: (-_tokens(rows), rows[0].image_id))
    total = sum(map(len, units))
    if total % ranks:
        raise ValueError(f"{total} rows do not divide over {ranks} ranks")
    if len(units) % ranks:
        rows = [row for unit in units for row in unit]
        size = total // ranks
        return [rows[i * size : (i + 1) * size] for i in range(ranks)]
    return [[row for unit in shard for row in unit] for shard in _snake(units, ranks)]


def shard_rows(rows: Sequence[LearnerRow], ranks: int) -> list[list[LearnerRow]]:
    """Deal rows over ranks, longest first, back and forth: neighbours in a shard have similar lengths."""
    if len(rows) % ranks:
        raise ValueError(f"{len(rows)} rows do not divide over {ranks} ranks")
    ordered = sorted(rows, key=lambda r: (-len(r.completion_ids), r.image_id))
    return _snake(ordered, ranks)


def _snake(units: Sequence, ranks: int) -> list[list]:
    shards: list[list] = [[] for _ in range(ranks)]
    for i, unit in enumerate(units):
        lap, place = divmod(i, ranks)
        shards[place if lap % 2 == 0 else ranks - 1 - place].append(unit)
    return shards
