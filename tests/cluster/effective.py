"""Effective training time of a run that had faults, and where the rest of its time went. Reads event logs only.

    effective time = steps that survive x median step without a fault / wall time

Wall time is from the first `run/start` to the last event. A step survives if no restart made it again. A step is
without a fault if all engines were healthy from its beginning to its end and nothing failed meanwhile.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Event = Mapping[str, Any]
PEACEFUL = ("phase", "step/done", "push/done", "checkpoint/saved")  # events of a step without a fault
NOTICED = ("learners/failed", "engine/dead", "reward/failed")
BY_COMMAND = ("controller killed", "preempted")  # the command is given again


def undisturbed(events: Sequence[Event]) -> list[float]:
    """Seconds of each step without a fault."""
    engines, healthy, clean, found = 0, set[int](), False, []
    for e in events:
        name = e["event"]
        if name == "run/start":
            engines, healthy, clean = e["engines"], set(), False
        elif name == "engine/healthy":
            healthy.add(e["engine"])
        elif name.startswith("engine/"):
            healthy.discard(e.get("engine", -1))
        clean = clean and name in PEACEFUL
        if name == "step/done":
            if clean:
                found.append(e["seconds"])
            clean = len(healthy) == engines
    return found


def effective(events: Sequence[Event], faults: Sequence[Event]) -> dict[str, Any]:
    """Return the effective time and the shares of wall time by what it went to.

    Args:
        events: of the run, in their order.
        faults: {"time", "fault"} of each fault that was injected.
    """
    done = [e for e in events if e["event"] == "step/done"]
    last = {e["step"]: e for e in done}
    pace, wall = statistics.median(undisturbed(events)), events[-1]["time"] - events[0]["time"]

    def until(start: float, *names: str) -> float:
        return next((e["time"] for e in events if e["time"] > start and e["event"] in names), start) - start

    times = {
        "surviving steps": len(last) * pace,
        "steps made again": sum(e["seconds"] for e in done) - sum(e["seconds"] for e in last.values()),
        "noticing the fault": sum(
            until(f["time"], "step/done", *NOTICED) for f in faults if f["fault"] not in BY_COMMAND
        ),
        "end of the driver to its start": sum(
            until(f["time"], "run/start") for f in faults if f["fault"] in BY_COMMAND
        ),
        "actors of a start": sum(until(e["time"], "phase") for e in events if e["event"] == "run/start"),
        "learners again": sum(
            until(e["time"], "learners/restored") for e in events if e["event"] == "learners/restarting"
        ),
    }
    times["slower steps, waits for engines, checkpoints"] = wall - sum(times.values())
    return {
        "effective_time": round(len(last) * pace / wall, 3),
        "undisturbed_step_s": round(pace, 3),
        "wall_s": round(wall, 1),
        "shares": {what: round(seconds / wall, 3) for what, seconds in times.items()},
    }
