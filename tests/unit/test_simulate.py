"""The simulator: a step's events add up, its model is the pool's and the batcher's, the best split is the best."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tatar_dist.cli import main
from tatar_dist.config import load_config, to_yaml
from tatar_dist.errors import UserError
from tatar_dist.learner.packing import Costs as TokenCosts
from tatar_dist.learner.sharding import shard_groups
from tatar_dist.plan import resolve
from tatar_dist.records import Completion, Group, Prompt, Sample, ScoredGroup
from tatar_dist.simulate.command import costs_from, numbers_of_gpus
from tatar_dist.simulate.costs import (
    Costs,
    EngineCosts,
    LearnerCosts,
    OtherCosts,
    PushCosts,
    RewardCosts,
    read_costs,
)
from tatar_dist.simulate.estimate import estimate
from tatar_dist.simulate.measured import costs_of_runs, fit, read_run
from tatar_dist.simulate.search import Simulator, draw_lengths, forecast
from tatar_dist.simulate.step import Setup, call_work, calls, learn_work, serve, simulate_step

CONFIGS = Path(__file__).parents[2] / "configs"
LENGTHS = {"iqa": ((50, 60, 55), (40, 45, 70)), "iaa": ((150, 160, 190), (170, 200, 180))}
COSTS = Costs(
    lengths=LENGTHS,
    engine=EngineCosts(per_call=0.2, per_step=0.01, per_token=1e-4, per_prompt=0.03, serial=0.4),
    learner=LearnerCosts(0.5, 0.1, 0.02, 0.05, 1e-4, 0.2, serial=0.3),
    reward=RewardCosts(0.01, 1e-4),
    push=PushCosts(0.05, 2.0, 0.5),
    other=OtherCosts(0.02, 1e-4),
    model_gb=0.5,
)


def grpo(*words):
    return load_config([str(CONFIGS / "grpo.yaml")], list(words))


def demo(*words):
    return load_config([str(CONFIGS / "grpo.yaml"), str(CONFIGS / "demo.yaml")], ["output=x", *words])


GRPO, DEMO = grpo(), demo()


def setup_of(learners=1, engines=1, prompts=4, group_size=4, **other):
    return Setup(learners, engines, prompts, group_size, **{"micro_tokens": 400, "max_num_seqs": 64, **other})


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
    return ScoredGroup(Group(prompt, (1,), completions, 0), np.ones(n, bool), {}, np.zeros(n), np.zeros(n))


@settings(deadline=None)
@given(st.integers(1, 12), st.sampled_from([2, 4, 6]), st.integers(1, 200), st.integers(0, 99), st.integers(1, 12))
def test_learner_work_is_that_of_the_batchers_shards(prompts, group_size, budget, seed, ranks):
    assume(ranks <= prompts * group_size)
    lengths = np.random.default_rng(seed).integers(1, 30, (prompts, group_size))
    groups = [scored_group(i, row) for i, row in enumerate(lengths.tolist())]
    shards = shard_groups(groups, ranks, [np.ones(group_size)] * prompts, budget, TokenCosts())
    shards = [[[r for r in batch if not r.filler] for batch in shard] for shard in shards]

    def slowest(what):
        return sum(max(map(what, batches)) for batches in zip(*shards, strict=True))

    tokens = slowest(lambda batch: sum(len(r.completion_ids) for r in batch))
    images, rows = slowest(lambda batch: len({r.image_id for r in batch})), slowest(len)
    work = learn_work(setup_of(ranks, 1, prompts, group_size, micro_tokens=budget, prompt_tokens=1), lengths)
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


@given(st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 20), st.sampled_from(["disaggregated", "colocated"]))
def test_shares_are_shares_and_parts_make_the_step(learners, engines, placement):
    p = Simulator(GRPO, replace(COSTS, switch=0.7)).predict(learners, engines, placement)
    assert all(0 <= share <= 1 for share in (p.rollout_idle, p.learner_idle, p.gpu_idle))
    assert sum(p.parts.values()) == pytest.approx(p.step_seconds)
    assert p.step_p95 >= p.step_seconds * 0.99
    assert p.gpus == (max(learners, engines) if placement == "colocated" else learners + engines)


def test_draws_have_the_measured_lengths_by_task_and_are_the_same_every_time():
    setup = setup_of(1, 1, prompts=8, group_size=5)
    found = draw_lengths(COSTS, setup)
    assert found.shape[1:] == (8, 5)
    assert set(np.unique(found[:, :4])) == {n for g in LENGTHS["iqa"] for n in g}
    assert set(np.unique(found[:, 4:])) == {n for g in LENGTHS["iaa"] for n in g}
    assert all(set(group) <= set(LENGTHS["iqa"][0]) or set(group) <= set(LENGTHS["iqa"][1]) for group in found[0, :4])
    assert (found == draw_lengths(COSTS, setup)).all()


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
    rows = forecast(GRPO, COSTS).rows
    steps = [min(p.step_seconds for p in found.values() if p) for _, found in rows]
    assert [n for n, _ in rows] == [1 << k for k in range(11)]
    assert all(b <= a + 1e-9 for a, b in zip(steps, steps[1:], strict=False))


def write_run(path, costs, *words, steps=6, slow=None):
    """A run directory whose steps took what `costs` say, with completions drawn from them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = demo(*words)
    setup = Setup.of(config, config.cluster.learners, config.rollout.engines, costs.cores)
    (path / "rollouts").mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    lines = []
    for step, lengths in enumerate(draw_lengths(costs, setup, draws=steps)):
        t = simulate_step(costs, setup, lengths)
        factor = 10.0 if step == slow else 1.0
        seconds = {name: factor * getattr(t, name) for name in ("generate", "reward", "learn", "sync", "step")}
        sync = {"sync/bytes": costs.model_gb * 1e9 * setup.engines}
        lines.append(json.dumps({"step": step, **{f"time/{k}": v for k, v in seconds.items()}, **sync}) + "\n")
        half = setup.prompts // 2
        rows = [
            {"group_id": f"{p:03d}", "index": i, "task": "iqa" if p < half else "iaa", "tokens": int(n)}
            for p, group in enumerate(lengths)
            for i, n in enumerate(group)
        ]
        pq.write_table(pa.Table.from_pylist(rows[::-1]), path / "rollouts" / f"step_{step:06d}.parquet")
    (path / "metrics.jsonl").write_text("".join(lines))
    return path


