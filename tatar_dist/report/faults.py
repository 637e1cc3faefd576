"""Summarise faults and recoveries of a run's processes: a log by time, and counts per engine.

Events are not validated and may hold any fields; run/status.py defines their meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tatar_dist.report.reading import clean, is_number
from tatar_dist.run.status import ENDS, TROUBLE, RunHistory

SHOWN = TROUBLE | ENDS.keys() | {"run/start", "engine/restarting"}
MOST_ROWS = 200
MOST_CHARS = 160  # of one reason
COUNTED = {  # event -> (one, several), as the health check says it
    "engine/dead": ("engine failure", "engine failures"),
    "engine/suspect": ("slow engine", "slow engines"),
    "learners/failed": ("learner failure", "learner failures"),
    "reward/failed": ("reward actor failure", "reward actor failures"),
    "node/lost": ("node lost", "nodes lost"),
    "push/late": ("late weight push", "late weight pushes"),
    "stall": ("stall", "stalls"),
    "checkpoint/failed": ("checkpoint not written", "checkpoints not written"),
    "run/failed": ("failed start", "failed starts"),
}
STATES = {"ready": "healthy", "stale": "behind", "gone": "given up"}
LEFT_OUT = {"time", "event", "step", "phase", "pid", "host", "node", "stacks", "processes", "silent", "hosts", "pids"}


@dataclass(frozen=True)
class FaultEntry:
    """One log line. seconds: since the first event of the run; `bad`: a fault, not a recovery or a start."""

    seconds: float
    step: int | None
    what: str
    detail: str
    bad: bool


@dataclass(frozen=True)
class EngineHealth:
    """Event counts of one engine; `state`: its last reported state."""

    engine: int
    loads: int
    dead: int
    suspect: int
    hedged: int
    state: str


@dataclass(frozen=True)
class History:
    """Faults of a run. entries: at most MOST_ROWS, oldest first; hidden: number of entries not shown.
    summary: `4 engine failures, 1 stall`, or "". progress: `It stopped after 13 of 60 steps.`, "" once finished."""

    entries: list[FaultEntry]
    hidden: int
    engines: list[EngineHealth]
    summary: str
    progress: str


def history(events: Sequence[Mapping[str, Any]], steps: int) -> History | None:
    """Build the history of a run; None without events. steps: finished steps, as counted in metrics.jsonl."""
    known = [e for e in events if is_number(e.get("time")) and isinstance(e.get("event"), str)]
    if not known:
        return None
    past = RunHistory(known)
    shown = [_entry(e, known[0]["time"]) for e in known if e["event"] in SHOWN]
    parts = [f"{n:,} {names[n > 1]}" for k, names in COUNTED.items() if (n := past.counts[k])]
    engines = [
        EngineHealth(i, c["ready"], c["dead"], c["suspect"], c["hedged"], STATES.get(last, last))
        for i, c in sorted(past.engine_counts.items())
        for last in [past.engines[i].state if i in past.engines else ""]
    ]
    return History(shown[:MOST_ROWS], len(shown[MOST_ROWS:]), engines, ", ".join(parts), _progress(past, steps))


def _entry(event: Mapping[str, Any], first: float) -> FaultEntry:
    name = event["event"]
    facts = [f"{k.replace('_', ' ')} {v}" for k, v in event.items() if k not in LEFT_OUT | {"reason", "engine"}]
    reason = event.get("reason")
    detail = "; ".join([*([str(reason)] if reason else []), *facts])
    detail = clean(" ".join(detail.split()))
    subject, _, what = name.partition("/")
    engine = f" {event['engine']}" if is_number(event.get("engine")) else ""
    return FaultEntry(
        max(0.0, event["time"] - first),
        event["step"] if isinstance(event.get("step"), int) else None,
        f"{subject}{engine} {what}".strip(),
        detail if len(detail) <= MOST_CHARS else detail[:MOST_CHARS] + "…",
        name in COUNTED,
    )


def _progress(past: RunHistory, steps: int) -> str:
    """Describe the state of a run that has started and not finished; "" for any other."""
    if past.now.started is None or past.now.state == "finished":
        return ""
    of = f" of {past.now.total:,}" if is_number(past.now.total) else ""
    how = "It had not ended when this page was written,"
    if past.now.state in ENDS.values():
        how = f"It {past.now.state.replace('interrupted', 'was interrupted')}"
    return f"{how} after {steps:,}{of} steps."
