"""Detect that a run makes no progress, record what its processes do, and act as configured.

Progress is a call of `progress()` (a group returned, a bucket was pushed) or `step(seconds)`. Without one for
max(watch.stall_min_s, watch.stall_factor × median step) the event `stall` is logged, RUN/stacks/TIME/NAME.txt is
written for every process on every node, and with watch.stall_action `restart` or `stop` the controller's next
`raise_if_asked()` raises `Stalled`. There is one dump per stall; progress arms it again.

Python stacks are read with py-spy, which comes with Ray. It reads a process's memory from outside, so it also sees one
that is stopped or whose interpreter lock is held by C code. No signal is sent to a process: its handler would walk the
frames of running threads, which now and then crashes a healthy process. `run.process.open_log` permits every process
of the same user to trace this one (README.md); some containers need CAP_SYS_PTRACE.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tatar_dist.config.schema import WatchConfig
from tatar_dist.errors import RunError
from tatar_dist.run.events import Events
from tatar_dist.run.process import process_facts
from tatar_dist.run.status import RunWatcher

CHECK_S = 0.5  # between two looks at the clock
SPY_S = 10.0  # for py-spy to read a process
NODE_S = 30.0  # for the stacks of another node: a task starts, asks, reads
STEPS = 100  # the median is of so many last steps

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WatchedProcess:
    """A process of the run. `node`: Ray's id of its node; None = this machine."""

    name: str
    pid: int
    node: str | None = None


class Stalled(RunError):
    """No progress for too long. `action`: restart | stop."""

    def __init__(self, message: str, action: str) -> None:
        super().__init__(message)
        self.action = action


