"""The completion-level Thurstone reward: its order properties, what may not matter to it, its numerics."""

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.special import expit, ndtr, ndtri

from tatar_dist.algo.advantages import group_std
from tatar_dist.errors import UserError
from tatar_dist.rewards import links
from tatar_dist.rewards.audit import explain
from tatar_dist.rewards.batch import batch_of_rows
from tatar_dist.rewards.pairwise import PairwiseParams, pairwise
from tatar_dist.rewards.presets import load_preset
from tatar_dist.rewards.score import score_batch
from tatar_dist.rewards.terms import GaussianParams, gaussian
from tatar_dist.rewards.thurstone import (
    ThurstoneParams,
    comparison_of,
    gap_weights,
    group_statistics,
    pair_terms,
    reward_of_mean,
    thurstone,
)

LINKS = get_args(links.Link)
FORMS = [(link, measure) for link in LINKS for measure in ("bce", "fidelity", "regret")]
# of METHOD's synthetic batches: sd of groups' errors, sd within a group, in points
SPREADS = ((8, 5), (8, 10), (4, 3), (15, 8))
score = st.floats(0, 100, allow_subnormal=False)


def statistics(q, g, group, pool=None):
    pool = np.zeros(len(q), np.int64) if pool is None else np.asarray(pool)
    return group_statistics(np.asarray(q, float), np.asarray(g, float), np.asarray(group), pool)


def rewards(q, g, group, params, pool=None):
    return thurstone(np.asarray(q, float), statistics(q, g, group, pool), params)


def slow(q, g, group, params, sd=(0.0,) * 99):
    """The formula of the docstring, one pair at a time, with scipy's plain distribution functions."""
    L = expit if params.link == "logistic" else ndtr
    out = []
    for k in range(len(q)):
        total = weight = 0.0
        if math.isnan(q[k]):
            out.append(0.0)
            continue
        mine = [x for x, i in zip(q, group, strict=True) if i == group[k] and not math.isnan(x)]
        for j in sorted(set(group) - {group[k]}):
            theirs = [x for x, i in zip(q, group, strict=True) if i == j and not math.isnan(x)]
            if not theirs:
                continue
            gap = g[k] - g[list(group).index(j)]
            raters = sd[group[k]] ** 2 + sd[j] ** 2 if params.rater_sd else 0
            s = math.sqrt(max(np.var(mine) + np.var(theirs), params.floor**2) + raters)
            t = s if params.scale == "shared" else math.sqrt(params.tau**2 + raters)
            p, prob = L(gap / t), L((q[k] - np.mean(theirs)) / s)
            if params.measure in ("bce", "regret"):
                prob, best = (min(max(x, params.eps), 1 - params.eps) for x in (prob, p))
                r = -(p * math.log(prob) + (1 - p) * math.log(1 - prob))
                if params.measure == "regret":
                    r += p * math.log(best) + (1 - p) * math.log(1 - best)
            else:
                r = math.sqrt(p * prob) + math.sqrt((1 - p) * (1 - prob))
            w = math.exp(-abs(gap) / params.m)
            total, weight = total + w * r, weight + w
        if not weight:
            out.append(0.0)
        elif params.measure == "bce":
            out.append(min(max(1 - total / weight / -math.log(params.eps), 0), 1))
        elif params.measure == "regret":
            out.append(math.exp(-total / weight / params.kappa))
        else:
            out.append(min(max(total / weight, 0), 1))
    return out


@pytest.mark.parametrize("scale", ["tau", "shared"])
@pytest.mark.parametrize(("link", "measure"), FORMS)
def test_the_blocks_equal_the_formula_written_pair_by_pair(link, measure, scale):
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat(np.arange(9), rng.integers(1, 7, 9)))
    g = rng.uniform(0, 100, 9)[group]
    q = np.clip(g + rng.normal(0, 15, len(g)), 0, 100)
    q[rng.random(len(q)) < 0.2] = np.nan
    params = ThurstoneParams(link=link, measure=measure, scale=scale)
    np.testing.assert_allclose(rewards(q, g, group, params), slow(q, g, group, params), rtol=0, atol=1e-9)
    params = ThurstoneParams(link=link, measure=measure, scale=scale, rater_sd=True)
    sd = rng.uniform(0, 20, 9)
    unsure = group_statistics(q, g, group, np.zeros(len(q), np.int64), sd[group])
    np.testing.assert_allclose(thurstone(q, unsure, params), slow(q, g, group, params, sd), rtol=0, atol=1e-9)
    assert (rewards(q, g, group, params) == rewards(q, g, group, replace(params, rater_sd=False))).all()


