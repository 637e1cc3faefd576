"""What a run is doing, from its files alone: works while it runs, after its end, and on a machine that has none of it.

In: a run directory (events.jsonl, metrics.jsonl, config.yaml, checkpoints/, .lock). Out: `Status`, which
`run/status_view.py` draws and `--json` prints. Lines that a crash cut off or that hold something else are counted, not
guessed at. `RunFiles` reads only what was appended since its last look, so that `--watch` costs nothing.
"""

from __future__ import annotations

import fcntl
import json
import statistics
import time
from collections import deque
from collections.abc import Iterator
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
RECENT = 20  # steps behind seconds a step and the time left
TROUBLES = 8  # the last so many are kept
TAIL_BYTES = 1 << 18  # of metrics.jsonl: more than its last line
ENDS = {"run/end": "finished", "run/interrupted": "interrupted", "run/failed": "failed"}
ENGINE_EVENTS = ("ready", "suspect", "dead", "restarting", "stale", "healthy", "gone")
TROUBLE = {
    "engine/suspect", "engine/dead", "engine/gone", "engine/hedged", "learners/failed", "learners/restarting",
    "learners/restored", "reward/failed", "push/late", "checkpoint/skipped", "checkpoint/failed", "node/lost",
    "node/joined", "signal", "stall", "fault",
}  # fmt: skip


@dataclass
class Process:
    """Of any kind, as last heard of. `since`: when it came into its state. `restarts`: those by this controller."""

    state: str = "starting"
    since: float | None = None
    restarts: int = 0
    reason: str | None = None  # of the last trouble


@dataclass
class Engine(Process):
    engine: int = 0
    host: str | None = None
    node: str | None = None
    pid: int | None = None


@dataclass
class Learners(Process):
    world_size: int | None = None
    hosts: list[str | None] = field(default_factory=list)  # this and the next two by rank, as far as known
    nodes: list[str | None] = field(default_factory=list)
    pids: list[int | None] = field(default_factory=list)


@dataclass
class Reward(Process):
    host: str | None = None
    node: str | None = None
    pid: int | None = None


@dataclass
class Checkpoint:
    step: int
    path: str
    time: float


