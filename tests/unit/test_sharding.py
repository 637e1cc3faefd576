"""The batcher: every row reaches exactly one rank, ranks get equally many micro-batches, fillers count nowhere."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tatar_dist.learner.sharding import Shard, global_weights, group_rows, shard_rows
from tatar_dist.learner.sharding import shard_groups as shard_weighted_groups
from tatar_dist.models.costs import RowCosts
from tatar_dist.types import Completion, Group, LearnerRow, Prompt, Sample, ScoredGroup


def scored_group(name: str, lengths: list[int]) -> ScoredGroup:
    """A scored group with one completion per length, all tokens and figures told apart."""
    n = len(lengths)
    completions = tuple(
        Completion(f"{name}-{i}", tuple(range(10 * i, 10 * i + k)), tuple(-0.5 * (i + 1) for _ in range(k)), "stop")
        for i, k in enumerate(lengths)
    )
    prompt = Prompt(Sample(f"s-{name}", "set", "iaa", b"png " + name.encode(), 50.0), f"text of {name}", name)
    advantage = np.arange(n, dtype=np.float64) - 1.5
    return ScoredGroup(Group(prompt, (1, 2, 3), completions, 7), np.ones(n, bool), {}, np.zeros(n), advantage)


def row(name: str, length: int) -> LearnerRow:
    return LearnerRow(name, b"", "text", tuple(range(length)), "iqa", prompt_tokens=3)


def shard_groups(groups: list[ScoredGroup], ranks: int, budget: int = 40) -> list[Shard]:
    return shard_weighted_groups(groups, ranks, global_weights(groups, "sequence-mean", 30), budget, RowCosts())


def flat(shard: Shard) -> list[LearnerRow]:
    return [r for batch in shard for r in batch]


def key(r: LearnerRow) -> tuple[str, tuple[int, ...]]:
    return r.image_id, r.completion_ids


def test_a_row_carries_what_the_loss_needs_of_its_completion():
    group = scored_group("000003/set/a", [2, 4])
    second = group_rows(group, np.array([0.25, 0.5]))[1]
    assert second == LearnerRow(
        image_id="000003/set/a",
        image=b"png 000003/set/a",
        prompt_text="text of 000003/set/a",
        completion_ids=(10, 11, 12, 13),
        task="iaa",
        advantage=-0.5,
        weight=0.5,
        sampled_logprobs=(-1.0,) * 4,
        prompt_token_ids=(1, 2, 3),
        prompt_tokens=3,
    )


lengths_of_groups = st.integers(1, 4).flatmap(
    lambda size: st.lists(st.lists(st.integers(1, 30), min_size=size, max_size=size), min_size=1, max_size=12)
)


@settings(deadline=None, max_examples=40)
@given(lengths_of_groups, st.integers(1, 6), st.integers(1, 60))
def test_every_row_reaches_exactly_one_rank_and_ranks_make_equally_many_calls(lengths, ranks, budget):
    groups = [scored_group(f"g{i:02d}", part) for i, part in enumerate(lengths)]
    rows = [r for g in groups for r in group_rows(g, np.zeros(len(g.reward)))]
    shards = shard_groups(groups, ranks, budget)
    assert len({len(shard) for shard in shards}) == 1 and all(batch for shard in shards for batch in shard)
    kept = [r for shard in shards for r in flat(shard) if not r.filler]
    assert Counter(map(key, kept)) == Counter(map(key, rows))
    fillers = [batch for shard in shards for batch in shard if any(r.filler for r in batch)]
    assert all(len(batch) == 1 and batch[0].weight == 0 for batch in fillers)


def test_rows_of_an_image_share_its_micro_batch():
    shard, *_ = shard_groups([scored_group("a", [5, 3, 4]), scored_group("b", [2, 2, 2])], 1, budget=100)
    assert [[r.image_id for r in batch] for batch in shard] == [["a"] * 3 + ["b"] * 3]
    assert [len(r.completion_ids) for r in shard[0]] == [5, 4, 3, 2, 2, 2]


def test_the_same_image_behind_another_prompt_is_no_business_of_the_batcher():
    """Rows are told apart by `image_id`, which a prompt has of its own."""
    shards = shard_rows([row(f"r{i}", k) for i, k in enumerate((3, 50, 7))], 1, budget=60)
    assert [[len(r.completion_ids) for r in batch] for batch in shards[0]] == [[50, 3], [7]]


def test_the_deal_does_not_depend_on_the_order_of_arrival():
    groups = [scored_group(f"g{i}", [3, 3 + i % 2]) for i in range(8)]
    rows = [row(f"r{i}", 4) for i in range(8)]
    expected = shard_groups(groups, 4), shard_rows(rows, 4, 20)
    rng = random.Random(0)
    for _ in range(5):
        rng.shuffle(groups)
        rng.shuffle(rows)
        found = shard_groups(groups, 4), shard_rows(rows, 4, 20)
        assert [[list(map(key, flat(s))) for s in part] for part in found] == [
            [list(map(key, flat(s))) for s in part] for part in expected
        ]


def test_ranks_without_rows_hold_fillers():
    first, second, third = shard_rows([row("a", 4), row("b", 2)], 3, 20)
    assert [[r.filler for r in flat(s)] for s in (first, second, third)] == [[False], [False], [True]]
    assert key(third[0][0]) == ("b", (0, 1)), "the cheapest row there is"


def test_weights_are_normalised_over_all_groups_and_leave_out_what_is_not_trained():
    groups = [scored_group("a", [2, 4]), replace(scored_group("b", [3, 3]), trained=False), scored_group("c", [5, 1])]
    cut = replace(groups[2].group.completions[0], finish_reason="length")
    groups[2] = replace(groups[2], group=replace(groups[2].group, completions=(cut, groups[2].group.completions[1])))
    weights = global_weights(groups, "token-mean", 30)
    assert [w.tolist() for w in weights] == [[1 / 12, 1 / 12], [0, 0], [1 / 12, 1 / 12]]
    masked = global_weights(groups, "sequence-mean", 30, mask_truncated=True)
    np.testing.assert_allclose(np.concatenate(masked), [1 / 6, 1 / 12, 0, 0, 0, 1 / 3])
    shards = shard_weighted_groups(groups, 2, masked, 9, RowCosts())
    assert sum(r.weight * len(r.completion_ids) for s in shards for r in flat(s)) == pytest.approx(1)