@pytest.mark.parametrize(("link", "measure"), FORMS)
@given(low=st.floats(0, 99), gap=st.floats(1, 100), size=st.integers(1, 4), sd=st.floats(0, 25))
@settings(max_examples=60, deadline=None)
def test_with_collapsed_groups_exact_beats_a_tie_and_a_tie_beats_the_reversed_order(link, measure, low, gap, size, sd):
    high = low + gap
    assume(high <= 100)
    g = np.repeat([low, high], size)
    group = np.repeat([0, 1], size)
    params = ThurstoneParams(link=link, measure=measure, rater_sd=True)
    pool = np.zeros(2 * size, np.int64)
    exact, tie, reversed_order = (
        thurstone(q, group_statistics(q, g, group, pool, sd), params)
        for q in (g, np.full(2 * size, (low + high) / 2), np.repeat([high, low], size))
    )
    assert (exact > tie).all() and (tie > reversed_order).all()


@pytest.mark.parametrize(("link", "measure"), FORMS)
@given(gap=st.floats(-40, 40), scale=st.floats(8, 40))
@settings(max_examples=40, deadline=None)
def test_a_pair_is_unimodal_in_the_score_with_its_peak_at_the_matching_probability(link, measure, gap, scale):
    params = ThurstoneParams(link=link, measure=measure)
    p, not_p = links.probabilities(np.array([gap / params.tau]), link)
    peak = gap / params.tau if link == "logistic" else float(ndtri(p[0])) if gap <= 0 else -float(ndtri(not_p[0]))
    q = np.sort(np.append(np.linspace(-4, 4, 81) * scale, peak * scale))
    r = pair_terms(p, not_p, q / scale, params)
    r = r if measure == "fidelity" else reward_of_mean(r, params)
    top = int(np.searchsorted(q, peak * scale))
    assert (np.diff(r[: top + 1]) >= -1e-12).all() and (np.diff(r[top:]) <= 1e-12).all()
    assert r[top] >= r.max() - 1e-12
    if abs(peak) < 3:  # away from the clamp the peak is strict
        assert r[top] > r[max(top - 3, 0)] and r[top] > r[min(top + 3, len(r) - 1)]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_rewards_are_finite_in_range_and_do_not_depend_on_the_order_of_rows(data):
    link, measure = data.draw(st.sampled_from(FORMS))
    n = data.draw(st.integers(1, 14))
    group = np.unique(data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n)), return_inverse=True)[1]
    g = np.array(data.draw(st.lists(score, min_size=6, max_size=6)))[group]
    q = np.array(data.draw(st.lists(score | st.just(math.nan), min_size=n, max_size=n)))
    params = ThurstoneParams(link=link, measure=measure)
    r = rewards(q, g, group, params)
    assert np.isfinite(r).all() and (r >= 0).all() and (r <= 1).all() and (r[np.isnan(q)] == 0).all()
    order = np.array(data.draw(st.permutations(range(n))))
    np.testing.assert_allclose(rewards(q[order], g[order], group[order], params), r[order], rtol=0, atol=1e-12)
    relabel = np.array(data.draw(st.permutations(range(group.max() + 1))))
    np.testing.assert_allclose(rewards(q, g, relabel[group], params), r, rtol=0, atol=1e-12)


@pytest.mark.parametrize("link", LINKS)
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_with_a_shared_scale_the_best_answer_is_the_target_at_any_spread(link, data):
    """One answer of 0, 1, ... 100 beside siblings that scatter; the other groups' means are their targets."""
    target = data.draw(st.integers(10, 90))
    others = target + np.array(data.draw(st.lists(st.integers(-24, 24), min_size=2, max_size=6)), float)
    spread = data.draw(st.floats(0, 20))
    params = ThurstoneParams(link=link, measure="regret", scale="shared", eps=1e-12)
    q, g, group = (np.concatenate([x, y]) for x, y in (
        ([target - spread, target + spread], np.concatenate([others - spread, others + spread])),
        ([target] * 2, np.concatenate([others] * 2)),
        ([0] * 2, np.tile(np.arange(1, len(others) + 1), 2)),
    ))  # fmt: skip
    groups = statistics(q, g, group)
    answers = np.arange(101.0)
    r = comparison_of(0, np.arange(len(others) + 1), groups, params).rewards(answers, params)
    assert r.argmax() == target and r[target] == pytest.approx(1, abs=1e-12)
    assert (np.diff(r[: target + 1]) >= -1e-12).all() and (np.diff(r[target:]) <= 1e-12).all()


