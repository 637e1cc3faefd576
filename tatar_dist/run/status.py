"""Fold the event log of a run (run/events.py) into its history, and read what the run does now.

What an event changes stands in `RunHistory` alone. `RunWatcher` completes it to the `Status` that run/status_view.py
draws and `--json` prints, from the run's files: while it runs, after its end, on any machine. It reads only what was
appended since its last look, so that `--watch` costs little. The report (report/reading.py) and the simulator
(plan/simulate/measured.py) show parts of the history; how an event is worded stands where it is shown.
"""

from __future__ import annotations

import fcntl
import json
import statistics
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tatar_dist.assets import looked_in
from tatar_dist.errors import UserError
from tatar_dist.run.events import FILE as EVENTS
from tatar_dist.run.files import json_lines

METRICS = "metrics.jsonl"
LIVING = ("starting", "running", "stalled")
TAIL_BYTES = 1 << 18  # of metrics.jsonl: more than its last line
RECENT = 20  # finished steps that are kept
TROUBLES = 8  # the last so many are kept
ENDS = {"run/end": "finished", "run/interrupted": "interrupted", "run/failed": "failed"}
ENGINE_STATES = ("ready", "suspect", "dead", "restarting", "stale", "healthy", "gone")
TROUBLE = {
    "engine/suspect", "engine/dead", "engine/gone", "engine/hedged", "learners/failed", "learners/restarting",
    "learners/restored", "reward/failed", "push/late", "checkpoint/skipped", "checkpoint/failed", "node/lost",
    "node/joined", "signal", "stall", "fault",
}  # fmt: skip


@dataclass
class ProcessStatus:
    """Hold what is known of a process. `since`: start of its state; `restarts`: by this controller."""

    state: str = "starting"
    since: float | None = None
    restarts: int = 0
    reason: str | None = None  # of the last trouble


@dataclass
class PlacedStatus(ProcessStatus):
    host: str | None = None
    node: str | None = None
    pid: int | None = None

    def place(self, event: Mapping[str, Any]) -> None:
        """Note where the process runs."""
        self.host, self.node, self.pid = (event.get(k) for k in ("host", "node", "pid"))


@dataclass
class EngineStatus(PlacedStatus):
    engine: int = 0


@dataclass
class LearnersStatus(ProcessStatus):
    world_size: int | None = None
    hosts: list[str | None] = field(default_factory=list)  # this and the next two by rank, as far as known
    nodes: list[str | None] = field(default_factory=list)
    pids: list[int | None] = field(default_factory=list)


@dataclass
class Checkpoint:
    step: int
    path: str
    time: float


@dataclass
class Status:
    """Hold what a run does now. Times are Unix seconds."""

    run: str
    state: str = "starting"  # or running | stalled | finished | interrupted | failed | dead
    reason: str | None = None
    stage: str | None = None
    step: int = 0  # finished steps
    total: int | None = None
    phase: str | None = None
    phase_since: float | None = None
    version: int = 0  # of the weights that the engines hold
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class RunHistory:
    """Fold events, oldest first; `add` continues. Those that do not fit are counted and left out."""

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()) -> None:
        self.now = Status("")  # as far as events tell, without engines and pace
        self.engines: dict[int, EngineStatus] = {}  # since the last start of the run
        self.ends: list[str] = []  # states in which the run ended since its last start
        self.done: deque[tuple[float, float]] = deque(maxlen=RECENT)  # (time, seconds) of finished steps
        self.counts: Counter[str] = Counter()  # by the events' names
        self.engine_counts: dict[int, Counter[str]] = {}  # over all starts of the run
        self.engine_states: dict[int, str] = {}  # the last ones, over all starts of the run
        self.checkpoint_seconds: list[float] = []  # that the loop stood still for each
        self._checkpoint_since: float | None = None
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
        if name in ("phase", *ENDS, "run/start"):  # a run that died in a checkpoint says nothing of how long one takes
            if self._checkpoint_since is not None and name not in ("run/failed", "run/start"):
                self.checkpoint_seconds.append(when - self._checkpoint_since)
            self._checkpoint_since = when if (name, event.get("phase")) == ("phase", "checkpoint") else None
        if s.state == "stalled":
            s.state = "running"  # whatever was logged after it: something moves again
        if name == "run/start":
            self._start(when, event)
        elif name in ENDS:
            s.state, s.reason = ENDS[name], event.get("reason")
            self.ends.append(s.state)
        elif name == "process/started":
            self._started(str(event["name"]), event)
        elif name == "phase":
            s.phase, s.phase_since = event["phase"], when
            if s.stage == "evaluate":
                s.step = int(event["step"])  # answers that are there
        elif name == "step/done":
            s.step = int(event["step"]) + 1
            self.done.append((when, float(event["seconds"])))
        elif name == "push/done":
            s.version = int(event["version"])
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
        s.learners = LearnersStatus(since=when, world_size=learners) if learners else None
        s.reward = PlacedStatus(since=when) if s.stage == "grpo" else None
        self.engines = {i: EngineStatus(since=when, engine=i) for i in range(engines)}
        self.ends.clear()
        self.done.clear()

    def _started(self, name: str, event: Mapping[str, Any]) -> None:
        """Note where a process runs that may not be ready yet."""
        s, (kind, _, index) = self.now, name.partition("-")
        if kind == "learner" and (g := s.learners):
            lists: dict[str, list[Any]] = {"host": g.hosts, "node": g.nodes, "pid": g.pids}
            for key, values in lists.items():
                values.extend([None] * (int(index) + 1 - len(values)))
                values[int(index)] = event.get(key)
        elif kind == "engine" and int(index) in self.engines:
            self.engines[int(index)].place(event)
        elif kind == "reward" and s.reward:
            s.reward.place(event)

    def _engine(self, what: str, when: float, event: Mapping[str, Any]) -> None:
        index = int(event["engine"])
        self.engine_counts.setdefault(index, Counter())[what] += 1
        if what not in ENGINE_STATES:
            return
        self.engine_states[index] = what
        e = self.engines.setdefault(index, EngineStatus(engine=index))
        if what == "restarting" and e.state == "dead":
            e.restarts += 1
        e.state, e.since = what, when
        e.reason = event.get("reason") or e.reason
        if what == "ready":
            e.place(event)
        elif what in ("dead", "gone"):
            e.pid = None

    def _learners(self, what: str, when: float, event: Mapping[str, Any]) -> None:
        group = self.now.learners = self.now.learners or LearnersStatus()
        group.state, group.since = "ready" if what == "restored" else what, when
        group.reason = event.get("reason") or group.reason
        if what == "ready":
            group.world_size = int(event["world_size"])
            group.hosts, group.nodes, group.pids = (list(event.get(k) or []) for k in ("hosts", "nodes", "pids"))
        elif what == "failed":
            group.hosts, group.nodes, group.pids = [], [], []
        elif what == "restarting":
            group.restarts += 1
        elif what == "restored" and event.get("from_step") is not None:
            self.now.step = int(event["from_step"])
            self.done.clear()

    def _reward(self, what: str, when: float, event: Mapping[str, Any]) -> None:
        r = self.now.reward = self.now.reward or PlacedStatus()
        if what == "ready":
            r.restarts += r.state == "failed"
            r.place(event)
        else:
            r.pid, r.reason = None, event.get("reason")
        r.state, r.since = what, when


