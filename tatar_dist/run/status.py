"""Fold a run's event log (run/events.py) into its history, and read what the run does now.

`RunHistory` defines what an event changes; report/reading.py and plan/simulate/measured.py use parts of it.
`RunWatcher` completes it, from the run's other files, to the `Status` that run/status_view.py draws and `--json`
prints.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tatar_dist.assets import looked_in
from tatar_dist.errors import UserError
from tatar_dist.run.events import FILE as EVENTS
from tatar_dist.run.files import json_lines, lock

METRICS = "metrics.jsonl"
LIVING = ("starting", "running", "stalled")
TAIL_BYTES = 1 << 18  # of metrics.jsonl: more than its last line
RECENT = 20  # finished steps that are kept
JUMP = 100  # median gaps between steps: a longer one is a jump of the clock, or comes once
TROUBLES = 8  # the last so many are kept
ENDS = {"run/end": "finished", "run/interrupted": "interrupted", "run/failed": "failed"}
TROUBLE = {
    "engine/suspect", "engine/dead", "engine/gone", "engine/hedged", "learners/failed", "learners/restarting",
    "learners/restored", "reward/failed", "push/late", "push/fallback", "checkpoint/skipped",
    "checkpoint/failed", "share/low", "step/skipped", "node/lost", "node/joined", "signal", "stall", "fault",
}  # fmt: skip


@dataclass
class ProcessStatus:
    """State of a process. `since`: its start; `restarts`: of this controller; `reason`: trouble."""

    state: str = "starting"
    since: float | None = None
    restarts: int = 0
    reason: str | None = None

    def enter(self, state: str, when: float, event: Mapping[str, Any]) -> None:
        self.state, self.since, self.reason = state, when, event.get("reason") or self.reason


@dataclass
class PlacedStatus(ProcessStatus):
    host: str | None = None
    node: str | None = None
    pid: int | None = None
    gpu: str | None = None

    def place(self, event: Mapping[str, Any]) -> None:
        """Note where the process runs."""
        self.host, self.node, self.pid, self.gpu = (event.get(k) for k in ("host", "node", "pid", "gpu"))

    def enter(self, state: str, when: float, event: Mapping[str, Any]) -> None:
        super().enter(state, when, event)
        if state == "ready":
            self.place(event)
        elif state in ("dead", "gone", "failed"):
            self.pid = None  # host and node stay: somebody will ask where it died


@dataclass
class EngineStatus(PlacedStatus):
    engine: int = 0


@dataclass
class LearnersStatus(ProcessStatus):
    """State of all learners together. hosts, nodes, pids, gpus: by rank, as far as known."""

    world_size: int | None = None
    hosts: list[str | None] = field(default_factory=list)
    nodes: list[str | None] = field(default_factory=list)
    pids: list[int | None] = field(default_factory=list)
    gpus: list[str | None] = field(default_factory=list)


@dataclass
class Checkpoint:
    step: int
    path: str
    time: float


@dataclass
class Status:
    """What a run does now. Times are Unix seconds."""

    run: str
    state: str = "starting"  # or running | stalled | finished | interrupted | failed | dead
    reason: str | None = None
    stage: str | None = None
    step: int = 0  # finished steps; of an evaluation, answers
    total: int | None = None
    phase: str | None = None
    phase_since: float | None = None
    version: int = 0  # of the weights that the engines hold
    push: str | None = None  # the way that they come by
    push_checked: bool = False  # before training
    host: str | None = None
    pid: int | None = None
    started: float | None = None
    last_event: float | None = None
    seconds_per_step: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    checkpoint: Checkpoint | None = None
    engines: list[EngineStatus] = field(default_factory=list)
    learners: LearnersStatus | None = None
    reward: PlacedStatus | None = None
    metrics: dict[str, Any] = field(default_factory=dict)  # the last line of metrics.jsonl
    troubles: list[dict[str, Any]] = field(default_factory=list)  # the last events of faults and recoveries
    stalls: int = 0
    unreadable_lines: int = 0


class RunHistory:
    """Fold events, oldest first; `add` continues. Unusable events are counted and left out."""

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()) -> None:
        self.now = Status("")  # as far as events tell, without engines and pace
        self.engines: dict[int, EngineStatus] = {}  # since the last start of the run
        self.done: deque[tuple[float, float]] = deque(maxlen=RECENT)  # (time, seconds) of finished steps
        self.counts: Counter[str] = Counter()  # by the events' names
        self.engine_counts: dict[int, Counter[str]] = {}  # over all starts of the run
        self.checkpoint_seconds: list[float] = []  # that the loop stood still for each
        for event in events:
            self.add(event)

    def add(self, event: Mapping[str, Any]) -> None:
        try:
            when, name = float(event["time"]), str(event["event"])
            self.counts[name] += 1
            self._apply(name, when, event)
            if name in TROUBLE:
                self.now.troubles = [*self.now.troubles, {**event, "time": when}][-TROUBLES:]
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            self.now.unreadable_lines += 1

    def _apply(self, name: str, when: float, event: Mapping[str, Any]) -> None:
        s, (subject, _, what) = self.now, name.partition("/")
        if s.state == "stalled":
            s.state = "running"  # whatever was logged after it: something moves again
        if s.phase == "checkpoint" and s.phase_since and name in ("phase", "run/end", "run/interrupted"):
            self.checkpoint_seconds.append(when - s.phase_since)
        if name == "run/start":
            self._start(when, event)
        elif name in ENDS:
            s.state, s.reason, s.phase = ENDS[name], event.get("reason"), None
        elif name == "process/started":
            self._started(str(event["name"]), event)
        elif name == "phase":
            s.phase, s.phase_since = event["phase"], when
            if s.stage == "evaluate":
                s.step = int(event["step"])
        elif name == "step/done":
            s.step = int(event["step"]) + 1
            self.done.append((when, float(event["seconds"])))
        elif name == "push/done":
            s.version = int(event["version"])
        elif name == "push/checked":
            s.push, s.push_checked = event["way"], True
        elif name == "push/fallback":
            s.push, s.push_checked = "object_store", False
        elif name == "stall":
            s.stalls, s.state = self.counts[name], "stalled"
        elif subject == "engine":
            self._engine(what, when, event)
        elif subject == "learners":
            self._learners(what, when, event)
        elif subject == "reward":
            self._reward(what, when, event)
        s.last_event = when

    def _start(self, when: float, event: Mapping[str, Any]) -> None:
        """Begin with a new controller: all processes are new, the numbers of faults stay."""
        s = self.now
        first, engines, learners = (int(event.get(k) or 0) for k in ("from_step", "engines", "learners"))
        s.state, s.reason, s.started, s.phase, s.phase_since = "running", None, when, None, None
        s.stage, s.host, s.pid, s.total = (event.get(k) for k in ("stage", "host", "pid", "total"))
        s.step = s.version = first
        s.push, s.push_checked = event.get("push"), False
        s.learners = LearnersStatus(since=when, world_size=learners) if learners else None
        s.reward = PlacedStatus(since=when) if s.stage == "grpo" else None
        self.engines = {i: EngineStatus(since=when, engine=i) for i in range(engines)}
        self.done.clear()

    def _started(self, name: str, event: Mapping[str, Any]) -> None:
        """Note where a process runs that may not be ready yet."""
        s, (kind, _, index) = self.now, name.partition("-")
        if kind == "learner" and s.learners:
            for key in ("host", "node", "pid", "gpu"):
                values = getattr(s.learners, f"{key}s")
                values.extend([None] * (int(index) + 1 - len(values)))
                values[int(index)] = event.get(key)
        elif kind == "engine" and int(index) in self.engines:
            self.engines[int(index)].place(event)
        elif kind == "reward" and s.reward:
            s.reward.place(event)

    def _engine(self, what: str, when: float, event: Mapping[str, Any]) -> None:
        index = int(event["engine"])
        self.engine_counts.setdefault(index, Counter())[what] += 1
        if what != "hedged":  # the only one that is no state
            engine = self.engines.setdefault(index, EngineStatus(engine=index))
            engine.restarts += what == "restarting"
            engine.enter(what, when, event)

    def _reward(self, what: str, when: float, event: Mapping[str, Any]) -> None:
        actor = self.now.reward = self.now.reward or PlacedStatus()
        actor.restarts += (actor.state, what) == ("failed", "ready")
        actor.enter(what, when, event)

    def _learners(self, what: str, when: float, event: Mapping[str, Any]) -> None:
        group = self.now.learners = self.now.learners or LearnersStatus()
        group.enter("ready" if what == "restored" else what, when, event)
        group.restarts += what == "restarting"
        if what in ("ready", "failed"):
            for key in ("hosts", "nodes", "pids", "gpus"):
                setattr(group, key, list(event.get(key) or []))
        if what == "ready":
            group.world_size = int(event["world_size"])
        elif what == "restored":
            self.now.step = int(event["from_step"])
            self.done.clear()


class RunWatcher:
    """Watch a run directory. `read` parses only the events appended since the last call.

    Raises:
        UserError: it is no run directory.
    """

    def __init__(self, run: Path) -> None:
        self.path = run
        if not run.is_dir():
            raise UserError(f"{run}: not a run directory: no such directory{looked_in(run)}")
        if not any((run / name).is_file() for name in ("config.yaml", EVENTS)):
            inside = sorted(p.parent for p in run.glob(f"*/{EVENTS}"))
            hint = f"the runs in it are {', '.join(map(str, inside))}" if inside else "give the output of a run"
            raise UserError(f"{run}: not a run directory (no config.yaml or {EVENTS} in it): {hint}")
        self._offset = 0
        self._history = RunHistory()

    def read(self) -> Status:
        """Return the run as it is now. It shares records with the history: read again for changes."""
        past, done = self._history, self._history.done
        for line in self._new_lines():
            try:
                past.add(json.loads(line))
            except ValueError:
                past.now.unreadable_lines += 1
        s = replace(past.now, run=str(self.path), engines=[past.engines[i] for i in sorted(past.engines)])
        if done:
            s.seconds_per_step = statistics.median(seconds for _, seconds in done)
        if len(done) > 1 and s.total is not None and s.state == "running":
            # with all that happened between the steps, but no jump of the clock
            gaps = [max(seconds, now - before) for (before, _), (now, seconds) in pairwise(done)]
            pace = statistics.mean(gap for gap in gaps if gap <= JUMP * statistics.median(gaps))
            since = max(0.0, time.time() - done[-1][0])
            s.eta_seconds = max(0.0, (s.total - s.step) * pace - since) if s.step < s.total else 0.0
        s.metrics = next(reversed(json_lines(self.path / METRICS, tail=TAIL_BYTES)), {})
        speed = s.metrics.get("perf/tokens_per_second")
        s.tokens_per_second = speed if isinstance(speed, int | float) else None
        s.checkpoint = self._checkpoint()
        if s.state in LIVING and not self._is_open():
            s.state = "dead"
        if s.state not in LIVING:
            s.phase = s.phase_since = s.eta_seconds = None
        return s

    def _new_lines(self) -> list[bytes]:
        """Return the complete lines appended to the event log since the last call."""
        if not (self.path / EVENTS).exists():
            return []
        with open(self.path / EVENTS, "rb") as f:
            f.seek(self._offset)
            *lines, rest = f.read().split(b"\n")
            self._offset = f.tell() - len(rest)
        return lines

    def _checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint that `latest` points to."""
        latest = self.path / "checkpoints" / "latest"
        try:
            state = latest / "state.json"
            return Checkpoint(int(json.loads(state.read_text())["step"]), str(latest.resolve()), state.stat().st_mtime)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _is_open(self) -> bool:
        """Return whether a process has the run open (run/directory.py)."""
        file = self.path / ".lock"
        if not file.exists():
            return False
        with open(file) as f:
            return not lock(f, shared=True)