def test_costs_from_runs_foretell_a_run_of_other_sizes(tmp_path):
    truth = replace(COSTS, cores=2)
    sizes = [(1, 1, 8), (2, 2, 8), (2, 1, 16), (1, 2, 12)]
    runs = [
        write_run(
            tmp_path / str(i),
            truth,
            f"cluster.learners={learners}",
            f"rollout.engines={engines}",
            f"grpo.prompts_per_step={prompts}",
            "cluster.threads=2",
            slow=4,
        )
        for i, (learners, engines, prompts) in enumerate(sizes)
    ]
    costs = costs_of_runs(runs)
    config = demo("cluster.learners=4", "rollout.engines=3", "grpo.prompts_per_step=12", "cluster.threads=2")
    found, true = (Simulator(config, c, shared_cores=True).predict(4, 3, "disaggregated") for c in (costs, truth))
    assert found.step_seconds == pytest.approx(true.step_seconds, rel=0.08)
    assert found.rollout_idle == pytest.approx(true.rollout_idle, abs=0.05)
    assert costs.model_gb == pytest.approx(0.5)
    assert len(read_run(runs[0]).steps) == 3  # two steps warm up, one was disturbed


def test_the_benchmark_sets_what_was_foretold_beside_what_was_measured(tmp_path):
    from tatar_dist.bench.simulate import CALIBRATION, FORETOLD, compare

    truth, runs = replace(COSTS, cores=2), {}
    for learners, engines, prompts, group in (*CALIBRATION, *FORETOLD):
        path = tmp_path / f"{learners}-{engines}-{prompts}-{group}"
        sizes = [f"cluster.learners={learners}", f"rollout.engines={engines}", f"grpo.prompts_per_step={prompts}"]
        runs[learners, engines, prompts, group] = [
            write_run(path, truth, *sizes, f"grpo.group_size={group}", "cluster.threads=2")
        ]
        path.with_suffix(".load").write_text("0.5")
    found = compare(runs)
    assert [r["calibration"] for r in found["runs"]] == [True] * len(CALIBRATION) + [False] * len(FORETOLD)
    assert found["worst_error"] < 0.1
    for r in found["runs"]:
        assert r["ratio"] == pytest.approx(r["predicted"]["step_seconds"] / r["measured"]["step_seconds"])
        assert r["predicted"]["rollout_idle"] == pytest.approx(r["measured"]["rollout_idle"], abs=0.06)


