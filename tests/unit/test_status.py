"""`tatar-dist status`: what it says of runs in every state, from event logs as they are written, also damaged ones."""

from __future__ import annotations

import fcntl
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from tatar_dist.cli import main
from tatar_dist.errors import UserError
from tatar_dist.run.status import RunWatcher
from tatar_dist.run.status_view import view

NOW = 1_800_000_000.0
START = {"stage": "grpo", "total": 10, "from_step": 0, "learners": 2, "engines": 2, "pid": 1, "host": "a"}


class Run:
    """A run directory whose event log is written by hand. Each event comes a second after the one before."""

    def __init__(self, path: Path) -> None:
        self.path, self.time = path, NOW
        path.mkdir()
        (path / "config.yaml").write_text("seed: 0\n")
        self.lock = open(path / ".lock", "w")  # noqa: SIM115
        fcntl.flock(self.lock, fcntl.LOCK_EX)

    def log(self, event: str, step: int | None = None, after: float = 1.0, **fields: object) -> None:
        self.time += after
        row = {"time": self.time, "event": event, "step": step, "phase": None, **fields}
        self.write(json.dumps(row) + "\n")

    def write(self, text: str) -> None:
        with open(self.path / "events.jsonl", "a") as f:
            f.write(text)

    def start(self, **fields: object) -> None:
        self.log("run/start", **{**START, **fields})
        n = ["n0", "n1"]
        self.log("learners/ready", world_size=2, pids=[10, 11], hosts=["a", "b"], nodes=n, gpus=["0", "0"])
        for i in range(2):
            self.log("engine/ready", engine=i, pid=20 + i, host="ab"[i], node=n[i], gpu=f"{i + 1}")
            self.log("engine/healthy", engine=i)
        self.log("reward/ready", pid=30, host="a", node="n0")

    def steps(self, first: int, last: int, seconds: float = 5.0) -> None:
        for step in range(first, last):
            self.log("phase", step, **{"phase": "generate"})
            self.log("push/done", step, version=step + 1, engines=2)
            self.log("step/done", step, after=seconds - 2, seconds=seconds)

    def read(self):
        return RunWatcher(self.path).read()

    def drawn(self, width: int = 80) -> str:
        console = Console(width=width, file=io.StringIO())
        console.print(view(self.read(), self.time))
        return console.file.getvalue()


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path / "run")
    yield made
    made.lock.close()


def test_a_running_run(run, monkeypatch):
    run.start()
    run.steps(0, 4)
    run.log("phase", 4, **{"phase": "generate"})
    monkeypatch.setattr(time, "time", lambda: run.time)
    s = run.read()
    assert (s.state, s.stage, s.step, s.total, s.version) == ("running", "grpo", 4, 10, 4)
    assert (s.phase, s.phase_since) == ("generate", run.time)
    assert s.seconds_per_step == 5.0
    assert s.eta_seconds == pytest.approx(6 * 5.0 - 1.0)  # the last step ended a second ago
    assert [(e.engine, e.state, e.host, e.pid, e.node) for e in s.engines] == [
        (0, "healthy", "a", 20, "n0"),
        (1, "healthy", "b", 21, "n1"),
    ]
    assert (s.learners.state, s.learners.world_size, s.learners.pids) == ("ready", 2, [10, 11])
    assert s.learners.gpus == ["0", "0"] and [e.gpu for e in s.engines] == ["1", "2"]
    assert (s.reward.state, s.reward.pid) == ("ready", 30)
    assert s.troubles == [] and s.unreadable_lines == 0


def test_time_left_counts_what_happens_between_the_steps(run, monkeypatch):
    run.start()
    run.steps(0, 1)
    run.log("checkpoint/saved", 0, after=10.0, path="x", seconds=10.0)
    run.steps(1, 2)
    monkeypatch.setattr(time, "time", lambda: run.time)
    assert run.read().eta_seconds == pytest.approx(8 * 15.0)


@pytest.mark.parametrize("jump", [3600.0 * 24, -3600.0 * 24, 1000.0, -7.0])
def test_a_clock_that_jumps_changes_neither_the_pace_nor_the_time_left(run, monkeypatch, jump):
    run.start()
    run.steps(0, 3)
    run.log("checkpoint/saved", 2, after=jump, path="x", seconds=1.0)
    run.steps(3, 5)
    monkeypatch.setattr(time, "time", lambda: run.time)
    s = run.read()
    assert (s.seconds_per_step, s.eta_seconds) == (5.0, pytest.approx(5 * 5.0))
    monkeypatch.setattr(time, "time", lambda: run.time - 3600)
    assert run.read().eta_seconds == pytest.approx(5 * 5.0) and "25" in run.drawn()


