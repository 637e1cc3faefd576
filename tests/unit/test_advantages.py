"""Group advantages against their definition, whatever the order of rows."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tatar_dist.algo.advantages import MODES, contributions, group_std, shares
from tatar_dist.errors import UserError
from tatar_dist.rewards.metrics import ShareWatch

reward = st.floats(-10, 10)


def advantages(*args, **kwargs):
    return np.sum([*contributions(*args, **kwargs).values()], axis=0)


def group_advantage(r, group, mode="std"):
    return advantages({"r": r}, {"r": 1.0}, group, mode)


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


def reference(terms, weights, group, mode, eps, scale):
    """The formulas of the docstring, one group and one row at a time: what each term adds."""
    parts = {t: np.zeros(len(group)) for t in weights}
    rows_of = {g: [i for i, x in enumerate(group) if x == g] for g in set(group.tolist())}
    for rows in rows_of.values():
        values = {t: [0.0 if math.isnan(terms[t][i]) else terms[t][i] for i in rows] for t in weights}
        total = [sum(weights[t] * values[t][n] for t in weights) for n in range(len(rows))]
        for t, w in weights.items():
            scaled = values[t] if mode == "per_term" else total
            if len(rows) == 1 or max(scaled) == min(scaled):
                continue
            std = statistics.stdev(scaled) + eps
            divisor = 1.0 if mode == "mean" or (mode == "std" and scale == "batch") else std
            for n, i in enumerate(rows):
                parts[t][i] = w * (values[t][n] - statistics.fmean(values[t])) / divisor
    if scale == "batch":
        sums = [sum(parts[t][i] for t in weights) for i in range(len(group))]
        live = [sums[i] for rows in rows_of.values() for i in rows if len({round(sums[j], 9) for j in rows}) > 1]
        parts = {t: part / (statistics.stdev(live) + eps) for t, part in parts.items()}
    return parts


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("mode", MODES)
def test_what_terms_add_is_the_formula_and_their_shares_are_covariances(mode, scale):
    rng = np.random.default_rng(0)
    group = np.unique(rng.integers(0, 7, 40), return_inverse=True)[1]
    terms = {"a": rng.normal(0, 5, 40), "b": rng.uniform(0, 0.01, 40), "flat": np.ones(40)}
    terms["b"][group == 2] = np.nan  # another task's
    weights = {"a": 0.5, "b": 2.0, "flat": 3.0}
    parts = contributions(terms, weights, group, mode, 1e-4, scale)
    expected = reference(terms, weights, group, mode, 1e-4, scale)
    for name in weights:
        np.testing.assert_allclose(parts[name], expected[name], rtol=1e-9, atol=1e-12)
    assert not parts["flat"].any()
    rows = np.flatnonzero(group < 4)
    a = sum(parts.values())[rows]
    for name, share in shares(parts, rows, group).items():
        assert share == pytest.approx(np.cov(parts[name][rows], a)[0, 1] / a.var(ddof=1), rel=1e-9, abs=1e-12)
    assert sum(shares(parts, rows, group).values()) == pytest.approx(1)
    if scale == "batch":
        assert sum(parts.values()).std(ddof=1) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("mode", ["std", "per_term"])
def test_silent_groups_and_lone_rows_do_not_move_the_scale_of_the_batch(mode):
    terms, group = {"a": np.array([1.0, 2.0, 4.0, 3.0, 3.0, 5.0])}, np.array([0, 0, 0, 1, 1, 2])
    alone = contributions({"a": terms["a"][:3]}, {"a": 1.0}, group[:3], mode, 1e-4, "batch")["a"]
    found = contributions(terms, {"a": 1.0}, group, mode, 1e-4, "batch")["a"]
    np.testing.assert_allclose(found, [*alone, 0, 0, 0], rtol=1e-12)
    for n in (0, 1, 3):
        assert not contributions({"a": np.ones(n)}, {"a": 1.0}, np.zeros(n, int), mode, 0.0, "batch")["a"].any()


def test_an_unknown_scale_is_refused():
    with pytest.raises(UserError, match="advantage scale 'bacth': must be one of group, batch"):
        contributions({}, {}, np.zeros(0, np.int64), "std", 1e-4, "bacth")


def test_among_parsed_answers_a_term_that_tells_them_apart_has_its_share():
    group = np.zeros(6, int)
    parsed = np.arange(5)
    terms = {"format": np.array([1, 1, 1, 1, 1, 0.0]), "t": np.array([0.95, 0.96, 0.97, 0.94, 0.95, 0.0])}
    parts = contributions(terms, {"format": 1.0, "t": 1.0}, group)
    assert shares(parts, np.arange(6), group)["t"] < 0.6
    assert shares(parts, parsed, group)["t"] == pytest.approx(1)


def test_without_an_advantage_there_is_no_share():
    parts = contributions({"a": np.ones(4)}, {"a": 1.0}, np.array([0, 0, 1, 1]))
    assert math.isnan(shares(parts, np.arange(4), np.array([0, 0, 1, 1]))["a"])


def share_metrics(task="iaa", **shares):
    return {f"reward/share_parsed/{name}/{task}": value for name, value in shares.items()}


def test_a_scoring_term_that_hardly_trains_is_named_once():
    low = share_metrics(thurstone=0.05, length=0.95, format=0.0)
    watch = ShareWatch("std")
    assert [watch.add(low) for _ in range(19)] == [{}] * 19
    assert watch.add(low | share_metrics(thurstone=math.nan)) == {}, "a step without an advantage says nothing"
    assert watch.add(low) == {
        "iaa": "for 20 steps thurstone had less than 20% of the IAA advantage among parsed answers (now 5%), "
        "length has 95%: set grpo.advantage=per_term, or lower reward.weights.length"
    }
    assert watch.add(low) == {}
    watch.add(low | share_metrics(thurstone=0.5))
    assert not any(watch.add(low) for _ in range(19)) and watch.add(low)  # counted anew
    assert not any(watch.add(share_metrics("iqa", length=1.0)) for _ in range(30))  # nothing looks at the score
    assert not any(watch.add(share_metrics(thurstone=0.1, mine=0.5, length=0.4)) for _ in range(30))  # the user's does
    scaled = ShareWatch("per_term")
    (line,) = [found["iaa"] for _ in range(20) if (found := scaled.add(low))]
    assert line.endswith("length has 95%: lower reward.weights.length")