def test_one_run_is_foretold_as_it_was_and_the_guesses_are_named(tmp_path):
    truth = replace(COSTS, cores=2)
    run = write_run(tmp_path / "run", truth, "cluster.threads=2", steps=12)
    (run / "events.jsonl").write_text(
        '{"time": 10, "event": "phase", "phase": "sync"}\n{"time": 12, "event": "phase", "phase": "checkpoint"}\n'
        '{"time": 13, "event": "checkpoint/saved", "phase": "checkpoint"}\n'
        '{"time": 15.5, "event": "phase", "phase": "generate"}\n'
    )
    costs = costs_of_runs([run])
    found, true = (Simulator(DEMO, c, shared_cores=True).predict(2, 1, "disaggregated") for c in (costs, truth))
    assert found.step_seconds == pytest.approx(true.step_seconds, rel=0.03)
    assert costs.checkpoint == 3.5
    assert any("other rollout.engines" in n for n in costs.notes)
    assert any("other cluster.learners" in n for n in costs.notes)


def test_fit_finds_the_costs_that_made_the_times():
    work = np.array([[1, 2, 0], [1, 5, 0], [1, 9, 0], [1, 4, 0]], float)
    found = fit(np.tile(work, (5, 1)), np.tile(work @ [2.0, 0.5, 7.0], 5))
    assert found == pytest.approx([2.0, 0.5, 0.0], rel=0.1)


def test_seven_billion_parameters_need_four_gpus_and_one_gpu_is_not_enough():
    simulator = Simulator(GRPO, estimate(GRPO))
    assert simulator.best(1, "colocated") is None
    assert simulator.best(2, "disaggregated") is None
    assert min(learners for learners, _ in simulator.splits(8, "disaggregated")) == 4
    assert Simulator(grpo("model.path=Qwen/Qwen2.5-VL-3B-Instruct"), estimate(grpo("model.path=Qwen2.5-VL-3B"))).fits(
        1, "disaggregated"
    )


def test_the_estimate_reads_the_weights_once_a_decode_step():
    costs = estimate(GRPO)
    assert costs.engine.per_step == pytest.approx(8.29e9 * 2 / (3.35e12 * 0.6) + 2e-3)
    assert "nothing measured" in costs.source


