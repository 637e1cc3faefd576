"""The stall detector, on real processes: one hung in a loop, one stopped, one that is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tatar_dist.config.schema import WatchConfig
from tatar_dist.faults.stall import StallDetector, Stalled, WatchedProcess, processes_of, stacks_of
from tatar_dist.run.events import Events, read_events

PERMIT = "from tatar_dist.run.process import _permit_tracing; _permit_tracing()\n"  # as `open_log` does
HUNG = (
    PERMIT
    + """
def computing_for_ever():
    print("ready", flush=True)
    while True:
        pass
computing_for_ever()
"""
)
FRAME = "computing_for_ever (<string>"  # its name alone stands in the command line, too
BUSY = (
    PERMIT
    + """
import threading
def deep(n):
    return deep(n - 1) if n else sum(range(30))
def work():
    while True:
        deep(60)
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
print("ready", flush=True)
work()
"""
)


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen]]:
    made = []

    def child(code: str) -> subprocess.Popen:
        made.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True))
        assert made[-1].stdout.readline() == "ready\n"
        return made[-1]

    yield child
    for process in made:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for(condition: Callable[[], object], what: str, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.02)


def stalls(run) -> list[dict]:
    return [e for e in read_events(run) if e["event"] == "stall"]


class Clock:
    """Goes on when the test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def detector(
    run, action: str = "report", processes=lambda: [], factor: float = 2.0, least: float = 0.2, first=0.2, **clock
):
    config = WatchConfig(stall_factor=factor, stall_min_s=least, stall_action=action)
    return StallDetector(run, config, first, Events(run), processes, **clock)


def test_a_process_in_an_endless_loop_is_read_without_harm(start):
    process = start(HUNG)
    (stacks,) = stacks_of([process.pid])
    assert stacks.answered and stacks.state.startswith("R")
    assert stacks.text.count(FRAME) == 1
    assert process.poll() is None


def test_a_busy_process_can_be_read_as_often_as_one_likes(start, monkeypatch):
    monkeypatch.setattr("tatar_dist.faults.stall.SPY_S", 60.0)  # of a busy machine
    process = start(BUSY)
    for _ in range(40):
        (stacks,) = stacks_of([process.pid])
        assert process.poll() is None
        assert stacks.answered and stacks.text.count("deep (<string>") > 4


def test_a_stopped_process_is_seen_from_outside(start):
    process = start(HUNG)
    process.send_signal(signal.SIGSTOP)
    wait_for(lambda: not stacks_of([process.pid])[0].answered, "the process to stop")
    (found,) = stacks_of([process.pid])
    assert found.state == "T (stopped)"
    assert "T (stopped)" in found.text and FRAME in found.text


def test_without_the_permission_to_trace_the_text_says_what_is_needed(start, tmp_path, monkeypatch):
    spy = tmp_path / "py-spy"
    spy.write_text("#!/bin/sh\necho 'Permission Denied: Try running again with elevated permissions' >&2; exit 1\n")
    spy.chmod(0o755)
    pid = start(HUNG).pid
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (stacks,) = stacks_of([pid])
    assert not stacks.answered and stacks.state.startswith("R")
    assert "CAP_SYS_PTRACE): Permission Denied" in stacks.text
    spy.unlink()
    assert "py-spy cannot read it" in stacks_of([pid])[0].text


def test_a_process_that_is_gone_is_named_so(start):
    process = start(HUNG)
    process.kill()
    process.wait()
    (found,) = stacks_of([process.pid])
    assert (found.state, found.answered) == ("gone", False)