class StallDetector:
    """Context manager around the controller's loop, which it watches from a thread.

    Args:
        first_s: the limit until the first step after a start is finished: starting and warming up take longer than
            any step.
        processes: all processes of the run as they are at that moment.
        clock: seconds, of which only differences count.
    """

    def __init__(
        self,
        run: str | Path,
        config: WatchConfig,
        first_s: float,
        events: Events,
        processes: Callable[[], Sequence[WatchedProcess]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run, self.config, self.first_s = Path(run), config, first_s
        self.events, self.processes, self.clock = events, processes, clock
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._last = clock()  # the time of the last progress, which identifies a stall
        self._asked: tuple[float, Stalled] | None = None  # of the stall since that time
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall-detector", daemon=True)

    def __enter__(self) -> StallDetector:
        self.progress()
        if self.config.stall_factor:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(NODE_S)

    def progress(self) -> None:
        """Note that the run made progress."""
        self._last = self.clock()

    def step(self, seconds: float) -> None:
        """Note that a step is finished and how long it took."""
        self._steps.append(seconds)
        self.progress()

    def starting(self) -> None:
        """Apply the start-up limit `first_s` until the next step ends: processes are starting."""
        self._steps.clear()
        self.progress()

    def raise_if_asked(self) -> None:
        """Raise Stalled, once a stall, when watch.stall_action is restart or stop."""
        asked = self._asked
        if asked is not None and asked[0] == self._last:  # else something moved since
            self._asked = None
            raise asked[1]

    def limit(self) -> float:
        """Return how many seconds without progress are a stall now."""
        if not self._steps:
            return max(self.config.stall_min_s, self.first_s)
        return max(self.config.stall_min_s, self.config.stall_factor * statistics.median(self._steps))

    def _watch(self) -> None:
        dumped = None
        while not self._end.wait(CHECK_S):
            since = self._last
            if since != dumped and self.clock() - since >= self.limit():
                dumped = since
                try:
                    self._stall(since)
                except Exception:  # the watch goes on; a full disk or a lost node must not end it
                    log.exception("the stall could not be written down")

    def _stall(self, since: float) -> None:
        seconds, limit, action = self.clock() - since, self.limit(), self.config.stall_action
        stacks = stacks_of_run(self.processes())
        directory = self.run / "stacks" / time.strftime("%Y%m%d-%H%M%S")
        directory.mkdir(parents=True, exist_ok=True)
        for name, process in stacks.items():
            (directory / f"{name}.txt").write_text(f"{name}, {process.text}")
        self.events.log(
            "stall",
            seconds=round(seconds, 1),
            limit=round(limit, 1),
            action=action,
            stacks=str(directory.relative_to(self.run)),
            processes=list(stacks),
            silent={name: process.state for name, process in stacks.items() if not process.answered},
        )
        message = (
            f"no progress for {seconds:.0f} s (limit {limit:.0f} s) in phase {self.events.phase} of step "
            f"{self.events.step}; stacks are in {directory}: "
            + ", ".join(f"{name} ({process.state})" for name, process in stacks.items())
        )
        log.error(message)
        if action != "report":
            self._asked = since, Stalled(message, action)


@dataclass(frozen=True)
class Stacks:
    """State and stacks of one process.

    `state`: as in /proc/PID/status, for example "S (sleeping)", or "gone". `answered`: it is neither stopped nor gone,
    and its stacks could be read. `text`: what to write down, with py-spy's error where it cannot read the process.
    """

    state: str
    answered: bool
    text: str


def stacks_of(pids: Sequence[int]) -> list[Stacks]:
    """Read the stacks of all `pids` on this machine at the same time, in their order."""
    with ThreadPoolExecutor(max(1, len(pids))) as pool:
        return list(pool.map(_stacks, pids))


def _stacks(pid: int) -> Stacks:
    head = f"pid {pid} on {socket.gethostname()}: "
    try:
        state = re.search(r"^State:\s*(.*)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1]  # type: ignore[index]
    except OSError:
        return Stacks("gone", False, f"{head}gone\n")
    # nonblocking: to pause a stopped process fails
    command = [str(Path(sys.executable).with_name("py-spy")), "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SPY_S)
        stacks, error = done.stdout, done.stderr if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as e:
        stacks, error = "", str(e)
    if error:
        stacks += f"py-spy cannot read it; it may need the permission to trace (CAP_SYS_PTRACE): {error.strip()}\n"
    return Stacks(state, not error and state[0] not in "TtZX", f"{head}{state}\n\n{stacks}")


def stacks_of_run(processes: Sequence[WatchedProcess]) -> dict[str, Stacks]:
    """Return every process's stacks by name; nodes are asked at once, silent ones are named."""
    here, by_node = process_facts()["node"], defaultdict(list)
    for p in processes:
        by_node[here if p.node is None else p.node].append(p)
    local, calls, task = by_node.pop(here, []), {}, ray.remote(num_cpus=0, max_retries=0)(stacks_of)
    for node, group in by_node.items():
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        calls[node] = task.options(scheduling_strategy=there).remote([p.pid for p in group])
    stacks = {p.name: s for p, s in zip(local, stacks_of([p.pid for p in local]), strict=True)}
    if calls:
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=NODE_S)
    for node, call in calls.items():
        stacks |= zip((p.name for p in by_node[node]), _answer(call, by_node[node]), strict=True)
    return stacks


def _answer(call: Any, processes: Sequence[WatchedProcess]) -> list[Stacks]:
    """Return the stacks of another node's processes, or say that it is lost, cut off or late."""
    try:
        return ray.get(call, timeout=0)
    except ray.exceptions.RayError as e:
        ray.cancel(call, force=True)
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        return [Stacks("unknown", False, f"pid {p.pid}: node {p.node} did not answer: {reason}\n") for p in processes]


def processes_of(run: Path) -> list[WatchedProcess]:
    """Return the living processes of this controller's run, as the event log names them."""
    status = RunWatcher(run).read()
    places: list[tuple[str, int | None, str | None]] = [("controller", os.getpid(), None)]
    if status.learners:
        by_rank = zip(status.learners.pids, status.learners.nodes, strict=True)
        places += [(f"learner-{rank}", *place) for rank, place in enumerate(by_rank)]
    places += [(f"engine-{e.engine}", e.pid, e.node) for e in status.engines]
    if status.reward:
        places.append(("reward", status.reward.pid, status.reward.node))
    return [WatchedProcess(name, pid, node) for name, pid, node in places if pid is not None]