def test_the_way_of_pushing_its_check_and_its_end(run, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: run.time)
    run.start(push="nccl")
    run.log("phase", 0, **{"phase": "generate"})
    assert (run.read().push, run.read().push_checked) == ("nccl", False)
    assert "weights of version 0 by nccl " in run.drawn()
    run.log("push/checked", 0, way="nccl", seconds=2.5, gap=1e-6)
    assert run.read().push_checked and "by nccl, checked" in run.drawn()
    run.log("push/fallback", 0, way="nccl", reason="RunError: engine 0 did not join")
    assert (run.read().push, run.read().push_checked) == ("object_store", False)
    assert "push/fallback" in run.drawn() and "RunError: engine 0 did not join" in run.drawn()
    run.log("push/checked", 0, way="object_store")
    assert "by object_store, checked" in run.drawn()
    run.start(push="nccl")  # another process tries again
    assert (run.read().push, run.read().push_checked) == ("nccl", False)


def test_an_engine_that_died_and_came_back(run):
    run.start()
    run.log("engine/dead", 0, engine=1, reason="died: out of memory", pid=21)
    e = run.read().engines[1]
    assert (e.state, e.pid, e.host, e.node) == ("dead", None, "b", "n1"), "where it died"
    run.log("engine/restarting", 0, engine=1, attempt=1)
    assert run.read().engines[1].state == "restarting"
    run.log("engine/ready", 0, engine=1, pid=99, host="c", node="n2")
    run.log("engine/stale", 0, engine=1)
    e = run.read().engines[1]
    assert (e.state, e.pid, e.host, e.restarts, e.reason) == ("stale", 99, "c", 1, "died: out of memory")
    assert [t["event"] for t in run.read().troubles] == ["engine/dead"]
    assert "engine 1: died: out of memory" in run.drawn(120)


def test_learners_that_restart_from_a_checkpoint_go_back_in_steps(run):
    run.start()
    run.steps(0, 6)
    run.log("learners/failed", 6, reason="learner rank 1 died")
    assert run.read().learners.pids == []
    run.log("learners/restarting", 6)
    run.log("learners/ready", 6, world_size=1, pids=[12], hosts=["a"], nodes=["n0"])
    run.log("learners/restored", 6, from_step=4)
    s = run.read()
    assert (s.step, s.learners.state, s.learners.world_size, s.learners.restarts) == (4, "ready", 1, 1)


def test_processes_are_known_while_they_start(run):
    run.log("run/start", **START)
    run.log("process/started", name="controller", pid=1, host="a", node="n0")
    run.log("process/started", name="learner-1", pid=11, host="b", node="n1", gpu="3")
    run.log("process/started", name="engine-0", pid=20, host="a", node="n0")
    s = run.read()
    assert (s.learners.state, s.learners.pids, s.learners.nodes) == ("starting", [None, 11], [None, "n1"])
    assert (s.engines[0].state, s.engines[0].pid) == ("starting", 20)
    assert "11" in run.drawn()
    run.log("learners/ready", world_size=1, pids=[12], hosts=["a"], nodes=["n0"])
    assert run.read().learners.pids == [12]


def test_a_resumed_run_has_new_processes(run):
    run.start()
    run.steps(0, 3)
    run.log("engine/dead", 3, engine=0, reason="died")
    run.start(from_step=2, pid=2, engines=1)
    s = run.read()
    assert (s.step, s.version, s.pid, s.phase, s.phase_since) == (2, 2, 2, None, None)
    assert [e.state for e in s.engines] == ["healthy", "healthy"] and s.engines[0].restarts == 0
    assert s.troubles[-1]["event"] == "engine/dead"  # what happened stays known


@pytest.mark.parametrize(
    ("event", "fields", "state"),
    [
        ("run/end", {}, "finished"),
        ("run/failed", {"reason": "no engine left"}, "failed"),
        ("run/interrupted", {"reason": "SIGTERM"}, "interrupted"),
    ],
)
def test_the_ends_of_a_run(run, event, fields, state):
    run.start()
    run.steps(0, 2)
    run.log(event, 1, **fields)
    run.lock.close()
    s = run.read()
    assert (s.state, s.reason, s.phase, s.eta_seconds) == (state, fields.get("reason"), None, None)
    assert f"● {state}  grpo" in run.drawn()