def test_a_stall_is_logged_with_the_stacks_of_all_processes(tmp_path, start):
    hung, stopped = start(HUNG), start(HUNG)
    stopped.send_signal(signal.SIGSTOP)
    wait_for(lambda: not stacks_of([stopped.pid])[0].answered, "the process to stop")
    processes = [
        WatchedProcess("controller", os.getpid()),
        WatchedProcess("learner-0", hung.pid),
        WatchedProcess("engine-1", stopped.pid),
    ]
    events = Events(tmp_path)
    config = WatchConfig(stall_factor=2.0, stall_min_s=0.2, stall_action="stop")
    with StallDetector(tmp_path, config, 0.2, events, lambda: processes) as watch:
        events.begin("generate", 4)
        wait_for(lambda: stalls(tmp_path), "the stall")
        (stall,) = stalls(tmp_path)
        with pytest.raises(Stalled, match=r"phase generate of step 4.*engine-1 \(T \(stopped\)\)") as raised:
            wait_for(watch.raise_if_asked, "the exception")
        assert raised.value.action == "stop"
        watch.raise_if_asked()  # once a stall
    assert (stall["step"], stall["phase"], stall["action"]) == (4, "generate", "stop")
    assert stall["seconds"] >= stall["limit"] == 0.2
    assert stall["processes"] == ["controller", "learner-0", "engine-1"]
    assert stall["silent"] == {"engine-1": "T (stopped)"}
    texts = {p.name: (tmp_path / stall["stacks"] / f"{p.name}.txt").read_text() for p in processes}
    assert (
        "test_a_stall_is_logged" in texts["controller"] and "faults/stall.py" in texts["controller"]
    )  # all its threads
    assert FRAME in texts["learner-0"]
    assert texts["engine-1"].startswith(f"engine-1, pid {stopped.pid} on ")


def test_one_dump_a_stall_and_progress_arms_it_again(tmp_path):
    with detector(tmp_path) as watch:
        wait_for(lambda: stalls(tmp_path), "the first stall")
        time.sleep(1.0)  # five limits: a second dump would have come
        assert len(stalls(tmp_path)) == 1
        watch.progress()
        wait_for(lambda: len(stalls(tmp_path)) == 2, "the second stall")


def test_progress_keeps_it_quiet(tmp_path):
    clock = Clock()
    with detector(tmp_path, clock=clock) as watch:
        for _ in range(20):
            watch.progress()
            clock.seconds += 0.19  # nearly the limit, four seconds in all
            time.sleep(0.05)
        watch.progress()
    assert stalls(tmp_path) == []


def test_the_limit_follows_the_median_step(tmp_path):
    watch = detector(tmp_path, factor=10.0, least=30.0, first=600.0)
    assert watch.limit() == 600.0  # starting takes longer than any step
    watch.step(1.0)
    assert watch.limit() == 30.0
    for seconds in (60.0, 61.0, 500.0):
        watch.step(seconds)
    assert watch.limit() == 10.0 * 60.5


def test_factor_0_watches_nothing(tmp_path):
    with detector(tmp_path, factor=0.0):
        time.sleep(0.5)
    assert stalls(tmp_path) == []


def test_report_raises_nothing_and_late_progress_takes_the_request_back(tmp_path):
    with detector(tmp_path, "report") as watch:
        wait_for(lambda: stalls(tmp_path), "the stall")
        watch.raise_if_asked()
    clock = Clock()
    with detector(tmp_path, "restart", clock=clock) as watch:
        clock.seconds += 0.3
        wait_for(lambda: watch._asked, "the request")
        watch.progress()
        watch.raise_if_asked()


def test_a_stall_that_cannot_be_written_down_does_not_end_the_watch(tmp_path):
    calls = []

    def processes() -> list[WatchedProcess]:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("no space left")
        return []

    with detector(tmp_path, processes=processes) as watch:
        wait_for(lambda: calls, "the first try")
        watch.progress()
        wait_for(lambda: stalls(tmp_path), "the second stall")


def test_the_processes_of_a_run_come_from_its_event_log(tmp_path):
    events = Events(tmp_path)
    events.log("run/start", stage="grpo", learners=2, engines=2)
    events.log("learners/ready", world_size=2, pids=[10, 11], hosts=["a", "b"], nodes=["n0", "n1"])
    for i in range(2):
        events.log("engine/ready", engine=i, pid=20 + i, host="a", node="n0")
    events.log("reward/ready", pid=30, host="a", node="n0")
    events.log("engine/dead", engine=0, reason="died")
    events.log("engine/dead", engine=1, reason="died")
    events.log("engine/restarting", engine=1)
    events.log("process/started", name="engine-1", pid=22, host="b", node="n1")  # it may hang while it starts
    assert processes_of(tmp_path) == [
        WatchedProcess("controller", os.getpid()),
        WatchedProcess("learner-0", 10, "n0"),
        WatchedProcess("learner-1", 11, "n1"),
        WatchedProcess("engine-1", 22, "n1"),
        WatchedProcess("reward", 30, "n0"),
    ]
