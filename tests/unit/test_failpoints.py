"""Failpoints fire once, where they were asked to, with a real signal, and say so first; events take many writers."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest

from tatar_dist.config.load import load_config
from tatar_dist.errors import UserError
from tatar_dist.run.events import Events, read_events
from tatar_dist.run.failpoints import Failpoints


def run_child(entries: list[str], run: str, calls: list[tuple[str, dict]]) -> multiprocessing.Process:
    child = multiprocessing.get_context("fork").Process(target=reach_all, args=(entries, run, calls))
    child.start()
    return child


def reach_all(entries, run, calls):
    points = Failpoints(entries, run, rank=1)
    for point, facts in calls:
        points.reach(point, **facts)


CALLS = [("learner.backward", {"step": s}) for s in range(3)]


def test_kill_fires_at_its_step_only_and_once_over_restarts(tmp_path):
    entries = ["learner.backward:kill:step=1:rank=1"]
    first = run_child(entries, str(tmp_path), CALLS)
    first.join()
    assert first.exitcode == -signal.SIGKILL
    (event,) = read_events(tmp_path)
    assert event["event"] == "fault" and event["pid"] == first.pid
    assert (event["point"], event["action"], event["step"], event["rank"]) == ("learner.backward", "kill", 1, 1)
    again = run_child(entries, str(tmp_path), CALLS)
    again.join()
    assert again.exitcode == 0 and len(read_events(tmp_path)) == 1


@pytest.mark.parametrize("entry", ["learner.backward:kill:rank=0", "learner.backward:kill:step=9", "reward.score:kill"])
def test_other_places_and_facts_do_not_fire(tmp_path, entry):
    child = run_child([entry], str(tmp_path), CALLS)
    child.join()
    assert child.exitcode == 0 and not read_events(tmp_path)


def test_stop_stops_the_process(tmp_path):
    child = run_child(["learner.backward:stop"], str(tmp_path), CALLS)
    pid, status = os.waitpid(child.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    os.kill(pid, signal.SIGKILL)


def test_raise_raises(tmp_path):
    with pytest.raises(RuntimeError, match="failpoint engine.update:raise"):
        Failpoints(["engine.update:raise"], str(tmp_path)).reach("engine.update", version=3)


@pytest.mark.parametrize("entry", ["", "x", "x:", ":kill", "x:explode", "x:kill:step", "x:kill:step=1:"])
def test_an_entry_that_says_nothing_is_refused_before_anything_starts(entry):
    with pytest.raises(UserError, match="failpoints: .*expected POINT:ACTION"):
        load_config([], ["output=x", "model.path=y", f"failpoints=['{entry}']"])


def write_many(run, name, n):
    events = Events(run)
    for i in range(n):
        events.log("step/done", who=name, i=i, filler="x" * 500)


def test_several_writers_share_one_log_without_mixing_lines(tmp_path):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=write_many, args=(tmp_path, n, 300)) for n in "abcd"]
    for c in children:
        c.start()
    for c in children:
        c.join()
    found = read_events(tmp_path)
    for name in "abcd":
        assert [e["i"] for e in found if e["who"] == name] == list(range(300))


def test_a_line_cut_off_by_a_crash_costs_that_line_only(tmp_path):
    Events(tmp_path).log("step/done")
    with open(tmp_path / "events.jsonl", "a") as f:
        f.write('{"event": "step/do')
    events = Events(tmp_path)
    events.begin("learn", 4)
    events.log("push/done", version=5)
    found = read_events(tmp_path)
    assert [e["event"] for e in found] == ["step/done", "phase", "push/done"]
    assert found[2]["step"] == 4 and found[2]["phase"] == "learn"
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[0])["step"] is None