def test_a_run_that_died_without_a_word(run):
    run.start()
    run.steps(0, 2)
    assert run.read().state == "running"
    run.lock.close()
    assert run.read().state == "dead"
    assert "the same command continues" in run.drawn()


def test_a_stall_lasts_until_something_is_logged(run):
    run.start()
    run.log("stall", 0, seconds=301.0, limit=300.0, action="report", stacks="stacks/x", silent={})
    assert (run.read().state, run.read().stalls) == ("stalled", 1)
    assert "stacks/x" in run.drawn()
    run.log("step/done", 0, seconds=400.0)
    assert (run.read().state, run.read().stalls) == ("running", 1)


def test_damaged_lines_are_counted_and_left_out(run):
    run.start()
    run.write('{"time": 1, "event": "step/do\n')  # cut off, then continued by another process
    run.write("[1, 2]\n\xff\x00\n")
    run.write('{"time": "yesterday", "event": "phase"}\n{"event": "step/done", "time": 5}\n')
    run.write('{"time": 5, "event": "engine/dead", "engine": [1]}\n')
    run.write('{"time": 5, "event": "step/done", "step": Infinity, "seconds": 1}\n')
    run.steps(0, 2)
    s = run.read()
    assert (s.step, s.unreadable_lines) == (2, 7)
    assert "7 unreadable line(s)" in run.drawn()


def test_a_line_still_being_written_is_read_when_it_is_whole(run):
    run.start()
    files = RunWatcher(run.path)
    line = json.dumps({"time": NOW + 99, "event": "step/done", "step": 0, "seconds": 1.0}) + "\n"
    run.write(line[:20])
    assert (files.read().step, files.read().unreadable_lines) == (0, 0)
    run.write(line[20:])
    assert (files.read().step, files.read().unreadable_lines) == (1, 0)


def test_metrics_and_checkpoint(run):
    run.start()
    run.steps(0, 3)
    (run.path / "metrics.jsonl").write_text(
        '{"step": 1, "loss/total": 1.0}\n{"step": 2, "loss/total": null, "perf/tokens_per_second": 1234.5}\n{"st'
    )
    checkpoint = run.path / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text('{"step": 2}')
    (run.path / "checkpoints" / "latest").symlink_to("step_000002")
    s = run.read()
    assert s.metrics["step"] == 2 and s.tokens_per_second == 1234.5
    assert (s.checkpoint.step, Path(s.checkpoint.path)) == (2, checkpoint)
    (checkpoint / "state.json").write_text("{")
    assert run.read().checkpoint is None


def test_an_evaluation_counts_answers(run):
    run.log("run/start", stage="evaluate", total=40, from_step=0, learners=0, engines=1)
    run.log("process/started", name="engine-0", pid=20, host="a", node="n0")
    run.log("phase", 16, **{"phase": "evaluate"})
    s = run.read()
    assert (s.state, s.step, s.total, s.engines[0].pid) == ("running", 16, 40, 20)
    run.log("run/end", 40)
    assert run.read().state == "finished"


def test_a_hundred_engines_fit_the_screen(run):
    run.log("run/start", **{**START, "engines": 100})
    for i in range(100):
        run.log("engine/healthy", engine=i)
    run.log("engine/dead", engine=42, reason="died")
    drawn = run.drawn()
    assert "engines × 99" in drawn and "engine 42" in drawn
    assert len(drawn.splitlines()) < 24


def test_nothing_is_cut_or_wider_than_a_small_terminal(run):
    run.start()
    run.steps(0, 3)
    run.log("engine/dead", 3, engine=1, reason="died: " + "a long story " * 10 + "the end")
    lines = run.drawn(80).splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines) and "end" in lines[-1]


def test_json_is_one_object(run, capsys):
    run.start()
    run.steps(0, 2)
    assert main(["status", str(run.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["step"], found["engines"][1]["state"]) == ("running", 2, "healthy")


def test_no_run_directory_is_one_line_and_status_2(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err
    with pytest.raises(UserError, match="not a run directory"):
        RunWatcher(tmp_path / "nowhere")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/events.jsonl").touch()
    with pytest.raises(UserError, match=f"the runs in it are {tmp_path}/sft$"):
        RunWatcher(tmp_path)


def test_it_needs_no_torch_and_no_ray(run):
    run.start()
    code = "import sys; from tatar_dist.cli import main; assert main(sys.argv[1:]) == 0; "
    code += "print([m for m in ('torch', 'ray', 'numpy', 'omegaconf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, "status", run.path], capture_output=True, text=True, check=True)
    assert "● running  grpo" in done.stdout and done.stdout.splitlines()[-1] == "[]"
