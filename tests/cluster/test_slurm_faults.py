"""Faults of a job on a real Slurm: its wall-time limit, a node whose Ray dies and joins again, the first node's death.

A job that is started again makes each step of the record once.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hosts import Hosts, wait_until
from slurm import Slurm
from test_slurm import steps_of

from tatar_dist.run.events import read_events

WORDS = ["grpo.max_steps=5000", "checkpoint.every=5", "checkpoint.keep=1", "cluster.learner_placement=spread"]
FAULTS = ["wall-time limit", pytest.param("nodes", marks=pytest.mark.nightly)]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_job_goes_on_after(fault, submit, slurm: Slurm, hosts: Hosts):
    job, directory = submit("grpo", *WORDS, sbatch=("--nodes=2", "--time=60"))
    run = directory / "run"
    after(run, "step/done", 0.0)
    {"wall-time limit": limit_wall_time, "nodes": lose_nodes}[fault](slurm, hosts, job, run)
    starts = [e for e in read_events(run) if e["event"] == "run/start"]
    assert len(starts) == 2 and starts[1]["from_step"] > 0
    after(run, "checkpoint/saved", starts[1]["time"])
    slurm.run(["scancel", job], check=True)
    found = slurm.wait(job, 120)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "1"), slurm.output(job)
    made = len(steps_of(run))
    assert steps_of(run) == list(range(made)) and made > starts[1]["from_step"]
    rollouts = sorted(int(f.stem.removeprefix("step_")) for f in (run / "rollouts").glob("step_*.parquet"))
    assert rollouts in (list(range(made)), list(range(made + 1)))  # one of a step that the end cut short


def after(run: Path, event: str, since: float, timeout: float = 400) -> dict[str, Any]:
    """The first such event after a moment."""

    def look() -> dict[str, Any] | None:
        return next((e for e in read_events(run) if e["event"] == event and e["time"] > since), None)

    return wait_until(look, timeout, f"{event} after {since}")


def limit_wall_time(slurm: Slurm, hosts: Hosts, job: str, run: Path) -> None:
    """Leave less than the three minutes before the end at which the job's script asks for its signal."""
    events = read_events(run)
    minutes = (time.time() - events[0]["time"]) // 60 + 3  # Slurm counts from the job's start, a little earlier
    slurm.run(["scontrol", "update", f"JobId={job}", f"TimeLimit={minutes:.0f}"], check=True)
    wait_until(lambda: slurm.job(job)["Restarts"] == "1", 240, "requeued")
    slurm.run(["scontrol", "update", f"JobId={job}", "TimeLimit=60"], check=True)
    assert "ended with 75: requeued" in slurm.output(job)
    (signal,) = [e for e in read_events(run) if e["event"] == "signal"]
    assert signal["name"] == "SIGUSR1"
    start = after(run, "run/start", signal["time"])
    assert start["from_step"] - signal["step"] in (0, 1)  # in a generation; after a step


def lose_nodes(slurm: Slurm, hosts: Hosts, job: str, run: Path) -> None:
    """The second node's Ray is killed and joins the job again; then the first node loses its power."""
    first, second = hosts
    (raylet,) = second.pids("/raylet/raylet ")
    second.kill(raylet)
    joined = after(run, "node/joined", 0.0)
    assert joined["host"] == second.ip
    after(run, "checkpoint/saved", after(run, "learners/restored", 0.0)["time"])
    assert slurm.job(job)["Restarts"] == "0"

    first.power_off()
    lost = time.time()
    wait_until(lambda: slurm.job(job)["JobState"] in ("PENDING", "REQUEUED"), 300, "the second node requeues the job")
    (log,) = run.parent.glob("logs/*/node2.log")
    assert "grpo: the first node is gone: requeued" in log.read_text(errors="replace")
    first.power_on()
    slurm.start_node(first)
    after(run, "run/start", lost)
