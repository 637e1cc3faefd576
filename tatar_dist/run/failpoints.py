"""Failpoints: named places in the code where a test or chaos run kills or hangs a process.

`failpoints: ["learner.backward:kill:step=2:rank=1"]` in the config: the learner of rank 1 sends itself SIGKILL in the
backward of step 2. Each entry fires once in a run's life, also over restarts: the process that fires it first leaves a
marker in RUN/.failpoints and an event in the event log.

    entry   POINT:ACTION[:KEY=VALUE…]       action: kill (SIGKILL), stop (SIGSTOP), raise (RuntimeError)
    points  engine.generate     step, engine
            engine.update       version, engine
            learner.backward    step, rank
            learner.gather      rank
            learner.flip        rank
            reward.score        step
            controller.PHASE    step; PHASE as in the event log (events.py)
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tatar_dist.errors import UserError
from tatar_dist.run.events import Events

_ENTRY = re.compile(r"([^:]+):(kill|stop|raise)((?::[^:=]+=[^:]*)*)")


class Failpoint(NamedTuple):
    text: str
    point: str
    action: str
    where: dict[str, str]


def parse(entry: str) -> Failpoint:
    """Parse an entry. Raises UserError if it is not of the form above."""
    parts = _ENTRY.fullmatch(entry)
    if parts is None:
        raise UserError(f"failpoints: {entry!r}: expected POINT:ACTION[:KEY=VALUE…], action one of kill, stop, raise")
    where = dict(condition.split("=", 1) for condition in parts[3].split(":")[1:])
    return Failpoint(entry, parts[1], parts[2], where)


class Failpoints:
    """The failpoints of one process. `known` are facts about it, for example rank=1."""

    def __init__(self, entries: Sequence[str], run: str, **known: object) -> None:
        self._armed = tuple(parse(e) for e in entries)
        self.run, self.known = Path(run), known

    def reach(self, point: str, **facts: object) -> None:
        """Fire what is armed for this place and these facts."""
        for f in self._armed:
            if f.point == point and all(str({**self.known, **facts}.get(k)) == v for k, v in f.where.items()):
                self._fire(f, facts)

    def _fire(self, f: Failpoint, facts: dict[str, object]) -> None:
        marker = self.run / ".failpoints" / f.text.replace("/", "_")
        marker.parent.mkdir(exist_ok=True)
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return
        Events(self.run).log("fault", point=f.point, action=f.action, pid=os.getpid(), **{**self.known, **facts})
        if f.action == "raise":
            raise RuntimeError(f"failpoint {f.text}")
        os.kill(os.getpid(), signal.SIGKILL if f.action == "kill" else signal.SIGSTOP)
