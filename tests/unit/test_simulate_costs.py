"""Where the simulator's costs come from: runs, a file, an estimate; and what `plan --simulate` says of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from simulate_cases import CONFIGS, COSTS, DEMO, GRPO, LENGTHS, demo, grpo, simulate_step

from tatar_dist.cli import main
from tatar_dist.config.schema import to_yaml
from tatar_dist.errors import UserError
from tatar_dist.plan.simulate.costs import StepCosts, read_costs
from tatar_dist.plan.simulate.forecast import Simulator, costs_from, draw_lengths, forecast, numbers_of_gpus
from tatar_dist.plan.simulate.measured import costs_of_runs, fit, read_run
from tatar_dist.plan.simulate.step import Setup


def write_run(path, costs, *words, steps=6, slow=None):
    """A run directory whose steps took what `costs` say, with completions drawn from them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = demo(*words)
    setup = Setup(config, config.cluster.learners, config.rollout.engines, costs.cores)
    (path / "rollouts").mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(config))
    lines = []
    for step, lengths in enumerate(draw_lengths(costs, config, draws=steps)):
        t = simulate_step(costs, setup, lengths)
        factor = 10.0 if step == slow else 1.0
        seconds = {name: factor * getattr(t, name) for name in ("generate", "reward", "learn", "sync", "step")}
        sync = {"sync/bytes": costs.model_gb * 1e9 * setup.engines}
        lines.append(json.dumps({"step": step, **{f"time/{k}": v for k, v in seconds.items()}, **sync}) + "\n")
        half = config.grpo.prompts_per_step // 2
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
    found = compare(runs)
    assert [r["calibration"] for r in found["runs"]] == [True] * len(CALIBRATION) + [False] * len(FORETOLD)
    assert found["worst_error"] < 0.1
    for r in found["runs"]:
        assert r["ratio"] == pytest.approx(r["predicted_seconds"] / r["measured_seconds"])


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
    said = capsys.readouterr().out
    hours = found["configured"]["run_seconds"] * 8 / 3600
    assert "4 learners + 4 engines" in said and f"100 steps, {hours:.1f} GPU-hours" in said


MINIMAL = {"lengths": {"iqa": [[50]], "iaa": [[150]]}, "engine": {"per_step": 0.02}, "learner": {"per_row": 0.1}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"engin": {}}, "unknown key 'engin'"),
        ({"engine": {"per_stp": 1}}, "unknown key 'engine.per_stp'"),
        ({"engine": {"per_step": -1}}, "engine.per_step=-1: must not be negative"),
        ({"engine": {"per_step": "fast"}}, "must be a number"),
        ({"engine": {"serial": 1.5}}, "at most 1"),
        ({"engine": 3}, "engine=3: must be a mapping of keys"),
        ({"learner": {"per_row": float("nan")}}, "must be a finite number"),
        ({"cores": 1.5}, "whole number"),
        ({"card": "V100"}, "card='V100': must be one of H200, H100, A100, L40S, 4090"),
        ({"lengths": {}}, "lengths={}: must hold at least 1"),
        ({"lengths": {"iqa": []}}, "lengths.iqa=.*: must hold at least 1"),
        ({"lengths": {"iqa": [[10], [0]]}}, "lengths.iqa.1.0=0: must be at least 1"),
        ({"lengths": {"art": [[10]]}}, "lengths.art.*must be one of iqa, iaa"),
    ],
)
def test_a_wrong_file_of_times_is_one_line_that_names_the_key(tmp_path, change, said):
    file = tmp_path / "times.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, **change}))
    with pytest.raises(UserError, match=said):
        read_costs(file)


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    (tmp_path / "times.yaml").write_text("lengths: {iqa: [[5]]}\nparameters: 8.29e9\nengine: {per_step: 1e-2}\n")
    found = read_costs(tmp_path / "times.yaml")
    assert (found.parameters, found.engine.per_step) == (8.29e9, 0.01)


def test_a_file_of_times_needs_lengths(tmp_path):
    (tmp_path / "times.yaml").write_text("engine: {per_step: 0.02}\n")
    with pytest.raises(UserError, match="lengths"):
        read_costs(tmp_path / "times.yaml")


def test_what_cannot_be_simulated_is_said(tmp_path):
    with pytest.raises(UserError, match="no estimate"):
        costs_from(DEMO, [], None)
    with pytest.raises(UserError, match="its sizes are unknown; or give measured times"):
        costs_from(grpo("model.path=someones/model"), [], None)
    with pytest.raises(UserError, match="give one of them"):
        costs_from(GRPO, [tmp_path], tmp_path)
    with pytest.raises(UserError, match="leave out --measured and --times"):
        costs_from(GRPO, [], tmp_path, "A100")
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
        forecast(GRPO, StepCosts(lengths=LENGTHS))
    with pytest.raises(UserError, match="of task iaa"):
        forecast(GRPO, replace(COSTS, lengths={"iqa": ((5,),)}))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "8"], "belong to --simulate"),
        (["--card", "A100"], "belong to --simulate"),
        (["--simulate", "--card", "V100"], "V100"),
        (["--simulate", "--stage", "sft"], "only grpo is simulated"),
    ],
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
    found = forecast(grpo("model.path=Qwen2.5-VL-72B", "cluster.nodes=4"), replace(COSTS, parameters=73e9), [8])
    nothing = {"best": None, "efficiency": None, "disaggregated": None, "colocated": None}
    assert found["table"] == [{"gpus": 8} | nothing]
    assert "no split fits" in found["notes"][-1]


@pytest.mark.parametrize("line", ["3", '{"time/generate": 1}', "{"])
def test_lines_of_metrics_that_hold_no_step_are_left_out(tmp_path, line):
    run = write_run(tmp_path / "run", replace(COSTS, cores=2))
    before = costs_of_runs([run])
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + line)
    assert costs_of_runs([run]) == before


def test_a_model_directory_without_sense_is_one_line(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"00")
    for text, says in (
        ("{", "not of a Qwen2.5-VL: JSONDecodeError"),
        ("[]", "model_type is None"),
        ('{"hidden_size": 8}', "model_type is None"),
        ('{"model_type": "qwen2_5_vl"}', "not of a Qwen2.5-VL: KeyError"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=f"config.json: {says}"):
            costs_from(grpo(f"model.path={tmp_path}"), [], None)


def test_times_of_parts_that_ran_side_by_side_are_no_measurement(tmp_path):
    write_run(tmp_path / "run", replace(COSTS, cores=2), "grpo.staleness=1")
    with pytest.raises(UserError, match=r"config.yaml: grpo.staleness=1: .* measure with grpo.staleness=0"):
        read_run(tmp_path / "run")
