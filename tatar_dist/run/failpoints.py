"""Failpoints: named places in the code where a test or a chaos run makes a process die or hang, once.

`failpoints: ["learner.backward:kill:step=2:rank=1"]` in the config: the learner of rank 1 sends itself SIGKILL in the
backward of step 2. Nothing is imitated: the signal is real, and so is what the others see. Each entry fires once in a
run's life, also over restarts: the process that fires it leaves a marker in RUN/.failpoints first, and says so in the
event log. Without entries a failpoint costs one look into an empty tuple.

    entry   POINT:ACTION[:KEY=VALUE…]       action: kill (SIGKILL), stop (SIGSTOP), raise (RuntimeError)
    points  engine.generate     step, engine
            engine.update       version, engine
            learner.backward    step, rank
            learner.gather      rank
            reward.score        step
            controller.PHASE    step; PHASE: generate, reward, learn, sync, checkpoint, evaluate
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tatar_dist.errors import UserError
from tatar_dist.run.events import Events

ACTIONS = ("kill", "stop", "raise")


@dataclass(frozen=True)
class Failpoint:
    """One parsed entry."""

    text: str
    point: str
    action: str
    where: dict[str, str]


def parse(entry: str) -> Failpoint:
    """Raises UserError: not POINT:ACTION[:KEY=VALUE…]."""
    point, _, rest = entry.partition(":")
    action, *conditions = rest.split(":")
    pairs = [c.partition("=") for c in conditions]
    if not point or action not in ACTIONS or any(not sep for _, sep, _ in pairs):
        raise UserError(
            f"failpoints: {entry!r}: expected POINT:ACTION[:KEY=VALUE…], action one of {', '.join(ACTIONS)}"
        )
    return Failpoint(entry, point, action, {k: v for k, _, v in pairs})


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
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        Events(self.run).log("fault", point=f.point, action=f.action, pid=os.getpid(), **{**self.known, **facts})
        if f.action == "raise":
            raise RuntimeError(f"failpoint {f.text}")
        os.kill(os.getpid(), signal.SIGKILL if f.action == "kill" else signal.SIGSTOP)
