"""What befell a run's processes, from its event log: faults and recoveries by time, engines one by one.

In: the lines of events.jsonl (run/events.py says what stands in them), whatever they hold. Out: `History` for the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tatar_dist.report.reading import is_number
from tatar_dist.report.text import clean
from tatar_dist.run.status import ENDS, TROUBLE

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
class Entry:
    """One line of the log. seconds: since the run's first event; `bad`: a fault, not a recovery or a start."""

    seconds: float
    step: int | None
    what: str
    detail: str
    bad: bool


@dataclass(frozen=True)
class EngineHealth:
    """What one engine went through; `state`: as last heard of."""

    engine: int
    loads: int
    dead: int
    suspect: int
    hedged: int
    state: str


@dataclass(frozen=True)
class History:
    """entries: at most MOST_ROWS, oldest first; hidden: how many are not shown; summary: `4 engine failures, 1 stall`,
    "" without a fault; progress: `stopped after 13 of 60 steps`, "" for a run that ended."""

    entries: list[Entry]
    hidden: int
    engines: list[EngineHealth]
    summary: str
    progress: str


def history(events: Sequence[Mapping[str, Any]], steps: int) -> History | None:
    """The history of a run, or None without an event. steps: finished ones, as metrics.jsonl counts them."""
    known = [e for e in events if is_number(e.get("time")) and isinstance(e.get("event"), str)]
    if not known:
        return None
    first = known[0]["time"]
    shown = [_entry(e, first) for e in known if e["event"] in SHOWN]
    counts = Counter(e["event"] for e in known)
    said = [f"{counts[k]:,} {names[counts[k] > 1]}" for k, names in COUNTED.items() if counts[k]]
    return History(
        shown[:MOST_ROWS], max(0, len(shown) - MOST_ROWS), _engines(known), ", ".join(said), _progress(known, steps)
    )


def _entry(event: Mapping[str, Any], first: float) -> Entry:
    name = event["event"]
    facts = [f"{k.replace('_', ' ')} {v}" for k, v in event.items() if k not in LEFT_OUT | {"reason", "engine"}]
    reason = event.get("reason")
    detail = "; ".join([*([str(reason)] if reason else []), *facts])
    detail = clean(" ".join(detail.split()))
    subject, _, what = name.partition("/")
    engine = f" {event['engine']}" if is_number(event.get("engine")) else ""
    return Entry(
        max(0.0, event["time"] - first),
        event["step"] if isinstance(event.get("step"), int) else None,
        f"{subject}{engine} {what}".strip(),
        detail if len(detail) <= MOST_CHARS else detail[:MOST_CHARS] + "…",
        name in COUNTED,
    )


def _engines(events: Sequence[Mapping[str, Any]]) -> list[EngineHealth]:
    of: dict[int, Counter[str]] = {}
    state: dict[int, str] = {}
    for e in events:
        subject, _, what = e["event"].partition("/")
        engine = e.get("engine")
        if subject == "engine" and isinstance(engine, int):
            of.setdefault(engine, Counter())[what] += 1
            if what != "hedged":
                state[engine] = what
    return [
        EngineHealth(i, c["ready"], c["dead"], c["suspect"], c["hedged"], STATES.get(last, last))
        for i, c in sorted(of.items())
        for last in [state.get(i, "")]
    ]


def _progress(events: Sequence[Mapping[str, Any]], steps: int) -> str:
    """How the run stands when its log does not end with run/end."""
    starts = [i for i, e in enumerate(events) if e["event"] == "run/start"]
    if not starts or any(e["event"] == "run/end" for e in events[starts[-1] :]):
        return ""
    total = events[starts[-1]].get("total")
    of = f" of {total:,}" if is_number(total) else ""
    ends = [e["event"] for e in events[starts[-1] :] if e["event"] in ENDS]
    how = (
        f"It {ENDS[ends[-1]].replace('interrupted', 'was interrupted')}"
        if ends
        else "It had not ended when this page was written,"
    )
    return f"{how} after {steps:,}{of} steps."
