"""Group advantages against their definition, whatever the order of rows."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tatar_dist.algo.advantages import MODES, advantages, group_advantage, group_std
from tatar_dist.errors import UserError

reward = st.floats(-10, 10)


def test_std_mode_is_the_unbiased_z_score_of_each_group():
    r, group = np.array([1.0, 5.0, 2.0, 6.0, 3.0, 9.0]), np.array([0, 1, 0, 1, 0, 1])
    a = group_advantage(r, group)
    for g in (0, 1):
        x = r[group == g]
        np.testing.assert_allclose(a[group == g], (x - x.mean()) / (x.std(ddof=1) + 1e-4), rtol=1e-12)


def test_mean_mode_keeps_the_scale():
    np.testing.assert_allclose(group_advantage(np.array([1.0, 3.0]), np.array([0, 0]), "mean"), [-1.0, 1.0])


@pytest.mark.parametrize("mode", ["std", "mean"])
def test_a_group_of_equal_rewards_or_of_one_row_gets_exactly_0(mode):
    r = np.array([0.1 + 0.2, 0.1 + 0.2, 0.1 + 0.2, 7.0])
    assert (group_advantage(r, np.array([0, 0, 0, 1]), mode) == 0).all()
    assert (group_std(r, np.array([0, 0, 0, 1])) == 0).all()


def test_per_term_gives_a_small_range_term_the_same_say():
    terms = {"wide": np.array([0.0, 1.0, 0.0, 1.0]), "narrow": np.array([0.90, 0.90, 0.93, 0.93])}
    weights, group = {"wide": 1.0, "narrow": 1.0}, np.zeros(4, np.int64)
    summed, per_term = (advantages(terms, weights, group, mode) for mode in ("std", "per_term"))
    assert summed[1] > summed[2] + 1  # the wide term drowns the narrow one
    assert per_term[1] == pytest.approx(per_term[2], abs=0.01)


@pytest.mark.parametrize("mode", MODES)
def test_a_term_that_does_not_apply_adds_nothing(mode):
    group = np.array([0, 0, 1, 1])
    a = advantages({"t": np.array([1.0, 2.0, np.nan, np.nan])}, {"t": 1.0}, group, mode)
    assert a[0] < 0 < a[1] and (a[2:] == 0).all()


def test_an_unknown_mode_is_refused():
    with pytest.raises(UserError, match="must be one of std, mean, per_term"):
        advantages({}, {}, np.zeros(0, np.int64), "zscore")


@given(st.lists(st.tuples(st.integers(0, 3), reward), min_size=1, max_size=20), st.data())
def test_advantages_are_finite_centred_and_follow_their_rows(rows, data):
    group = np.unique([g for g, _ in rows], return_inverse=True)[1]
    r = np.array([x for _, x in rows])
    a = group_advantage(r, group)
    assert np.isfinite(a).all()
    assert np.abs(np.bincount(group, weights=a)).max() < 1e-6
    assert np.abs(a).max() <= math.sqrt(len(r))
    order = np.array(data.draw(st.permutations(range(len(r)))))
    np.testing.assert_allclose(group_advantage(r[order], group[order]), a[order], rtol=0, atol=1e-9)