def test_with_tau_as_the_scale_answers_that_scatter_are_drawn_apart():
    params = ThurstoneParams(measure="regret")
    q, g, group = [18.0, 42, 43, 67, 68, 92], [30.0, 30, 55, 55, 80, 80], [0, 0, 1, 1, 2, 2]
    groups, answers = statistics(q, g, group), np.arange(101.0)
    best = [int(comparison_of(i, np.arange(3), groups, params).rewards(answers, params).argmax()) for i in (0, 2)]
    assert best[0] < 20 and best[1] > 90


def batch_of(bias, within, rng):
    """8 images, 8 completions each: scores of one model whose groups are off by `bias`, and scatter by `within`."""
    group = np.repeat(np.arange(8), 8)
    g = rng.uniform(0, 100, 8)
    q = np.clip(g[group] + rng.normal(0, bias, 8)[group] + rng.normal(0, within, 64), 0, 100)
    return q, g[group], group


@pytest.mark.parametrize(("bias", "within"), SPREADS)
def test_regret_spreads_within_a_group_as_a_gaussian_does_and_bce_does_not(bias, within):
    rng, spread = np.random.default_rng(0), {"regret": [], "bce": [], "gaussian": []}
    for _ in range(200):
        q, g, group = batch_of(bias, within, rng)
        iaa, words = np.zeros(64, bool), np.zeros(64)
        spread["gaussian"].append(group_std(gaussian(q, g, iaa, words, GaussianParams()), group).mean())
        for measure in ("regret", "bce"):
            params = ThurstoneParams(measure=measure, scale="shared" if measure == "regret" else "tau")
            spread[measure].append(group_std(rewards(q, g, group, params), group).mean())
    mean = {name: np.mean(values) for name, values in spread.items()}
    assert 1 / 3 < mean["regret"] / mean["gaussian"] < 3
    assert mean["bce"] / mean["gaussian"] < 0.1


@given(st.floats(2, 40), st.floats(-30, 30))
@settings(max_examples=60, deadline=None)
def test_regret_does_not_depend_on_the_entropy_of_the_opinions(gap, error):
    """BCE pays an exact answer less the nearer the targets are; regret pays 1 at any gap."""
    g, group = [40.0, 40.0 + gap], [0, 1]
    exact = rewards(g, g, group, ThurstoneParams(measure="regret", scale="shared"))
    assert exact == pytest.approx([1, 1], abs=1e-12)
    moved = rewards([g[0] + error, g[1] + error], g, group, ThurstoneParams(measure="regret", scale="shared"))
    assert moved == pytest.approx([1, 1], abs=1e-9), "both are as far apart as the opinions say"
    bce = [rewards([40.0, 40.0 + x], [40.0, 40.0 + x], group, ThurstoneParams())[0] for x in (1, gap)]
    assert bce[1] > bce[0]


def test_siblings_are_no_opponents():
    params = ThurstoneParams()
    alone = ([10.0, 90.0], [50.0, 50.0], [0, 0])
    assert (rewards(*alone, params) == 0).all() and statistics(*alone).unrankable.all()
    # A sibling acts only through the group's variance: where the floor holds, not at all.
    a = rewards([60.0, 61.0, 40.0], [70.0, 70.0, 40.0], [0, 0, 1], params)
    b = rewards([60.0, 63.0, 40.0], [70.0, 70.0, 40.0], [0, 0, 1], params)
    assert a[0] == b[0] and a[2] != b[2]


def test_other_pools_do_not_matter():
    params = ThurstoneParams()
    one = rewards([60.0, 40.0], [70.0, 30.0], [0, 1], params)
    two = rewards([60.0, 40.0, 5.0, 99.0], [70.0, 30.0, 99.0, 5.0], [0, 1, 2, 3], params, [0, 0, 1, 1])
    np.testing.assert_array_equal(two[:2], one)


def test_an_unparsed_row_gets_nothing_and_does_not_move_its_group():
    params = ThurstoneParams()
    g, group = [70.0, 70.0, 70.0, 30.0], [0, 0, 0, 1]
    with_hole = rewards([60.0, math.nan, 70.0, 40.0], g, group, params)
    without = rewards([60.0, 70.0, 40.0], [70.0, 70.0, 30.0], [0, 0, 1], params)
    assert with_hole[1] == 0
    np.testing.assert_array_equal(with_hole[[0, 2, 3]], without)


def test_a_group_without_a_parsed_row_is_no_opponent_and_a_pool_left_with_one_cannot_rank():
    params = ThurstoneParams()
    three = ([60.0, math.nan, 40.0], [70.0, 50.0, 30.0], [0, 1, 2])
    np.testing.assert_array_equal(rewards(*three, params)[[0, 2]], rewards([60.0, 40.0], [70.0, 30.0], [0, 1], params))
    assert not statistics(*three).unrankable.any()
    lonely = ([60.0, math.nan], [70.0, 50.0], [0, 1])
    assert (rewards(*lonely, params) == 0).all() and statistics(*lonely).unrankable.tolist() == [True, False]


