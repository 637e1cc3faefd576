"""Live progress on the terminal: stage, step, what matters of its metrics, seconds, time left.

One line that updates on a terminal; one plain line a step (thinned out for long runs) where output is a file.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

SHOWN = {
    "loss/total": "loss",
    "reward/total/iqa": "reward iqa",
    "reward/total/iaa": "reward iaa",
    "reward/gaussian/iqa": "gauss",
    "reward/thurstone/iaa": "thurst",
    "sync/logprob_gap": "gap",
}


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Context manager; call `update` after every unit of work."""

    def __init__(self, stage: str, total: int, start: int = 0, console: Console | None = None) -> None:
        self.stage, self.total, self.first = stage, total, start
        self.console = console or Console(stderr=True)
        self.began = time.monotonic()
        self._live = Live(console=self.console, refresh_per_second=4, transient=True) if self.console.is_terminal else None
        self._every = max(1, total // 25)

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        self.note("starting")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def note(self, text: str) -> None:
        """Say what is happening before the first step."""
        if self._live:
            self._live.update(Text(f"{self.stage}  {text} …"))

    def update(self, done: int, metrics: Mapping[str, float], extra: Sequence[str] = ()) -> None:
        """`done` units of `total` are finished."""
        elapsed = time.monotonic() - self.began
        each = elapsed / max(1, done - self.first)
        parts = [f"{name} {metrics[key]:.3g}" for key, name in SHOWN.items() if key in metrics]
        line = (
            f"{self.stage}  {done}/{self.total}  {'  '.join([*parts, *extra])}  "
            f"{metrics.get('time/step', each):.1f} s/step  {clock(elapsed)} gone  {clock(each * (self.total - done))} left"
        )
        if self._live:
            width = 24
            full = round(width * done / max(1, self.total))
            bar = Text("━" * full, "green") + Text("━" * (width - full), "dim") + Text("  " + line)
            self._live.update(bar)
        elif done % self._every == 0 or done == self.total or done == self.first + 1:
            self.console.print(line, highlight=False, soft_wrap=True)
