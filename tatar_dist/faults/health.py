"""State of one rollout engine. Pure: no Ray, no own clock. Changes are logged as events.

    RESTARTING ──ready──▶ STALE ──weight push──▶ HEALTHY ──late──▶ SUSPECT ──answers──▶ HEALTHY or STALE
        ▲                   │                       │                 │
        └──back-off── DEAD ◀┴───── died, failed, garbage, later ──────┘         DEAD ──restarts used up──▶ GONE

Only a weight push leads from STALE to HEALTHY: a restarted engine holds the weights of `model.path`, and one that
missed a push holds old ones. Where nobody trains, those of `model.path` are the right ones (`pool.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

MAX_BACKOFF_S = 60.0


class State(StrEnum):
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DEAD = "dead"
    RESTARTING = "restarting"
    STALE = "stale"
    GONE = "gone"


LIVING = (State.RESTARTING, State.STALE, State.HEALTHY, State.SUSPECT)
ALLOWED = {
    State.RESTARTING: {State.STALE, State.DEAD},
    State.STALE: {State.HEALTHY, State.DEAD},
    State.HEALTHY: {State.SUSPECT, State.STALE, State.DEAD},
    State.SUSPECT: {State.HEALTHY, State.STALE, State.DEAD},
    State.DEAD: {State.RESTARTING, State.GONE},
    State.GONE: set(),
}


@dataclass
class Health:
    """Health of engine `index`, at first RESTARTING: the first start is handled like any other.

    Attributes:
        restarts: consecutive restarts without an answer between them.
        retry_at: when DEAD, the monotonic time of the next restart.
    """

    index: int
    max_restarts: int
    backoff_s: float
    log: Callable[..., None]  # logs an event
    state: State = State.RESTARTING
    restarts: int = 0
    retry_at: float = 0.0
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)  # pid, host, node of the living process

    def _to(self, state: State, **fields: Any) -> None:
        if state not in ALLOWED[self.state]:
            raise ValueError(f"engine {self.index}: {self.state} cannot become {state}")
        self.state = state
        self.log(f"engine/{state}", engine=self.index, **fields)

    def ready(self, **facts: Any) -> None:
        """Become STALE: the process answers, but its weights are not known to be current."""
        self.facts = facts
        self.log("engine/ready", engine=self.index, **facts)
        self._to(State.STALE)

    def current(self) -> None:
        """Turn STALE into HEALTHY: the engine got the current weights by a push or from files."""
        if self.state is State.STALE:
            self._to(State.HEALTHY)

    def late(self, seconds: float) -> None:
        self.reason = f"no answer for {seconds:g} s"
        self._to(State.SUSPECT, reason=self.reason, **self.facts)

    def missed_push(self) -> None:
        self._to(State.STALE)

    def answered(self, current: bool) -> None:
        """Record that a call returned. `current`: the engine holds the pool's weight version."""
        self.restarts = 0
        if self.state is State.SUSPECT:
            self._to(State.HEALTHY if current else State.STALE)

    def died(self, reason: str, now: float) -> None:
        """Become DEAD until a restart is due, or GONE if none is left: the process died or is ended."""
        self.reason = reason
        self._to(State.DEAD, reason=reason, **self.facts)
        self.facts = {}
        if self.restarts >= self.max_restarts:
            self._to(State.GONE, reason=f"{self.restarts} restarts in a row, the last end: {reason}")
            return
        self.retry_at = now + min(MAX_BACKOFF_S, self.backoff_s * 2**self.restarts)

    def due(self, now: float) -> bool:
        return self.state is State.DEAD and now >= self.retry_at

    def restarting(self) -> None:
        self.restarts += 1
        self._to(State.RESTARTING, attempt=self.restarts)