@dataclass
class Status:
    """Times are Unix seconds. `state`: starting | running | stalled | finished | interrupted | failed | dead."""

    run: str
    state: str = "starting"
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
    engines: list[Engine] = field(default_factory=list)
    learners: Learners | None = None
    reward: Reward | None = None
    metrics: dict[str, Any] = field(default_factory=dict)  # the last line of metrics.jsonl
    troubles: list[dict[str, Any]] = field(default_factory=list)  # the last events of faults and recoveries
    stalls: int = 0
    unreadable_lines: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class RunFiles:
    """A run directory, looked at again and again.

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
        self._reader = EventReader()

    def read(self) -> Status:
        """The run as it is now."""
        for line in self._new_lines():
            self._reader.line(line)
        s = self._reader.status(str(self.path))
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
        """Whole lines that were appended to the event log since the last call."""
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
        """What `latest` points to."""
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


class EventReader:
    """Folds the event log into a `Status`, line by line (run/events.py says what stands in it)."""

    def __init__(self) -> None:
        self._status = Status("")
        self._engines: dict[int, Engine] = {}
        self._troubles: deque[dict[str, Any]] = deque(maxlen=TROUBLES)
        self._done: deque[tuple[float, float]] = deque(maxlen=RECENT)  # (when, seconds) of finished steps

    def line(self, line: bytes) -> None:
        try:
            event = json.loads(line)
            event["time"] = float(event["time"])
            self._apply(str(event["event"]), event["time"], event)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            self._status.unreadable_lines += 1

    def status(self, run: str) -> Status:
        s = deepcopy(self._status)
        s.run = run
        s.engines = [deepcopy(self._engines[i]) for i in sorted(self._engines)]
        s.troubles = list(self._troubles)
        if self._done:
            s.seconds_per_step = statistics.median(seconds for _, seconds in self._done)
        if len(self._done) > 1 and s.total is not None and s.state == "running":
            (first, _), (last, _) = self._done[0], self._done[-1]  # with all that happened between the steps
            left = (s.total - s.step) * (last - first) / (len(self._done) - 1)
            s.eta_seconds = max(0.0, left - (time.time() - last)) if s.step < s.total else 0.0
        return s

    def _apply(self, name: str, when: float, event: dict[str, Any]) -> None:
        s, (subject, _, what) = self._status, name.partition("/")
        if s.state == "stalled":
            s.state = "running"  # whatever was logged after it: something moves again
        if name == "run/start":
            self._start(when, event)
        elif name in ENDS:
            s.state, s.reason = ENDS[name], event.get("reason")
        elif name == "process/started":
            self._started(str(event["name"]), event)
        elif name == "phase":
            s.phase, s.phase_since = event["phase"], when
            if s.stage == "evaluate":
                s.step = int(event["step"])  # answers that are there
        elif name == "step/done":
            s.step = int(event["step"]) + 1
            self._done.append((when, float(event["seconds"])))
        elif name == "push/done":
            s.version = int(event["version"])
        elif name == "stall":
            s.stalls, s.state = s.stalls + 1, "stalled"
        elif subject == "engine" and what in ENGINE_EVENTS:
            self._engine(what, when, event)
        elif subject == "learners":
            self._learners(what, when, event)
        elif subject == "reward":
            self._reward(what, when, event)
        s.last_event = when
        if name in TROUBLE:
            self._troubles.append(event)

    def _start(self, when: float, event: dict[str, Any]) -> None:
        """A new controller: all processes are new, the numbers of faults stay."""
        s = self._status
        first, engines, learners = (int(event.get(k) or 0) for k in ("from_step", "engines", "learners"))
        s.state, s.reason, s.started, s.phase = "running", None, when, None
        s.stage, s.host, s.pid, s.total = (event.get(k) for k in ("stage", "host", "pid", "total"))
        s.step = s.version = first
        s.learners = Learners(since=when, world_size=learners) if learners else None
        s.reward = Reward(since=when) if s.stage == "grpo" else None
        self._engines = {i: Engine(since=when, engine=i) for i in range(engines)}
        self._done.clear()

    def _started(self, name: str, event: dict[str, Any]) -> None:
        """A process of the run exists; whether it is ready is another matter."""
        s, (kind, _, index) = self._status, name.partition("-")
        host, node, pid = (event.get(k) for k in ("host", "node", "pid"))
        if kind == "learner" and s.learners:
            for values, value in ((s.learners.hosts, host), (s.learners.nodes, node), (s.learners.pids, pid)):
                values.extend([None] * (int(index) + 1 - len(values)))
                values[int(index)] = value
        elif kind == "engine" and int(index) in self._engines:
            e = self._engines[int(index)]
            e.host, e.node, e.pid = host, node, pid
        elif kind == "reward" and s.reward:
            s.reward.host, s.reward.node, s.reward.pid = host, node, pid

    def _engine(self, what: str, when: float, event: dict[str, Any]) -> None:
        index = int(event["engine"])
        e = self._engines.setdefault(index, Engine(engine=index))
        if what == "restarting" and e.state == "dead":
            e.restarts += 1
        e.state, e.since = what, when
        e.reason = event.get("reason") or e.reason
        if what == "ready":
            e.host, e.node, e.pid = (event.get(k) for k in ("host", "node", "pid"))
        elif what in ("dead", "gone"):
            e.pid = None

    def _learners(self, what: str, when: float, event: dict[str, Any]) -> None:
        group = self._status.learners = self._status.learners or Learners()
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
            self._status.step = int(event["from_step"])
            self._done.clear()

    def _reward(self, what: str, when: float, event: dict[str, Any]) -> None:
        r = self._status.reward = self._status.reward or Reward()
        if what == "ready":
            r.restarts += r.state == "failed"
            r.host, r.node, r.pid = (event.get(k) for k in ("host", "node", "pid"))
        else:
            r.pid, r.reason = None, event.get("reason")
        r.state, r.since = what, when
