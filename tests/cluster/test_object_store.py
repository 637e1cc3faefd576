"""Ray's object store is full and cannot spill, because Ray takes the disk for full: what was learned stays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from tatar_dist import cli
from tatar_dist.learner.group import LearnerGroup
from tatar_dist.run.directory import RunDirectory
from tatar_dist.run.events import read_events

MIB = 80  # little more than the least that Ray allows


@pytest.fixture
def small_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_local_fs_capacity_threshold", "0.001")
    ray.init("local", num_cpus=6, object_store_memory=MIB << 20, include_dashboard=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def fill_at(monkeypatch: pytest.MonkeyPatch):
    """fill_at(step): the store is full when that step's push begins, until learners start (again)."""
    held, at, begin, setup = [], set[int](), RunDirectory.begin, LearnerGroup.setup

    def fill(directory: RunDirectory, phase: str, step: int) -> None:
        begin(directory, phase, step)
        if phase == "sync" and step in at:
            at.discard(step)
            for size in (4 << 20, 1 << 18, 1 << 17):
                with pytest.raises(ray.exceptions.OutOfDiskError):
                    while True:
                        held.append(ray.put(np.ones(size, np.uint8)))

    def empty(learners: LearnerGroup, *arguments: Any) -> Any:
        held.clear()
        return setup(learners, *arguments)

    monkeypatch.setattr(RunDirectory, "begin", fill)
    monkeypatch.setattr(LearnerGroup, "setup", empty)
    return at.add


@pytest.mark.nightly
def test_a_full_object_store_ends_the_run_with_one_line_or_costs_a_restart(
    words: list[str], small_store: None, fill_at, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    steps = ["grpo.max_steps=3", "checkpoint.every=1", "cluster.learners=1", "rollout.engines=1"]
    command = ["grpo", "--config", "configs/demo.yaml", *words, *steps, f"output={run}"]
    fill_at(1)
    assert cli.main([*command, "cluster.learner_restarts=0"]) == 1
    (said,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tatar-dist: ")]
    assert "gathering weights: OutOfDiskError: Local disk is full" in said and "object store is full" in said

    fill_at(2)
    assert cli.main(command) == 0
    events = read_events(run)
    second = max(i for i, e in enumerate(events) if e["event"] == "run/start")
    assert events[second]["from_step"] == 1
    (failed,) = [e for e in events[second:] if e["event"] == "learners/failed"]
    assert failed["step"] == 2 and "OutOfDiskError" in failed["reason"]
    assert not [e for e in events[second:] if e["event"] == "engine/dead"]  # it waited for the next push
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
