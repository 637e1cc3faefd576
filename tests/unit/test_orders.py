"""Orders of an epoch: permutations drawn from a key."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from tatar_dist.data.pool_cursor import WINDOW, block_permutation, permutation

LARGE = 69_053


@pytest.mark.parametrize("n", [1, 2, 3, 255, 256, 257, 1 << 16, (1 << 16) + 1, 1 << 17, (1 << 17) + 1])
def test_every_position_has_its_own_row(n):
    assert np.array_equal(np.sort(permutation(n, (1, "set", 0))), np.arange(n))


def test_the_order_is_the_same_on_every_machine():
    assert permutation(10, (0, "koniq-10k", 0)).tolist() == [9, 0, 2, 6, 3, 5, 8, 1, 7, 4]
    assert permutation(10_000_000, (0, "ava", 1))[:5].tolist() == [340936, 9697982, 6160087, 5182632, 1909739]


def test_checkpoints_of_older_versions_mean_the_same_order():  # up to 65,536 rows or by blocks
    order = permutation(65_536, (0, "ava", 1))
    assert order[:5].tolist() == [6805, 24098, 56340, 53173, 33911] and order[-1] == 45232
    order = block_permutation(np.full(40, 2048), (0, "ava", 1))
    assert order[:5].tolist() == [70975, 66248, 50920, 61505, 50306] and order[-1] == 4616


def test_another_seed_data_set_or_epoch_gives_another_order():
    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    starts = {tuple(permutation(LARGE, key)[:8].tolist()) for key in keys}
    assert len(starts) == 4


def test_rows_are_uniform_at_a_position_and_independent_of_it():
    first = np.array([permutation(2000, (k,))[7] for k in range(3000)])
    assert chisquare(np.histogram(first, 20, (0, 2000))[0]).pvalue > 1e-4
    order = permutation(LARGE, (9,)).astype(np.int64)
    limit = 4 / np.sqrt(LARGE)  # four standard deviations of a correlation of independent numbers
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < limit
    assert abs(np.corrcoef(order, np.arange(LARGE))[0, 1]) < limit
    side_by_side = np.sum(np.abs(np.diff(order)) == 1)  # by chance twice, Poisson: over 15 times in 10^9 draws
    assert side_by_side <= 15


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(0, 99))
def test_a_block_order_shows_every_row_and_touches_few_blocks_at_a_time(sizes, key):
    sizes = np.array(sizes)
    rows = block_permutation(sizes, (key,))
    assert np.array_equal(np.sort(rows), np.arange(sizes.sum()))
    blocks = np.searchsorted(np.cumsum(sizes), rows, side="right")
    last = {b: i for i, b in enumerate(blocks)}
    first = {b: i for i, b in reversed(list(enumerate(blocks)))}
    open_blocks = [sum(first[b] <= i <= last[b] for b in first) for i in range(len(rows))]
    assert max(open_blocks) <= WINDOW


def test_a_block_order_mixes_rows_within_its_windows_and_blocks_over_the_epoch():
    rows = block_permutation(np.full(40, 256), (3,))
    window = rows[: 256 * WINDOW] // 256
    assert len(set(window)) == WINDOW and len(set(window[:50])) == WINDOW
    assert sorted(set(window)) != list(range(WINDOW))
