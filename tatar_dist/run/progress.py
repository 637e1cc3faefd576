"""Progress on the terminal: stage, step, its main metrics, seconds a step, time gone and left.

A bar on a terminal; one plain line a step (thinned out for long runs) where output is a file. Time left is estimated
from the steps alone: starting the engines does not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping

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
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def bar(console: Console) -> progress.Progress:
    """Return a bar with name, count, and the text in a task's field `text`."""
    return progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("[bold]{task.description}"),
        progress.BarColumn(20),
        progress.TextColumn("{task.completed}/{task.total}"),
        progress.TextColumn("{task.fields[text]}"),
        console=console,
    )


class Progress:
    """Context manager; call `ready` when the actors are up and `update` after every unit of work."""

    def __init__(
        self, stage: str, total: int, start: int = 0, unit: str = "step", console: Console | None = None
    ) -> None:
        self.stage, self.total, self.first, self.unit = stage, total, start, unit
        self.console = console or Console(stderr=True)
        self.began = self.since = time.monotonic()
        self._printed = -1
        self._every = max(1, total // 25)
        self._bar: progress.Progress | None = None
        if self.console.is_terminal:
            self._bar = bar(self.console)
            self._task = self._bar.add_task(stage, total=total, completed=start, text="starting")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def ready(self, first: int | None = None) -> None:
        """Start timing steps: everything is up, at step `first` if it is not the initial one."""
        self.since = time.monotonic()
        self.first = self.first if first is None else first

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show that `done` units of `total` are finished."""
        loss = {} if "reward/total/iqa" in metrics or "reward/total/iaa" in metrics else {"loss/total": "loss"}
        known = {key: name for key, name in (loss | SHOWN).items() if key in metrics}
        # a task without held-out rows has no loss; any other NaN is worth seeing
        parts = [
            f"{name} {metrics[key]:.3g}"
            for key, name in known.items()
            if not (key.startswith("eval/") and math.isnan(metrics[key]))
        ]
        self.show(done, parts)

    def show(self, done: int, parts: Iterable[str]) -> None:
        """Show `done` with these texts, the pace, and the time gone and left."""
        now = time.monotonic()
        seconds = (now - self.since) / max(1, done - self.first)
        a = "an" if self.unit[0] in "aeiou" else "a"
        pace = (
            f"{seconds:.1f} s {a} {self.unit}"
            if seconds >= 0.1
            else f"{1 / max(seconds, 1e-9):.0f} {self.unit}s a second"
        )
        left = clock(seconds * (self.total - done))
        line = "  ".join([*parts, pace, f"{clock(now - self.began)} gone", f"{left} left"])
        if self._bar:
            self._bar.update(self._task, completed=done, text=line)
        elif done != self._printed and (done == self.total or done - self._printed >= self._every or self._printed < 0):
            self._printed = done
            self.console.print(f"{self.stage}  {done}/{self.total}  {line}", highlight=False, soft_wrap=True)
