"""The event log of a run: what happened to its processes, when, and in which phase and step.

`RUN/events.jsonl`, one object a line: `time` (Unix seconds), `event` (`subject/what`), `step`, `phase`, then what the
event adds. Appended with one write a line, so that several processes can share the file; never rewound, unlike
metrics.jsonl: a step that ran twice stands here twice. Everything that watches a run reads it: `tatar-dist status`, the
stall detector, the tests of faults.

    run/start run/end run/interrupted run/failed   pid, host, stage, total, from_step, learners, engines, push; reason
    phase            phase = generate | reward | learn | sync | checkpoint | evaluate | push_check begins
    step/done                               seconds
    engine/ready suspect dead restarting stale healthy gone hedged     engine, pid, host, node, gpu, reason
    learners/ready failed restarting restored          world_size, pids, hosts, nodes, gpus, reason, from_step
    reward/ready failed                     pid, host, reason
    push/done push/late                     version, engines, reason
    push/checked push/fallback              way, seconds, bit, gap, moved, seen, unseen; reason (cluster/selfcheck.py)
    checkpoint/saved skipped failed         path, seconds, reason
    checkpoint/accepted                     changes: {key: [before, now]} that checkpoint.accept names
    share/low                               task, reason: its scoring term hardly moves the advantage
    step/skipped                            reason, in_a_row: its gradient was not finite (optim.on_nonfinite)
    node/lost node/joined                   node
    tracker/failed                          tracker, reason: left out from then on (run/tracking.py)
    signal                                  name
    process/started                         name, pid, host, node, gpu: its CUDA_VISIBLE_DEVICES
    stall                                   seconds, limit, action, stacks, processes, silent
    fault                                   point, action: a failpoint fired (run/failpoints.py)
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tatar_dist.run.files import json_lines

FILE = "events.jsonl"


class Events:
    """Append to a run's event log; events carry `step` and `phase`, which the loop sets."""

    def __init__(self, run: Path) -> None:
        self.path = run / FILE
        self.step: int | None = None
        self.phase: str | None = None
        if self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            self._append("\n")  # a line cut off by a crash must not swallow the next one

    def log(self, event: str, **fields: Any) -> None:
        stamp = {"time": round(time.time(), 3), "event": event, "step": self.step, "phase": self.phase}
        self._append(json.dumps({**stamp, **fields}, default=str) + "\n")

    def begin(self, phase: str, step: int) -> None:
        """Log that a phase of the loop begins; later events carry it."""
        self.phase, self.step = phase, step
        self.log("phase")

    def _append(self, line: str) -> None:
        with open(self.path, "ab", buffering=0) as f:  # one write a line: processes share the file
            f.write(line.encode())


def read_events(run: Path) -> list[dict[str, Any]]:
    """Read the events so far; lines that a crash cut off are left out."""
    return json_lines(run / FILE)
