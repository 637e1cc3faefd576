"""Progress of a build or judge run: rows done and rejected, cost, time left.

Shows a bar on a terminal, else a plain line every 15 s. Time left is estimated from this run's own pace.
"""

from __future__ import annotations

import time

from rich import progress
from rich.console import Console

from tatar_dist.rationale.ledger import Ledger
from tatar_dist.run.progress import bar, clock

PLAIN_EVERY_S = 15.0


class Meter:
    """Progress display, a context manager. Call it with the ledger as often as needed."""

    def __init__(self, name: str, total: int, console: Console | None = None) -> None:
        self.name, self.total = name, total
        self.console = console or Console(stderr=True)
        self.began = time.monotonic()
        self._printed = self.began - PLAIN_EVERY_S + 2.0  # the first plain line after two seconds
        self._settled_before = 0
        self._bar: progress.Progress | None = None
        if self.console.is_terminal:
            self._bar = bar(self.console)
            self._task = self._bar.add_task(name, total=total, said="starting")

    def __enter__(self) -> Meter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def reading(self, ledger: Ledger) -> None:
        """Show progress while rows enter the ledger, before any is asked. The pace is measured from the last call."""
        now, done = time.monotonic(), ledger.settled
        if self._bar:
            self._bar.update(self._task, completed=done, said="reading what is there")
        elif now - self._printed >= PLAIN_EVERY_S:
            self._printed = now
            text = f"{self.name}  {len(ledger.entries)}/{self.total}  reading what is there"
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)
        self.began, self._settled_before = now, done

    def __call__(self, ledger: Ledger, last: bool = False) -> None:
        done = ledger.settled + ledger.failed
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=done, said=self.line(ledger, now))
        elif last or now - self._printed >= PLAIN_EVERY_S:
            self._printed = now
            text = f"{self.name}  {done}/{self.total}  {self.line(ledger, now)}"
            self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def line(self, ledger: Ledger, now: float) -> str:
        """Text beside the bar."""
        done = ledger.settled + ledger.failed
        gone = max(now - self.began, 1e-9)
        here = done - self._settled_before
        parts = [f"{ledger.accepted} accepted", f"{ledger.rejected} rejected"]
        if ledger.failed:
            parts.append(f"{ledger.failed} failed")
        if ledger.retries:
            parts.append(f"{ledger.retries} retries")
        parts.append(f"{ledger.tokens:,} tokens")
        if cost := ledger.cost():
            parts.append(f"cost {cost:.2f}")
        if here:
            parts += [f"{here / gone:.1f}/s", f"{clock((self.total - done) * gone / here)} left"]
        return "  ".join(parts)
