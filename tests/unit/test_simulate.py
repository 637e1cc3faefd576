"""The simulator: a step's events add up, its model is the pool's and the batcher's, the best split is the best."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from simulate_cases import COSTS, DEMO, GRPO, LENGTHS, PROMPT, grpo, setup_of, simulate_step

from tatar_dist.learner.sharding import shard_groups
from tatar_dist.models.costs import RowCosts
from tatar_dist.plan.plan import resolve
from tatar_dist.plan.simulate.forecast import Simulator, draw_lengths, forecast
from tatar_dist.plan.simulate.step import call_work, calls, learn_work, serve
from tatar_dist.types import Completion, Group, Prompt, Sample, ScoredGroup

FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25000"))  # a thousandth of them, for what takes long
works = st.lists(st.floats(0.01, 10), min_size=1, max_size=40)


@given(works, st.integers(1, 12))
def test_every_call_is_served_once_and_no_engine_waits_while_calls_do(work, engines):
    found = serve(work, engines)
    assert sorted(i for mine in found.calls for i in mine) == list(range(len(work)))
    assert found.busy == pytest.approx(sum(work))
    assert max(max(work), sum(work) / engines) <= found.seconds * (1 + 1e-9)
    assert found.seconds <= sum(work) / engines + max(work) + 1e-9  # Graham's bound of list scheduling (1966)


@given(works, st.integers(1, 12))
def test_one_more_engine_never_makes_the_same_calls_slower(work, engines):
    assert serve(work, engines + 1).seconds <= serve(work, engines).seconds + 1e-9


@given(works, st.integers(1, 12), st.integers(1, 4))
def test_engines_that_share_cores_do_no_more_work_than_the_cores_can(work, engines, cores):
    found = serve(work, engines, lambda busy: min(1.0, cores / busy))
    assert found.seconds >= max(sum(work) / cores, serve(work, engines).seconds) - 1e-9
    assert found.busy >= sum(work) - 1e-9


def test_equal_calls_on_shared_cores_take_their_sum_over_the_cores():
    assert serve([3.0] * 4, 4, lambda busy: min(1.0, 2 / busy)).seconds == pytest.approx(6.0)


def test_a_call_with_more_sequences_than_slots_decodes_in_waves():
    lengths = np.full((2, 4), 10)
    assert list(call_work(lengths, slots=8)) == [1, 10, 80, 2]
    assert list(call_work(lengths, slots=4)) == [1, 20, 80, 2]
    assert call_work(np.array([[1, 1, 1, 9]]), slots=2)[1] == 10  # 1, 1, then 1 and 9 side by side


@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([2, 4, 8]), st.sampled_from([4, 16, 64]), st.booleans())
def test_calls_are_those_of_the_rollout_pool(prompts, engines, group_size, slots, deterministic):
    from tatar_dist.rollout.pool import RolloutPool

    config = replace(DEMO, rollout=replace(DEMO.rollout, max_num_seqs=slots, deterministic=deterministic))
    real = RolloutPool(config, engines, lambda index: None).chunks(range(prompts), group_size)
    setup = setup_of(1, engines, prompts, group_size, max_num_seqs=slots, deterministic=deterministic)
    assert [list(r) for r in calls(setup)] == real


def scored_group(i, lengths):
    completions = tuple(Completion("", tuple(range(n)), (0.0,) * n, "stop") for n in lengths)
    prompt = Prompt(Sample(f"{i:03d}", "set", "iaa", b"", 50.0), "", f"{i:03d}")
    n = len(lengths)
    return ScoredGroup(Group(prompt, (1,) * PROMPT, completions, 0), np.ones(n, bool), {}, np.zeros(n), np.zeros(n))


@settings(deadline=None)
@given(st.integers(1, 12), st.sampled_from([2, 4, 6]), st.integers(1, 200), st.integers(0, 99), st.integers(1, 12))
def test_learner_work_is_that_of_the_batchers_shards(prompts, group_size, budget, seed, ranks):
    assume(ranks <= prompts * group_size)
    lengths = np.random.default_rng(seed).integers(1, 30, (prompts, group_size))
    groups = [scored_group(i, row) for i, row in enumerate(lengths.tolist())]
    budget += PROMPT
    shards = shard_groups(groups, ranks, [np.ones(group_size)] * prompts, budget, RowCosts())
    shards = [[[r for r in batch if not r.filler] for batch in shard] for shard in shards]

    def slowest(what):
        return sum(max(map(what, batches)) for batches in zip(*shards, strict=True))

    tokens = slowest(lambda batch: sum(len(r.completion_ids) for r in batch))
    images, rows = slowest(lambda batch: len({r.image_id for r in batch})), slowest(len)
    work = learn_work(setup_of(ranks, 1, prompts, group_size, micro_tokens=budget), lengths)
    n = len(shards[0])
    assert work.tolist() == pytest.approx([1, n, rows, images, tokens, n * (1 - 1 / ranks)])


def test_with_staleness_the_longer_of_generating_and_learning_makes_the_step():
    lengths = np.full((4, 4), 100)
    turns, beside = (simulate_step(COSTS, setup_of(2, 2, staleness=k), lengths) for k in (0, 1))
    assert (turns.generate, turns.learn) == (beside.generate, beside.learn)
    shorter = min(turns.generate + turns.reward, turns.learn)
    assert beside.step == pytest.approx(turns.step - shorter)
    stale = replace(GRPO, grpo=replace(GRPO.grpo, staleness=1))
    apart = [Simulator(c, COSTS).predict(4, 4, "disaggregated") for c in (GRPO, stale)]
    assert apart[1].step_seconds < apart[0].step_seconds and apart[1].parts == apart[0].parts
    assert Simulator(stale, COSTS).splits(8, "colocated") == []


def test_a_step_with_equal_lengths_has_the_closed_form():
    found = simulate_step(COSTS, setup_of(learners=2, engines=2, bucket_mib=1000), np.full((4, 4), 100))
    # an engine: one call of 2 prompts, 100 decode steps, 800 tokens; a rank: 8 rows in 2 micro-batches of one group
    assert found.generate == pytest.approx(0.2 + 1.0 + 0.08 + 0.06)
    assert found.learn == pytest.approx(0.5 + 2 * 0.1 + 8 * 0.02 + 2 * 0.05 + 800 * 1e-4 + 2 * 0.2 / 2)
    assert found.sync == pytest.approx(0.05 + 0.5 * 2 * 2.0 + 0.5 * 0.5)
    assert found.reward == pytest.approx(0.01 + 16e-4)
    assert found.other == pytest.approx(0.02 + 16e-4)
    assert found.step == pytest.approx(found.generate + found.learn + found.sync + found.reward + found.other)
    assert found.engines_busy == pytest.approx(2 * found.generate)


def test_processes_on_shared_cores_have_their_threads_and_take_turns():
    lengths = np.full((4, 4), 100)
    one_thread = simulate_step(COSTS, setup_of(1, 1, cores=1), lengths)
    two_threads = simulate_step(COSTS, setup_of(1, 1, cores=2), lengths)
    assert two_threads.generate == pytest.approx(one_thread.generate * (0.4 + 0.6 / 2))
    assert two_threads.learn == pytest.approx(one_thread.learn * (0.3 + 0.7 / 2))
    four = simulate_step(COSTS, setup_of(4, 4, cores=2), lengths)  # twice as many as cores: half as fast
    own = simulate_step(COSTS, setup_of(4, 4), lengths)
    assert four.generate == pytest.approx(2 * own.generate)
    assert four.learn == pytest.approx(2 * own.learn)


def test_long_answers_last_leave_engines_idle():
    setup = setup_of(1, 2)
    mixed, sorted_ = np.array([[10] * 4, [100] * 4] * 2), np.array([[10] * 4] * 2 + [[100] * 4] * 2)
    even, uneven = (simulate_step(COSTS, setup, x) for x in (mixed, sorted_))
    assert even.engines_busy == pytest.approx(2 * even.generate)
    assert uneven.engines_busy < 0.7 * 2 * uneven.generate


@given(st.integers(1, 16), st.integers(1, 16))
def test_more_engines_never_slow_generation_of_equal_answers(engines, more):
    lengths = np.full((16, 4), 80)
    fewer, many = (simulate_step(COSTS, setup_of(1, e, 16), lengths).generate for e in (engines, engines + more))
    assert many <= fewer + 1e-9


@settings(max_examples=FUZZ_EXAMPLES // 1000)
@given(st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 20), st.sampled_from(["disaggregated", "colocated"]))
def test_shares_are_shares_and_parts_make_the_step(learners, engines, placement):
    p = Simulator(GRPO, replace(COSTS, switch=0.7)).predict(learners, engines, placement)
    assert all(0 <= share <= 1 for share in (p.rollout_idle, p.learner_idle, p.gpu_idle))
    assert sum(p.parts.values()) == pytest.approx(p.step_seconds)
    assert p.step_p95 >= p.step_seconds * 0.99
    assert p.gpus == (max(learners, engines) if placement == "colocated" else learners + engines)


def test_draws_have_the_measured_lengths_by_task_and_are_the_same_every_time():
    config = setup_of(1, 1, prompts=8, group_size=5).config
    found = draw_lengths(COSTS, config)
    assert found.shape[1:] == (8, 5)
    assert set(np.unique(found[:, :4])) == {n for g in LENGTHS["iqa"] for n in g}
    assert set(np.unique(found[:, 4:])) == {n for g in LENGTHS["iaa"] for n in g}
    assert all(set(group) <= set(LENGTHS["iqa"][0]) or set(group) <= set(LENGTHS["iqa"][1]) for group in found[0, :4])
    assert (found == draw_lengths(COSTS, config)).all()


@pytest.mark.parametrize("placement", ["disaggregated", "colocated"])
@pytest.mark.parametrize("gpus", [2, 5, 12, 24])
def test_the_best_split_is_the_best_of_all(placement, gpus):
    config = grpo("grpo.prompts_per_step=10", "grpo.group_size=4")
    simulator = Simulator(config, COSTS)
    every = [
        simulator.predict(learners, engines, placement).step_seconds
        for learners in range(1, gpus + 1)
        if 40 % learners == 0
        for engines in range(1, 1 + (learners if placement == "colocated" else gpus - learners))
    ]
    found = simulator.best(gpus, placement)
    assert found.step_seconds == pytest.approx(min(every))
    assert found.gpus <= gpus


def test_colocated_splits_are_those_that_a_run_accepts():
    for tp in (1, 2):
        config = grpo(f"rollout.tensor_parallel={tp}")
        splits = Simulator(config, COSTS).splits(16, "colocated")
        assert bool(splits) == (tp == 1)
        for learners, engines in splits:
            words = [f"cluster.learners={learners}", f"rollout.engines={engines}", "cluster.nodes=2"]
            resolve(grpo(*words, "cluster.placement=colocated", "rollout.push=cuda_ipc"), "grpo")


def test_more_gpus_never_make_the_best_step_longer():
    rows = forecast(GRPO, COSTS)["table"]
    placements = ("disaggregated", "colocated")
    steps = [min(row[name]["step_seconds"] for name in placements if row[name]) for row in rows]
    assert [row["gpus"] for row in rows] == [1 << k for k in range(11)]
    assert all(b <= a + 1e-9 for a, b in zip(steps, steps[1:], strict=False))


def test_sides_that_work_at_once_have_half_of_the_cores_each():
    lengths = np.full((4, 4), 100)
    turns, beside = (simulate_step(COSTS, setup_of(1, 1, cores=4, staleness=k), lengths) for k in (0, 1))
    two = simulate_step(COSTS, setup_of(1, 1, cores=2), lengths)
    assert (beside.generate, beside.learn) == (two.generate, two.learn) > (turns.generate, turns.learn)
