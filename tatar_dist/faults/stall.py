"""Detect that a run makes no progress, record what all its processes are doing, and act as configured.

Progress is a call of `progress()` (a group returned, a bucket was pushed) or `step(seconds)`. Without one for
max(watch.stall_min_s, watch.stall_factor × median step) the event `stall` is logged, RUN/stacks/TIME/NAME.txt is
written for every process on every node, and with watch.stall_action `restart` or `stop` the controller's next
`raise_if_asked()` raises `Stalled`. There is one dump per stall; progress arms it again.
"""

from __future__ import annotations

import logging
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tatar_dist.config.schema import WatchConfig
from tatar_dist.errors import RunError
from tatar_dist.faults.stacks import Stacks, stacks_of
from tatar_dist.run.events import Events
from tatar_dist.run.process import process_facts
from tatar_dist.run.status import RunWatcher

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
        self._last = clock()
        self._dumped = False  # this stall was dealt with
        self._asked: Stalled | None = None
        self._lock = threading.Lock()
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
        """Note that something moved."""
        with self._lock:
            self._last, self._dumped, self._asked = self.clock(), False, None

    def step(self, seconds: float) -> None:
        """Note that a step is finished and how long it took."""
        self._steps.append(seconds)
        self.progress()

    def starting(self) -> None:
        """Use the limit of a start until the next step is finished: processes start, perhaps again."""
        self._steps.clear()
        self.progress()

    def raise_if_asked(self) -> None:
        """Raise Stalled, once a stall, when watch.stall_action is restart or stop."""
        with self._lock:
            asked, self._asked = self._asked, None
        if asked is not None:
            raise asked

    def limit(self) -> float:
        """Return how many seconds without progress are a stall now."""
        if not self._steps:
            return max(self.config.stall_min_s, self.first_s)
        return max(self.config.stall_min_s, self.config.stall_factor * statistics.median(self._steps))

    def _watch(self) -> None:
        wait = 0.0
        while not self._end.wait(wait):
            left = self._last + self.limit() - self.clock()
            if left <= 0 and not self._dumped:
                try:
                    self._stall()
                except Exception:  # the watch goes on; a full disk or a lost node must not end it
                    log.exception("the stall could not be written down")
            wait = min(max(left, 0.05), 1.0)

    def _stall(self) -> None:
        with self._lock:
            since, self._dumped = self._last, True
        seconds, limit, action = self.clock() - since, self.limit(), self.config.stall_action
        stacks = stacks_of_run(self.processes())
        directory = self.run / "stacks" / time.strftime("%Y%m%d-%H%M%S")
        directory.mkdir(parents=True, exist_ok=True)
        for name, process in stacks.items():
            (directory / f"{name}.txt").write_text(f"{name}, {process.text}")
        silent = {name: process.state for name, process in stacks.items() if not process.answered}
        self.events.log(
            "stall",
            seconds=round(seconds, 1),
            limit=round(limit, 1),
            action=action,
            stacks=str(directory.relative_to(self.run)),
            processes=list(stacks),
            silent=silent,
        )
        message = (
            f"no progress for {seconds:.0f} s (limit {limit:.0f} s) in phase {self.events.phase} of step "
            f"{self.events.step}; stacks of {', '.join(stacks)} are in {directory}"
        )
        if silent:
            message += "; stopped, gone or unreadable: " + ", ".join(
                f"{name} ({state})" for name, state in silent.items()
            )
        log.error(message)
        with self._lock:
            if action != "report" and self._last == since:
                self._asked = Stalled(message, action)


def stacks_of_run(processes: Sequence[WatchedProcess]) -> dict[str, Stacks]:
    """Return the stacks of every process by name; all nodes are asked at once, one that does not answer is named."""
    here, deadline = process_facts()["node"], time.monotonic() + NODE_S
    nodes: dict[str | None, list[WatchedProcess]] = {}
    for p in processes:
        nodes.setdefault(None if p.node == here else p.node, []).append(p)
    asked = {node: _ask_node(node, [p.pid for p in group]) for node, group in nodes.items() if node is not None}
    stacks: dict[str, Stacks] = {}
    for node, group in nodes.items():
        pids = [p.pid for p in group]
        answer = stacks_of(pids) if node is None else _answer(asked[node], node, pids, deadline - time.monotonic())
        stacks |= zip((p.name for p in group), answer, strict=True)
    return {p.name: stacks[p.name] for p in processes}


def _ask_node(node: str, pids: list[int]) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(stacks_of)
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return task.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(pids)


def _answer(ref: Any, node: str, pids: list[int], timeout: float) -> list[Stacks]:
    import ray

    try:
        return ray.get(ref, timeout=max(0.0, timeout))
    except ray.exceptions.RayError as e:  # the node is lost, cut off or out of memory
        ray.cancel(ref, force=True)
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        return [Stacks("unknown", False, f"pid {pid}: node {node} did not answer: {reason}\n") for pid in pids]


def processes_of(run: Path) -> list[WatchedProcess]:
    """Return the living processes of this controller's run, as the event log names them."""
    s = RunWatcher(run).read()
    processes: list[tuple[str, int | None, str | None]] = [("controller", os.getpid(), None)]
    if s.learners:
        places = zip(s.learners.pids, s.learners.nodes, strict=True)
        processes += [(f"learner-{rank}", *place) for rank, place in enumerate(places)]
    processes += [(f"engine-{e.engine}", e.pid, e.node) for e in s.engines]
    if s.reward:
        processes.append(("reward", s.reward.pid, s.reward.node))
    return [WatchedProcess(name, pid, node) for name, pid, node in processes if pid is not None]
