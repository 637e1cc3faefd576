"""The clock of the day may jump: no wait, deadline or duration reads it."""

from __future__ import annotations

import ast
import time
from pathlib import Path

from tatar_dist.config.schema import WatchConfig
from tatar_dist.faults.stall import StallDetector
from tatar_dist.faults.waiting import Waits
from tatar_dist.run.events import Events, read_events

PACKAGE = Path(__file__).parents[2] / "tatar_dist"
OF_THE_DAY = {"time.time", "datetime.now", "datetime.datetime.now", "datetime.utcnow"}
READERS = {  # each shows a moment, or compares one with another host's or file's
    "commands/doctor_nodes.py",
    "commands/runs.py",
    "rationale/replies.py",
    "run/events.py",
    "run/status.py",
    "run/status_view.py",
    "run/tracking.py",
}


def test_only_what_shows_a_moment_reads_the_clock_of_the_day():
    found = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in OF_THE_DAY
    }
    assert found == READERS


def test_a_clock_that_jumps_is_no_stall_and_its_events_are_read_in_their_order(tmp_path, monkeypatch):
    moments = iter([1e9, 2e9, 1.0, 1e9])
    monkeypatch.setattr(time, "time", lambda: next(moments))
    events = Events(tmp_path)
    watch = StallDetector(tmp_path, WatchConfig(stall_min_s=30, stall_action="stop"), 30, events, lambda: [])
    with watch:
        for step in range(4):
            events.begin("learn", step)
            watch.step(0.01)
            assert watch.clock() - watch._last < 30 == watch.limit()
            Waits(watch=watch).check()
    assert [(e["event"], e["step"]) for e in read_events(tmp_path)] == [("phase", step) for step in range(4)]
