"""A run leaves nothing behind, killed or after Ctrl-C, which leaves a checkpoint that resumes; its Ray is its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from conftest import model_words

from tatar_dist.cluster.ray_cluster import Cluster

MARK = "TATAR_DIST_TEST_RUN"
# After a SIGKILL two of Ray's own agents try for 60 s to tell a server that is gone, then end by themselves.
RAY_AGENTS_S = 300


def start(mark: str, output: Path, model: str, manifests: list[str], steps: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "tatar_dist", "sft", "--config", "configs/demo.yaml", f"output={output}"]
    command += [*model_words(model), f"data.train=[{','.join(manifests)}]", "cluster.learners=1"]
    command += [f"sft.max_steps={steps}", "sft.global_batch=4", "sft.eval_every=0", "sft.epochs=1"]
    command += ["checkpoint.accept=[sft.max_steps]"]
    return subprocess.Popen(command, env={**os.environ, MARK: mark}, stderr=subprocess.PIPE, text=True)


def processes(mark: str) -> list[str]:
    """Command lines of living processes that descend from the run, found by an environment variable of theirs."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (directory / "environ").read_bytes():
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if command:  # a zombie has none
                    found.append(command[:100])
        except OSError:
            continue
    return found


def wait_for(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.2)


def steps_done(output: Path) -> int:
    file = output / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture
def run_at_step_two(tmp_path, model_untied, manifests):
    mark = uuid.uuid4().hex
    output = tmp_path / "run"
    process = start(mark, output, model_untied, manifests, 10_000)
    try:
        wait_for(lambda: process.poll() is not None or steps_done(output) >= 2, 900, "the second step")
        assert process.poll() is None, process.stderr.read()
        assert len(processes(mark)) > 3  # the driver, Ray's own processes, a learner
        yield mark, output, process
    finally:
        process.kill()


@pytest.fixture(scope="module")
def killed_runs() -> Iterator[list[str]]:
    """Marks of runs that were killed: when the other tests of this file are done, their last processes must be gone."""
    marks: list[str] = []
    yield marks
    for mark in marks:
        wait_for(lambda mark=mark: not processes(mark), RAY_AGENTS_S, "the end of all processes of a killed run")


def test_a_killed_run_leaves_no_process(run_at_step_two, killed_runs):
    mark, _, process = run_at_step_two
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_runs.append(mark)
    wait_for(lambda: not [p for p in processes(mark) if "Agent" not in p], 200, "the end of all but Ray's agents")


def test_ctrl_c_leaves_no_process_and_a_checkpoint_that_resumes(run_at_step_two, model_untied, manifests):
    mark, output, process = run_at_step_two
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "stopping at the next safe point" in errors
    assert "the same command continues there" in errors.splitlines()[-1]
    wait_for(lambda: not processes(mark), 200, "the end of all processes")
    state = json.loads((output / "checkpoints" / "latest" / "state.json").read_text())
    done = state["step"]
    assert done == steps_done(output) >= 2

    again = start(mark, output, model_untied, manifests, done + 1)
    _, errors = again.communicate(timeout=900)
    assert again.returncode == 0, errors
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == list(range(done + 1))
    wait_for(lambda: not processes(mark), 200, "the end of all processes")


def test_a_run_starts_a_ray_of_its_own_beside_another(model_untied, make_config):
    ray.shutdown()  # the one that modules share, and that a run would join
    code = (
        "import ray, sys; ray.init(address='local', num_cpus=1, include_dashboard=False); "
        "print('node', ray.get_runtime_context().get_node_id(), flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin and other.stdout
    try:
        node = next(line for line in other.stdout if line.startswith("node")).split()[1]
        with Cluster(make_config(model_untied)):
            assert ray.get_runtime_context().get_node_id() != node
            assert len(ray.nodes()) == 1
    finally:
        other.stdin.close()
        other.wait(300)
