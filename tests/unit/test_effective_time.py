"""Effective training time of a chaos run, computed from event logs written by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "cluster" / "effective.py"
spec = importlib.util.spec_from_file_location("effective", FILE)
effective = importlib.util.module_from_spec(spec)
spec.loader.exec_module(effective)


class Log:
    """An event log and its clock."""

    def __init__(self) -> None:
        self.now, self.events, self.faults = 100.0, [], []

    def at(self, after: float, event: str, **fields) -> None:
        self.now += after
        self.events.append({"time": self.now, "event": event, **fields})

    def start(self, seconds: float, after: float = 0.0, engines: int = 2) -> None:
        self.at(after, "run/start", engines=engines)
        for i in range(engines):
            self.at(0, "engine/healthy", engine=i)
        self.at(seconds, "phase")

    def steps(self, *numbers: int, seconds: float = 2.0) -> None:
        for step in numbers:
            self.at(seconds / 2, "phase")
            self.at(seconds / 2, "step/done", step=step, seconds=seconds)

    def fault(self, kind: str) -> None:
        self.faults.append({"time": self.now, "fault": kind})

    def found(self) -> dict:
        return effective.effective(self.events, self.faults)


def test_a_run_without_faults_loses_its_start_only():
    log = Log()
    log.start(10.0)
    log.steps(*range(20))
    found = log.found()
    assert found["effective_time"] == pytest.approx(40 / 50) and found["undisturbed_step_s"] == 2.0
    assert found["shares"]["actors of a start"] == pytest.approx(0.2)
    assert sum(found["shares"].values()) == pytest.approx(1)


def test_steps_made_again_do_not_count_and_each_part_of_a_recovery_is_told_apart():
    log = Log()
    log.start(10.0)
    log.steps(*range(10))
    log.fault("learner hung")
    log.at(5.0, "learners/failed")
    log.at(0.0, "learners/restarting")
    log.at(7.0, "learners/restored")
    log.steps(*range(8, 12))
    log.fault("controller killed")
    log.start(10.0, after=6.0)
    log.steps(12)
    found = log.found()
    wall = 10 + 20 + 5 + 7 + 8 + 6 + 10 + 2
    assert found["wall_s"] == wall and found["effective_time"] == pytest.approx(13 * 2 / wall, abs=1e-3)
    seconds = {what: share * wall for what, share in found["shares"].items()}
    assert seconds == pytest.approx(
        {
            "surviving steps": 26,
            "steps made again": 4,
            "noticing the fault": 5,
            "end of the driver to its start": 6,
            "actors of a start": 20,
            "learners again": 7,
            "slower steps, waits for engines, checkpoints": 0,
        },
        abs=0.05,
    )


def test_the_pace_is_that_of_steps_with_all_engines():
    log = Log()
    log.start(0.0)
    log.steps(0, 1, 2)
    log.fault("engine killed")
    log.at(0.0, "engine/dead", engine=1)
    log.steps(*range(3, 13), seconds=9.0)
    log.at(0.0, "engine/healthy", engine=1)
    log.steps(13, seconds=9.0)  # an engine came in it
    log.steps(14)
    assert log.found()["undisturbed_step_s"] == 2.0
