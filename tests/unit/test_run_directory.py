"""The run directory: one run at a time in it, a resumed run rewinds it, and a crash costs one line."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError
from tatar_dist.run.directory import RunDirectory, read_metrics
from tatar_dist.types import Completion, Group, Prompt, Sample, ScoredGroup


def config(path: Path, *words: str) -> Config:
    return load_config([], [f"output={path}", "model.path=unused", *words])


def scored(name: str = "a", task: str = "iqa") -> ScoredGroup:
    completions = (
        Completion("<answer>50.00</answer>", (5, 6, 7), (-0.5, -0.25, -0.25), "stop"),
        Completion("<script>hi", (5, 9), (-1.0, -2.0), "length"),
    )
    prompt = Prompt(Sample(f"s-{name}", "set", task, b"", 55.5), "text", f"000004/set/s-{name}")
    terms = {"gaussian": np.array([0.75, np.nan]), "format": np.array([1.0, 0.0])}
    group = Group(prompt, (1, 2), completions, weight_version=4)
    return ScoredGroup(group, np.array([True, False]), terms, np.array([1.75, 0.0]), np.array([0.5, -0.5]))


def not_json(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def logged(path: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line, parse_constant=not_json) for line in (path / name).read_text().splitlines()]


def scalars(path: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: name -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(path / "tensorboard")).Reload()
    return {name: [(e.step, e.value) for e in shown.Scalars(name)] for name in shown.Tags()["scalars"]}


def test_a_second_run_in_the_same_directory_is_refused_and_changes_nothing(tmp_path):
    with RunDirectory(config(tmp_path, "seed=1")) as run:
        run.record()
        before = (tmp_path / "config.yaml").read_text()
        with pytest.raises(UserError, match="another process is running in this directory"):
            RunDirectory(config(tmp_path, "seed=2"))
        assert (tmp_path / "config.yaml").read_text() == before and "seed: 1" in before


def test_a_run_in_another_process_holds_the_directory_until_it_dies(tmp_path):
    code = (
        "import sys\nfrom tatar_dist.config.load import load_config\n"
        "from tatar_dist.run.directory import RunDirectory\n"
        "run = RunDirectory(load_config([], ['output=' + sys.argv[1], 'model.path=unused']))\n"
        "print('locked', flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "locked\n"
            holder = rf"running in this directory \(pid {other.pid} on {re.escape(socket.gethostname())}\): end it, "
            for _ in range(2):  # being refused changes nothing
                with pytest.raises(UserError, match=holder + r".* delete .*/\.lock$") as refused:
                    RunDirectory(config(tmp_path))
                assert "\n" not in str(refused.value)
        finally:
            other.kill()
    RunDirectory(config(tmp_path)).close()  # a killed run leaves no lock that someone must remove


def test_damaged_lines_are_named_at_resume_and_kept_beside(tmp_path, capsys):
    with RunDirectory(config(tmp_path)) as run:
        for step in range(4):
            run.log(step, {"loss/total": 1.0})
        run.quarantine("s1", "a.parquet", "broken")
    bad = [b"{}", b"5", b'{"step": "two"}', b'{"step": 2, "lo', b"\xff\x00", b"null"]
    for name, first in (("metrics.jsonl", b'{"step": 0, "loss/total": 1.0}'), ("quarantine.jsonl", b"")):
        file = tmp_path / name
        lines = file.read_bytes().splitlines()
        assert lines[0] == first or not first
        file.write_bytes(b"\n".join([lines[0], *bad, *lines[1:], b""]))
    with RunDirectory(config(tmp_path)) as run:
        run.rewind(3)
        run.quarantine("s1", "a.parquet", "broken")
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"tatar-dist: {tmp_path}/{name}: damaged and left out, kept in {tmp_path}/{name}.damaged: line 2, 3, 4, 5, 6, 7"
        for name in ("quarantine.jsonl", "metrics.jsonl")
    ]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes().splitlines() == bad
    assert [r["step"] for r in logged(tmp_path)] == [0, 1, 2] and len(logged(tmp_path, "quarantine.jsonl")) == 1


def test_a_lock_file_left_by_a_killed_run_does_not_stop_the_next(tmp_path):
    (tmp_path / ".lock").write_text("")
    RunDirectory(config(tmp_path)).close()
    RunDirectory(config(tmp_path)).close()


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output=.*file: cannot write there"):
        RunDirectory(config(tmp_path / "file"))


def test_the_configuration_that_ran_can_be_read_back(tmp_path):
    ran = config(tmp_path / "deep" / "run", "grpo.group_size=3", "reward.params.length_iaa_min=2")
    with RunDirectory(ran) as run:
        assert not (run.path / "config.yaml").exists(), "a run that is refused changes no record"
        run.record()
    assert load_config([str(tmp_path / "deep" / "run" / "config.yaml")], []) == ran


def test_metrics_go_to_a_line_each_and_to_tensorboard(tmp_path):
    with RunDirectory(config(tmp_path)) as run:
        run.log(0, {"loss/total": 2.5, "eval/loss/iqa": float("nan")})
        run.log(1, {"loss/total": 1.5})
        assert [r["step"] for r in read_metrics(run.path)] == [0, 1]
    assert logged(tmp_path) == [
        {"step": 0, "loss/total": 2.5, "eval/loss/iqa": None},
        {"step": 1, "loss/total": 1.5},
    ]
    assert scalars(tmp_path) == {"loss/total": [(0, 2.5), (1, 1.5)]}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float64("nan")])
def test_a_value_that_is_not_finite_is_null_in_the_metrics_and_absent_from_tensorboard(tmp_path, value):
    with RunDirectory(config(tmp_path)) as run:
        run.log(0, {"a": value, "b": 1.0})
        run.rewind(1)
        run.log(1, {"a": 2.0, "b": value})
    assert logged(tmp_path) == [{"step": 0, "a": None, "b": 1.0}, {"step": 1, "a": 2.0, "b": None}]
    assert scalars(tmp_path) == {"a": [(1, 2.0)], "b": [(0, 1.0)]}


def test_metrics_with_nan_of_an_earlier_version_are_read_and_rewritten_as_null(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "a": NaN}\n{"step": 1, "a": -Infinity}\n')
    with RunDirectory(config(tmp_path)) as run:
        run.rewind(1)
    assert logged(tmp_path) == [{"step": 0, "a": None}]


def test_tensorboard_shows_a_step_that_was_run_again_once(tmp_path):
    for first, value in ((0, 1.0), (2, 9.0)):  # the first process was killed three steps after its checkpoint
        with RunDirectory(config(tmp_path)) as run:
            run.rewind(first)
            for step in range(first, 5):
                run.log(step, {"loss/total": value})
        second = int(time.time())  # by which TensorBoard orders its files; no run starts again within one
        while int(time.time()) == second:
            time.sleep(0.01)
    assert scalars(tmp_path) == {"loss/total": [(0, 1.0), (1, 1.0), (2, 9.0), (3, 9.0), (4, 9.0)]}


def test_rewind_forgets_the_steps_that_will_be_run_again_and_no_others(tmp_path):
    lines = [{"step": i, "loss/total": float(i)} for i in range(5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    with RunDirectory(config(tmp_path)) as run:
        for step in range(5):
            run.rollouts(step, [scored()])
        run.rewind(3)
        assert read_metrics(run.path) == logged(tmp_path) == lines[:3]
        kept = sorted(p.name for p in (tmp_path / "rollouts").iterdir())
        assert kept == ["step_000000.parquet", "step_000001.parquet", "step_000002.parquet"]
        run.rewind(0)
        assert read_metrics(run.path) == [] and list((tmp_path / "rollouts").iterdir()) == []


def test_rewind_of_a_fresh_directory_is_harmless(tmp_path):
    with RunDirectory(config(tmp_path)) as run:
        run.rewind(0)
        assert read_metrics(run.path) == []


@pytest.mark.parametrize("torn", ['{"step": 2, "loss/to', '{"step": 2, "loss/total": 1.5', "\x00\x00\x00"])
def test_a_last_line_torn_by_a_crash_is_dropped_and_the_next_line_is_whole(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "a": 1}\n{"step": 1, "a": 2}\n' + torn)
    with RunDirectory(config(tmp_path)) as run:
        assert [r["step"] for r in read_metrics(run.path)] == [0, 1]
        run.rewind(2)
        run.log(2, {"a": 3.0})
        assert [r["step"] for r in read_metrics(run.path)] == [0, 1, 2]
    assert [r["step"] for r in logged(tmp_path)] == [0, 1, 2]


def test_quarantined_samples_are_named_with_their_manifest_and_reason(tmp_path):
    with RunDirectory(config(tmp_path)) as run:
        run.quarantine("s1", "data/a.parquet", 'cannot decode "it"\nat all')
        run.quarantine("é 2", "data/b.parquet", "too long")
    rows = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert rows == [
        {"sample_id": "s1", "manifest": "data/a.parquet", "reason": 'cannot decode "it"\nat all', "step": None},
        {"sample_id": "é 2", "manifest": "data/b.parquet", "reason": "too long", "step": None},
    ]


def test_a_resumed_run_does_not_quarantine_a_sample_again(tmp_path):
    for reason in ("broken", "broken still"):
        with RunDirectory(config(tmp_path)) as run:
            run.quarantine("s1", "a.parquet", reason)
            run.quarantine("s1", "b.parquet", reason)  # another sample, of the same name
            run.quarantine("s1", "a.parquet", reason)
    with open(tmp_path / "quarantine.jsonl", "a") as f:
        f.write('{"sample_id": "s2", "mani')  # as a crash leaves it
    with RunDirectory(config(tmp_path)) as run:
        run.quarantine("s2", "a.parquet", "broken")
    found = [(r["sample_id"], r["manifest"], r["reason"]) for r in logged(tmp_path, "quarantine.jsonl")]
    assert found == [("s1", "a.parquet", "broken"), ("s1", "b.parquet", "broken"), ("s2", "a.parquet", "broken")]


def test_a_later_start_forgets_the_samples_that_it_can_use_or_does_not_read(tmp_path):
    reads = ["data.train=[a.parquet,old.parquet]", "data.validation=[v.parquet]"]
    with RunDirectory(config(tmp_path, *reads)) as run:
        run.quarantine("mended", "v.parquet", "broken")
        run.quarantine("broken", "v.parquet", "broken")
        for run.events.step, name, manifest in ((3, "early", "a"), (4, "other", "old"), (7, "late", "a")):
            run.quarantine(name, f"{manifest}.parquet", "broken")
        run.rewind(5)  # the learners died: what is held out was read by this process
        names = [r["sample_id"] for r in logged(tmp_path, "quarantine.jsonl")]
        assert names == ["mended", "broken", "early", "other"]
    with RunDirectory(config(tmp_path, "data.train=[a.parquet]", reads[1])) as run:
        run.quarantine("broken", "v.parquet", "broken")  # the other one can be used now
        assert len(logged(tmp_path, "quarantine.jsonl")) == 4  # until nothing refuses the run any more
        run.rewind(5)
        names = [r["sample_id"] for r in logged(tmp_path, "quarantine.jsonl")]
        assert names == ["broken", "early", "other"]  # the state of the sampler at step 5 excludes the last two
        run.events.step = 6
        run.quarantine("late", "a.parquet", "broken")  # drawn again, and as broken as before
    assert [r["sample_id"] for r in logged(tmp_path, "quarantine.jsonl")] == ["broken", "early", "other", "late"]


def test_every_completion_of_a_step_is_a_row_with_its_terms_reward_and_advantage(tmp_path):
    with RunDirectory(config(tmp_path)) as run:
        run.rollouts(4, [scored("a"), scored("b", "iaa")])
    assert [p.name for p in (tmp_path / "rollouts").iterdir()] == ["step_000004.parquet"]  # nothing half-written
    rows = pq.read_table(tmp_path / "rollouts" / "step_000004.parquet").to_pylist()
    assert [(r["sample_id"], r["index"]) for r in rows] == [("s-a", 0), ("s-a", 1), ("s-b", 0), ("s-b", 1)]
    assert rows[1] == {
        "step": 4,
        "group_id": "000004/set/s-a",
        "index": 1,
        "sample_id": "s-a",
        "dataset": "set",
        "task": "iqa",
        "target": 55.5,
        "score_std": None,
        "completion": "<script>hi",
        "tokens": 2,
        "finish_reason": "length",
        "logprob_sum": -3.0,
        "weight_version": 4,
        "parsed": False,
        "gaussian": None,  # NaN: the term does not apply to this row
        "format": 0.0,
        "reward": 0.0,
        "advantage": -0.5,
        "trained": True,
    }
    assert rows[0]["gaussian"] == 0.75 and rows[0]["parsed"] is True and rows[0]["tokens"] == 3
