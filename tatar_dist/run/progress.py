"""Progress on the terminal: stage, step, main metrics, seconds per step, time gone and left.

Time left is estimated from the steps alone: starting the engines does not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta

from rich import progress
from rich.console import Console

# the metric -> its name on the line; of these, what a step has
SHOWN = {
    "eval/loss/iqa": "held-out iqa",
    "eval/loss/iaa": "iaa",
    "reward/total/iqa": "reward iqa",
    "reward/total/iaa": "iaa",
    "reward/gaussian/iqa": "gaussian",
    "reward/thurstone/iaa": "thurstone",
    "sync/logprob_gap": "gap",
}


def clock(seconds: float) -> str:
    """Return h:mm:ss; 0:00:00 for a negative time, as clocks of two hosts may differ a little."""
    return str(timedelta(seconds=max(0, round(seconds))))


class Progress:
    """Progress of a stage: a terminal bar, else about 25 lines of a long run. A context manager.

    Call `ready` when the actors are up, and `update` or `show` after every unit of work.
    """

    def __init__(
        self, stage: str, total: int, start: int = 0, unit: str = "step", console: Console | None = None
    ) -> None:
        self.stage, self.total, self.first, self.unit = stage, total, start, unit
        self.console = console or Console(stderr=True)
        self.began = self.since = time.monotonic()
        self._printed = -math.inf  # units at the last plain line
        self._bar = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(20),
            progress.TextColumn("{task.completed}/{task.total}"),
            progress.TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(stage, total=total, completed=start, text="starting")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def ready(self, first: int | None = None) -> None:
        """Start timing steps: everything is up, at step `first` if it is not the initial one."""
        self.since = time.monotonic()
        self.first = self.first if first is None else first

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show that `done` units of `total` are finished, with their main metrics."""
        # of a policy step the loss says nothing; a task without held-out rows has NaN, any other is worth seeing
        names = SHOWN if any(key.startswith("reward/") for key in metrics) else {"loss/total": "loss"} | SHOWN
        parts = [
            f"{name} {metrics[key]:.3g}"
            for key, name in names.items()
            if key in metrics and not (key.startswith("eval/") and math.isnan(metrics[key]))
        ]
        self.show(done, parts)

    def show(self, done: int, parts: Iterable[str]) -> None:
        """Show `done` with these texts, the pace, and the time gone and left."""
        now = time.monotonic()
        seconds = (now - self.since) / max(1, done - self.first)
        pace = f"{seconds:.1f} s/{self.unit}" if seconds >= 0.1 else f"{1 / max(seconds, 1e-9):.0f} {self.unit}s/s"
        left = clock(seconds * (self.total - done))
        text = "  ".join([*parts, pace, f"{clock(now - self.began)} gone", f"{left} left"])
        self._bar.update(self._task, completed=done, text=text)
        due = done == self.total or done - self._printed >= max(1, self.total // 25)
        if due and done != self._printed and not self.console.is_terminal:
            self._printed = done
            line = f"{self.stage}  {done}/{self.total}  {text}"
            self.console.print(line, highlight=False, soft_wrap=True, markup=False)
