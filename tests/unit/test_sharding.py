"""The batcher: every row reaches exactly one rank, ranks get equal counts, rows of one image stay together."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tatar_dist.learner.sharding import global_weights, group_rows, shard_rows
from tatar_dist.learner.sharding import shard_groups as shard_weighted_groups
from tatar_dist.records import Completion, Group, LearnerRow, Prompt, Sample, ScoredGroup


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
    return LearnerRow(name, b"", "text", tuple(range(length)), "iqa")


def shard_groups(groups: list[ScoredGroup], ranks: int) -> list[list[LearnerRow]]:
    return shard_weighted_groups(groups, ranks, global_weights(groups, "sequence-mean", 30))


def tokens(rows: list[LearnerRow]) -> int:
    return sum(len(r.completion_ids) for r in rows)


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
    )


lengths_of_groups = st.integers(1, 4).flatmap(
    lambda size: st.lists(st.lists(st.integers(1, 30), min_size=size, max_size=size), min_size=1, max_size=12)
)


@settings(deadline=None, max_examples=40)
@given(lengths_of_groups, st.integers(1, 6))
def test_every_row_reaches_exactly_one_rank_and_ranks_get_equal_counts(lengths, ranks):
    groups = [scored_group(f"g{i:02d}", part) for i, part in enumerate(lengths)]
    rows = [r for g in groups for r in group_rows(g, np.zeros(len(g.reward)))]
    if len(rows) % ranks:
        with pytest.raises(ValueError, match=f"{len(rows)} rows do not divide over {ranks} ranks"):
            shard_groups(groups, ranks)
        return
    shards = shard_groups(groups, ranks)
    assert [len(s) for s in shards] == [len(rows) // ranks] * ranks
    assert Counter(key(r) for s in shards for r in s) == Counter(map(key, rows))


@settings(deadline=None, max_examples=40)
@given(lengths_of_groups, st.integers(1, 6))
def test_rows_of_an_image_are_neighbours_and_on_one_rank_when_groups_divide(lengths, ranks):
    groups = [scored_group(f"g{i:02d}", part) for i, part in enumerate(lengths * ranks)]
    for shard in shard_groups(groups, ranks):
        images = [r.image_id for r in shard]
        changes = 1 + sum(a != b for a, b in zip(images, images[1:], strict=False))
        assert changes == len(set(images)) == len(lengths)


def test_a_remainder_of_groups_is_split_by_rows_and_cuts_only_at_the_borders_of_ranks():
    groups = [scored_group(n, [k] * 4) for n, k in (("a", 9), ("b", 5), ("c", 2))]
    first, second = shard_groups(groups, 2)
    assert [r.image_id for r in first] == ["a"] * 4 + ["b"] * 2
    assert [r.image_id for r in second] == ["b"] * 2 + ["c"] * 4


def test_groups_are_dealt_back_and_forth_so_that_tokens_balance():
    groups = [scored_group(n, [k]) for n, k in zip("abcdef", (6, 5, 4, 3, 2, 1), strict=True)]
    shards = shard_groups(groups, 3)
    assert [[r.image_id for r in s] for s in shards] == [["a", "f"], ["b", "e"], ["c", "d"]]
    assert [tokens(s) for s in shards] == [7, 7, 7]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=40), st.integers(1, 5))
def test_ranks_differ_by_less_tokens_than_the_longest_and_shortest_row_do(lengths, ranks):
    rows = [row(f"r{i:03d}", k) for i, k in enumerate(lengths * ranks)]
    shards = shard_rows(rows, ranks)
    sums = [tokens(s) for s in shards]
    assert max(sums) - min(sums) <= max(lengths) - min(lengths)
    assert Counter(key(r) for s in shards for r in s) == Counter(map(key, rows))
    assert {len(s) for s in shards} == {len(lengths)}


def test_a_shard_runs_from_long_to_short_so_that_micro_batches_pad_little():
    shards = shard_rows([row(f"r{i}", k) for i, k in enumerate((3, 50, 7, 41, 5, 60))], 2)
    assert [[len(r.completion_ids) for r in s] for s in shards] == [[60, 7, 5], [50, 41, 3]]


def test_the_deal_does_not_depend_on_the_order_of_arrival():
    groups = [scored_group(f"g{i}", [3, 3 + i % 2]) for i in range(8)]
    rows = [row(f"r{i}", 4) for i in range(8)]
    expected = shard_groups(groups, 4), shard_rows(rows, 4)
    rng = random.Random(0)
    for _ in range(5):
        rng.shuffle(groups)
        rng.shuffle(rows)
        found = shard_groups(groups, 4), shard_rows(rows, 4)
        assert [[list(map(key, s)) for s in part] for part in found] == [
            [list(map(key, s)) for s in part] for part in expected
        ]


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 rows do not divide over 2 ranks"):
        shard_rows([row(f"r{i}", 1) for i in range(3)], 2)


def test_weights_are_normalised_over_all_groups_and_leave_out_what_is_not_trained():
    groups = [scored_group("a", [2, 4]), replace(scored_group("b", [3, 3]), trained=False), scored_group("c", [5, 1])]
    cut = replace(groups[2].group.completions[0], finish_reason="length")
    groups[2] = replace(groups[2], group=replace(groups[2].group, completions=(cut, groups[2].group.completions[1])))
    weights = global_weights(groups, "token-mean", 30)
    assert [w.tolist() for w in weights] == [[1 / 12, 1 / 12], [0, 0], [1 / 12, 1 / 12]]
    masked = global_weights(groups, "sequence-mean", 30, mask_truncated=True)
    np.testing.assert_allclose(np.concatenate(masked), [1 / 6, 1 / 12, 0, 0, 0, 1 / 3])
    shards = shard_weighted_groups(groups, 2, masked)
    assert sum(r.weight * len(r.completion_ids) for s in shards for r in s) == pytest.approx(1)