def test_nearer_targets_weigh_more_and_tiny_m_does_not_underflow():
    w = gap_weights(np.array([[1.0, 10.0, 90.0]]), np.array([[True, True, False]]), 12.0)[0]
    assert w[0] > w[1] > w[2] == 0 and w.sum() == pytest.approx(1)
    assert w[1] / w[0] == pytest.approx(math.exp(-9 / 12))
    assert gap_weights(np.array([[50.0, 90.0]]), np.ones((1, 2), bool), 1e-3)[0].tolist() == [1.0, 0.0]


def test_a_floor_under_tau_is_refused_except_in_released():
    with pytest.raises(UserError, match="floor=4 is under tau=8"):
        load_preset("paper", params={"thurstone_floor": 4})
    with pytest.raises(UserError, match="floor is null"):
        load_preset("tatar", params={"thurstone_floor": None})
    assert load_preset("released").thurstone.floor is None
    assert load_preset("paper", params={"thurstone_tau": 4}).thurstone.tau == 4
    with pytest.raises(UserError, match="thurstone_tau has no effect where thurstone's scale is shared"):
        load_preset("tatar", params={"thurstone_tau": 4})
    assert load_preset("tatar", params={"thurstone_tau": 4, "thurstone_scale": "tau"}).thurstone.tau == 4


def test_without_the_floor_a_right_order_of_collapsed_groups_would_score_below_a_tie():
    released = load_preset("released").thurstone
    g, group = [60.0, 55.0], [0, 1]
    right = rewards([61.0, 56.0], g, group, released)
    tie = rewards([58.0, 58.0], g, group, released)
    assert (right < tie).all()


def test_blocks_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(1)
    group = np.repeat(np.arange(20), 5)
    g, q = rng.uniform(0, 100, 20)[group], rng.uniform(0, 100, 100)
    whole = rewards(q, g, group, ThurstoneParams())
    monkeypatch.setattr("tatar_dist.rewards.thurstone.BLOCK", 7)
    np.testing.assert_allclose(rewards(q, g, group, ThurstoneParams()), whole, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("link", "measure"), FORMS)
def test_the_explained_opponents_add_up_to_the_reward(link, measure):
    rng = np.random.default_rng(2)
    group = np.repeat(np.arange(5), 3)
    g, q = rng.uniform(0, 100, 5)[group], rng.uniform(0, 100, 15)
    rows = [
        {"group_id": j, "task": "iaa", "dataset": "d", "target": t, "completion": f"<answer>{a}</answer>"}
        for j, t, a in zip(group.tolist(), g.tolist(), q.tolist(), strict=True)
    ]
    batch, preset = (
        batch_of_rows(rows),
        load_preset("tatar", None, {"thurstone_link": link, "thurstone_measure": measure}),
    )
    scored = score_batch(batch, preset)
    table = explain(batch, scored.answers, preset, 4)
    assert {o.group_id for o in table} == {"0", "2", "3", "4"}
    total = sum(o.weight * o.reward for o in table)
    total = math.exp(-total / preset.thurstone.kappa) if measure == "regret" else total
    assert total == pytest.approx(scored.terms["thurstone"][4], abs=1e-12)


@given(st.floats(-1e6, 1e6), st.sampled_from(LINKS))
def test_links_are_complementary_finite_and_precise_in_the_tail(z, link):
    q, not_q = links.probabilities(np.array([z]), link)
    assert q[0] + not_q[0] == pytest.approx(1) and 0 <= q[0] <= 1
    plain = expit if link == "logistic" else ndtr
    if abs(z) < 30:
        assert q[0] == pytest.approx(plain(z), rel=1e-12)
        assert not_q[0] == pytest.approx(plain(-z), rel=1e-12)


def test_pairwise_compares_different_images_of_one_data_set_only():
    q, g = np.array([60.0, 61.0, 40.0, 80.0]), np.array([70.0, 70.0, 30.0, 20.0])
    group, pool = np.array([0, 0, 1, 2]), np.array([0, 0, 0, 1])
    r = pairwise(q, g, group, pool, PairwiseParams())
    p, z = expit(40 / 8), 20 / 8
    assert r[0] == pytest.approx(1 - (np.logaddexp(0, z) - p * z) / -math.log(1e-4), abs=1e-12)
    assert r[3] == 0  # alone in its data set
    released = pairwise(q, g, group, np.zeros(4, np.int64), PairwiseParams(siblings=True))
    assert released[3] > 0 and released[0] != r[0]