class RunWatcher:
    """Watch a run directory.

    Raises:
        UserError: it is no run directory.
    """

    def __init__(self, run: Path) -> None:
        self.path = run
        if not any((run / name).is_file() for name in ("config.yaml", EVENTS, METRICS)):
            inside = sorted(p.parent for p in run.glob(f"*/{EVENTS}"))
            hint = f"the runs in it are {', '.join(map(str, inside))}" if inside else "give the output of a run"
            if not run.is_dir():
                raise UserError(f"{run}: not a run directory: no such directory{looked_in(run)}")
            raise UserError(f"{run}: not a run directory (no config.yaml or {EVENTS} in it): {hint}")
        self._offset = 0
        self._history = RunHistory()

    def read(self) -> Status:
        """Return the run as it is now."""
        past, done = self._history, self._history.done
        for line in self._new_lines():
            try:
                past.add(json.loads(line))
            except ValueError:
                past.now.unreadable_lines += 1
        s = deepcopy(past.now)
        s.run, s.engines = str(self.path), deepcopy([past.engines[i] for i in sorted(past.engines)])
        if done:
            s.seconds_per_step = statistics.median(seconds for _, seconds in done)
        if len(done) > 1 and s.total is not None and s.state == "running":
            (first, _), (last, _) = done[0], done[-1]  # with all that happened between the steps
            left = (s.total - s.step) * (last - first) / (len(done) - 1)
            s.eta_seconds = max(0.0, left - (time.time() - last)) if s.step < s.total else 0.0
        s.metrics = self._last_metrics()
        if s.step == 0 and isinstance(s.metrics.get("step"), int):  # a run without an event log
            s.step = s.metrics["step"] + 1
        speed = s.metrics.get("perf/tokens_per_second")
        s.tokens_per_second = speed if isinstance(speed, int | float) else None
        s.checkpoint = self._checkpoint()
        if s.state in LIVING and not self._locked():
            whole = s.started is None and (s.step or (self.path / "metrics.json").is_file())  # it logs no events
            s.state = "finished" if whole else "dead"
        if s.state not in LIVING:
            s.phase = s.phase_since = s.eta_seconds = None
        return s

    def _new_lines(self) -> Iterator[bytes]:
        """Yield the whole lines appended to the event log since the last call."""
        try:
            with open(self.path / EVENTS, "rb") as f:
                f.seek(self._offset)
                for line in f:
                    if not line.endswith(b"\n"):
                        return  # still being written
                    self._offset += len(line)
                    yield line
        except FileNotFoundError:
            return

    def _last_metrics(self) -> dict[str, Any]:
        rows = json_lines(self.path / METRICS, tail=TAIL_BYTES)
        return rows[-1] if rows else {}

    def _checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint that `latest` points to."""
        latest = self.path / "checkpoints" / "latest"
        try:
            state = latest / "state.json"
            return Checkpoint(int(json.loads(state.read_text())["step"]), str(latest.resolve()), state.stat().st_mtime)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _locked(self) -> bool:
        """Whether a process has the run open (run/directory.py)."""
        try:
            with open(self.path / ".lock") as f:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)  # closing the file lets go of it
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False