def test_plan_simulate_prints_tables_and_its_costs_can_be_given_back(tmp_path, capsys):
    words = ["plan", "--config", str(CONFIGS / "grpo.yaml"), "--simulate", "--gpus", "8,16", "grpo.max_steps=100"]
    assert main([*words, "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert [row["gpus"] for row in found["table"]] == [8, 16]
    assert found["configured"]["run_seconds"] == pytest.approx(
        100 * found["configured"]["step_seconds"] + 2 * found["costs"]["checkpoint"]
    )
    (tmp_path / "times.json").write_text(text)
    assert main([*words, "--times", str(tmp_path / "times.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(words) == 0
    assert "4 learners + 4 engines" in capsys.readouterr().out


MINIMAL = {"lengths": {"iqa": [50], "iaa": [150]}, "engine": {"per_step": 0.02}, "learner": {"per_row": 0.1}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"engin": {}}, "unknown key 'engin'"),
        ({"engine": {"per_stp": 1}}, "unknown key 'per_stp'"),
        ({"engine": {"per_step": -1}}, "engine: per_step"),
        ({"engine": {"per_step": "fast"}}, "must be a number"),
        ({"engine": {"serial": 1.5}}, "at most 1"),
        ({"engine": 3}, "expected keys and values"),
        ({"learner": {"per_row": float("nan")}}, "must be a number"),
        ({"cores": 1.5}, "whole number"),
        ({"lengths": {}}, "by task"),
        ({"lengths": {"iqa": []}}, "whole numbers from 1"),
        ({"lengths": {"iqa": [[10], [0]]}}, "whole numbers from 1"),
        ({"lengths": {"art": [10]}}, "by task"),
    ],
)
def test_a_wrong_file_of_times_is_one_line_that_names_the_key(tmp_path, change, said):
    file = tmp_path / "times.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, **change}))
    with pytest.raises(UserError, match=said):
        read_costs(file)


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    (tmp_path / "times.yaml").write_text("lengths: {iqa: [5]}\nparameters: 8.29e9\nengine: {per_step: 1e-2}\n")
    found = read_costs(tmp_path / "times.yaml")
    assert (found.parameters, found.engine.per_step) == (8.29e9, 0.01)


def test_a_file_of_times_needs_lengths(tmp_path):
    (tmp_path / "times.yaml").write_text("engine: {per_step: 0.02}\n")
    with pytest.raises(UserError, match="lengths"):
        read_costs(tmp_path / "times.yaml")


def test_what_cannot_be_simulated_is_said(tmp_path):
    with pytest.raises(UserError, match="no estimate"):
        costs_from(DEMO, [], None)
    with pytest.raises(UserError, match="of unknown size"):
        costs_from(grpo("model.path=someones/model"), [], None)
    with pytest.raises(UserError, match="give one of them"):
        costs_from(GRPO, [tmp_path], tmp_path)
    with pytest.raises(UserError, match="no run directory"):
        costs_from(GRPO, [tmp_path], None)
    with pytest.raises(UserError, match="whole numbers"):
        numbers_of_gpus("8,many")
    with pytest.raises(UserError, match="at least 1"):
        forecast(GRPO, COSTS, [0])
    with pytest.raises(UserError, match="say nothing about GPUs"):
        forecast(GRPO, replace(COSTS, cores=2))
    with pytest.raises(UserError, match="say nothing about CPUs"):
        forecast(DEMO, COSTS)
    with pytest.raises(UserError, match="takes no time"):
        forecast(GRPO, Costs(lengths=LENGTHS))
    with pytest.raises(UserError, match="of task iaa"):
        forecast(GRPO, replace(COSTS, lengths={"iqa": ((5,),)}))


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--gpus", "8"], "belong to --simulate"), (["--simulate", "--stage", "sft"], "only grpo is simulated")],
)
def test_options_that_do_not_go_together_are_refused(words, said, capsys):
    assert main(["plan", "--config", str(CONFIGS / "grpo.yaml"), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_run_with_other_completions_than_its_config_says_is_refused(tmp_path):
    run = write_run(tmp_path / "run", replace(COSTS, cores=2))
    (run / "config.yaml").write_text(to_yaml(demo("grpo.group_size=4")))
    with pytest.raises(UserError, match="config.yaml says 8 of 4"):
        read_run(run)


def test_a_model_that_no_gpu_holds_is_a_note():
    found = forecast(GRPO, replace(COSTS, parameters=70e9), [8])
    assert found.rows == ((8, {"disaggregated": None, "colocated": None}),)
    assert "no split fits" in found.notes[-1]


@pytest.mark.parametrize("line", ["3", '{"time/generate": 1}', "{"])
def test_lines_of_metrics_that_hold_no_step_are_left_out(tmp_path, line):
    run = write_run(tmp_path / "run", replace(COSTS, cores=2))
    before = costs_of_runs([run])
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + line)
    assert costs_of_runs([run]) == before


def test_a_model_directory_without_sense_is_one_line(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"00")
    for text in ("{", "[]", '{"hidden_size": 8}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json: not a model's"):
            costs_from(grpo(f"model.path={tmp_path}"), [], None)


def test_times_of_parts_that_ran_side_by_side_are_no_measurement(tmp_path):
    write_run(tmp_path / "run", replace(COSTS, cores=2), "grpo.staleness=1")
    with pytest.raises(UserError, match=r"config.yaml: grpo.staleness=1: .* measure with grpo.staleness=0"):
        read_run(tmp_path / "run")


def test_sides_that_work_at_once_have_half_of_the_cores_each():
    lengths = np.full((4, 4), 100)
    turns, beside = (simulate_step(COSTS, setup_of(1, 1, cores=4, staleness=k), lengths) for k in (0, 1))
    two = simulate_step(COSTS, setup_of(1, 1, cores=2), lengths)
    assert (beside.generate, beside.learn) == (two.generate, two.learn) > (turns.generate, turns.learn)
