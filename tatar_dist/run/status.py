"""Read what a run is doing from its files alone: while it runs, after its end, on any machine.

`RunWatcher` completes the history of events (run/history.py) to the `Status` that run/status_view.py draws and `--json`
prints. It reads only what was appended since its last look, so that `--watch` costs little.
"""

from __future__ import annotations

import fcntl
import json
import statistics
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from tatar_dist.assets import looked_in
from tatar_dist.errors import UserError
from tatar_dist.run.events import FILE as EVENTS
from tatar_dist.run.files import json_lines
from tatar_dist.run.history import Checkpoint, RunHistory, Status

METRICS = "metrics.jsonl"
LIVING = ("starting", "running", "stalled")
TAIL_BYTES = 1 << 18  # of metrics.jsonl: more than its last line


class RunWatcher:
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
        self._history = RunHistory()

    def read(self) -> Status:
        """The run as it is now."""
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
