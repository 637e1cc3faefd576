"""Packing: nothing lost, budgets kept, as many micro-batches on every rank, ranks balanced by cost."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tatar_dist.learner.packing import pack
from tatar_dist.models.costs import RowCosts, Unit


def units_of(groups: list[tuple[int, list[int]]]) -> list[Unit]:
    found, row = [], 0
    for prompt, lengths in groups:
        found.append(Unit(tuple(range(row, row + len(lengths))), prompt, tuple(lengths)))
        row += len(lengths)
    return found


def loads(found: list[list[list[Unit]]], costs: RowCosts) -> list[float]:
    return [sum(costs.of(u) for batch in batches for u in batch) for batches in found]


groups_of = st.lists(
    st.tuples(st.integers(1, 300), st.lists(st.integers(1, 60), min_size=1, max_size=8)), min_size=1, max_size=14
)


@settings(deadline=None)
@given(groups_of, st.integers(1, 9), st.integers(1, 1500))
def test_each_row_is_computed_once_within_the_budget_and_with_its_prompt(groups, ranks, budget):
    units = units_of(groups)
    found = pack(units, ranks, budget)
    assert len(found) == ranks and len({len(batches) for batches in found}) == 1
    parts = [u for batches in found for batch in batches for u in batch]
    lengths = {row: (u.prompt, n) for u in units for row, n in zip(u.rows, u.lengths, strict=True)}
    assert sorted(row for u in parts for row in u.rows) == sorted(lengths)
    assert all(lengths[row] == (u.prompt, n) for u in parts for row, n in zip(u.rows, u.lengths, strict=True))
    for batch in (b for batches in found for b in batches):
        assert sum(u.tokens for u in batch) <= budget or (len(batch) == 1 and len(batch[0].rows) == 1)


@settings(deadline=None)
@given(groups_of, st.integers(1, 9))
def test_no_rank_is_busier_than_its_share_by_more_than_a_row_with_its_prompt(groups, ranks):
    """Else a part of it would have moved; each part that moved has computed its prompt once more."""
    units, costs = units_of(groups), RowCosts()
    busy = loads(pack(units, ranks, 10**6, costs), costs)
    one = max(costs.of(Unit((0,), u.prompt, (n,))) for u in units for n in u.lengths)
    assert max(busy) - min(busy) <= 2 * one + 2e-3 * max(busy)


def test_groups_that_come_out_even_stay_whole():
    found = pack(units_of([(1000, [64] * 8)] * 8), 4, 16384)
    assert all(len(batches) == 1 and len(batches[0]) == 2 for batches in found)


def test_a_remainder_is_parted_where_that_saves_time():
    """Three groups on two ranks: 1.5 groups and one more prompt each, not 2 and 1."""
    costs = RowCosts(vision=0, pair=0, vision_pair=0)
    busy = loads(pack(units_of([(1000, [200] * 8)] * 3), 2, 10**6, costs), costs)
    assert busy == [2600 + 1800] * 2


def test_a_long_prompt_is_not_computed_twice_for_nothing():
    found = pack(units_of([(5000, [1, 1])]), 2, 10**6)
    assert sorted(len(u.rows) for batches in found for batch in batches for u in batch) == [2]
    assert sorted(map(len, found)) == [1, 1] and [] in [batches[0] for batches in found]


def test_one_rank_fills_micro_batches_to_the_budget():
    (batches,) = pack(units_of([(60, [20, 20])] * 5), 1, 210)
    assert sorted(len(b) for b in batches) == [1, 2, 2]


def test_attention_counts():
    """Twice the tokens in one row cost more than in two rows, by the pairs they make."""
    long, short = Unit((0,), 20_000, (10,)), Unit((0,), 10_000, (10,))
    assert RowCosts().of(long) > 2 * RowCosts().of(short) > 2 * RowCosts(0.4, 0, 0).of(short)
    pairs = RowCosts(vision=0, pair=1, vision_pair=0).of(Unit((0, 1), 100, (10, 4))) - 114
    dense = 100 * 100 / 2 + sum(np.sum(100 + np.arange(n) + 0.5) for n in (10, 4))
    assert pairs == dense
