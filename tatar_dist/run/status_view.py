"""A run's `Status` on the terminal: a panel for the run, tables of processes and troubles."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tatar_dist.run.progress import SHOWN, clock
from tatar_dist.run.status import LIVING, ProcessStatus, RunWatcher, Status

REFRESH_S = 1.0
ROWS = 8  # engines; of more, the healthy ones share a row
GOOD, WORKING, BAD, OVER = "green", "yellow", "bold red", "dim"
PLAIN: Any = {"box": None, "padding": (0, 2, 0, 1), "header_style": OVER}  # a table
STYLES = {
    **dict.fromkeys(("running", "finished", "ready", "healthy"), GOOD),
    **dict.fromkeys(("starting", "interrupted", "restarting", "stale", "suspect", "restored"), WORKING),
    **dict.fromkeys(("stalled", "failed", "dead", "gone"), BAD),
}
EXPLAINED = {
    "dead": "its process is gone and logged no end: the same command continues",
    "interrupted": "stopped at a safe point: the same command continues",
    "stalled": "no progress: look at the stacks",
}


def watch(files: RunWatcher, console: Console) -> None:
    """Draw again and again until Ctrl-C."""
    try:
        with Live(view(files.read(), time.time()), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(REFRESH_S)
                live.update(view(files.read(), time.time()), refresh=True)
    except KeyboardInterrupt:
        return


def view(s: Status, now: float) -> RenderableType:
    """Draw everything, from the most to the least important. now: Unix seconds."""
    parts: list[RenderableType] = [_run(s, now)]
    if s.state in LIVING and (s.engines or s.learners):
        parts += ["", _processes(s, now)]
    if s.troubles:
        parts += ["", _troubles(s, now)]
    if s.unreadable_lines:
        parts.append(Text(f" {s.unreadable_lines} unreadable line(s) of events.jsonl left out", style=OVER))
    return Group(*parts)


def _run(s: Status, now: float) -> Panel:
    style = STYLES[s.state]
    rows = Table.grid(padding=(0, 2), expand=True)
    rows.add_column(style=OVER, no_wrap=True)
    rows.add_column(ratio=1, overflow="fold")
    rows.add_row("run", Text(s.run))
    if s.total:
        bar = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 1, None):
            bar.add_column(no_wrap=True, ratio=ratio)
        done = ProgressBar(s.total, s.step, complete_style=style, finished_style=GOOD)
        bar.add_row(f"[bold]{s.step}[/] of {s.total}", done, f"{s.step / s.total:.0%}")
        rows.add_row("step", bar)
    if reason := s.reason or EXPLAINED.get(s.state):
        rows.add_row("", Text(reason, style=style))
    facts = [(name, text) for name, text in _facts(s, now) if text]
    for name in dict.fromkeys(name for name, _ in facts):
        rows.add_row(name, Text(" · ".join(text for line, text in facts if line == name)))
    title = f"[{style}]● [bold]{s.state}[/]{f'  {s.stage}' if s.stage else ''}"
    return Panel(rows, title=title, title_align="left", border_style=style, padding=(0, 1))


def _facts(s: Status, now: float) -> list[tuple[str, str | None]]:
    """Return (name of a line of the panel, a part of it or None) in their order."""

    def known(value: float | None, text: str) -> str | None:
        return None if value is None else text.format(value)

    def since(moment: float | None, text: str) -> str | None:
        return None if moment is None else text.format(clock(now - moment))

    shown = [(name, s.metrics.get(key)) for key, name in SHOWN.items()]
    saved = s.checkpoint
    way = f" by {s.push}{', checked' * s.push_checked}" if s.push else ""
    return [
        ("now", since(s.phase_since, f"{s.phase} for {{}}") if s.phase else None),
        ("now", f"weights of version {s.version}{way}" if s.phase and s.stage == "grpo" else None),
        ("pace", known(s.seconds_per_step, "{:.1f} s/step")),
        ("pace", known(s.tokens_per_second, "{:,.0f} tokens/s")),
        ("pace", None if s.eta_seconds is None else f"{clock(s.eta_seconds)} left"),
        *[("last", f"{name} {value:.3g}") for name, value in shown if isinstance(value, int | float)],
        ("saved", since(saved.time, f"checkpoint of step {saved.step}, {{}} ago") if saved else None),
        ("since", since(s.started, "started {} ago")),
        ("since", None if s.state in LIVING else since(s.last_event, "last heard of {} ago")),
        ("since", f"{s.host} pid {s.pid}" if s.host else None),
    ]


def _processes(s: Status, now: float) -> Table:
    """Tabulate the processes, a row each; the healthy engines of a large run share one."""
    table = Table("process", "state", "for", "restarts", "host", "pid", **PLAIN)

    def row(name: str, p: ProcessStatus, hosts: Iterable[str | None], pids: Iterable[int | None]) -> None:
        mark = Text(f"● {p.state}", style=STYLES.get(p.state, ""))
        since = "" if p.since is None else clock(now - p.since)
        table.add_row(name, mark, since, str(p.restarts or ""), _some(hosts, 2), _some(pids, 1))

    if s.learners:
        row(f"learners × {s.learners.world_size or '?'}", s.learners, s.learners.hosts, s.learners.pids)
    shared = [e for e in s.engines if e.state == "healthy"] if len(s.engines) > ROWS else []
    if shared:
        row(f"engines × {len(shared)}", ProcessStatus("healthy"), [e.host for e in shared], [e.pid for e in shared])
    for e in s.engines:
        if e not in shared:
            row(f"engine {e.engine}", e, [e.host], [e.pid])
    if s.reward:
        row("reward", s.reward, [s.reward.host], [s.reward.pid])
    return table


def _some(values: Iterable[Any], n: int) -> str:
    """Return the first `n` different ones and how many more there are."""
    different = sorted({v for v in values if v is not None})
    return ", ".join(map(str, different[:n])) + (f" +{len(different) - n}" if len(different) > n else "")


def _troubles(s: Status, now: float) -> Table:
    table = Table("when", "step", "event", "what", **PLAIN)
    for t in s.troubles:
        name = str(t["event"])
        bad = name.endswith(("dead", "failed", "gone", "lost", "late")) or name in ("stall", "fault")
        table.add_row(
            f"{clock(now - t['time'])} ago",
            " ".join(str(t[k]) for k in ("step", "phase") if t.get(k) is not None),
            Text(name, style=BAD if bad else WORKING),
            Text(_what(t), overflow="fold"),
        )
    return table


def _what(event: dict[str, Any]) -> str:
    """Say which engine or node, the reason, and further facts of an event by name."""
    subject = str(event["event"]).partition("/")[0]
    who = f"{subject} {event[subject]}" if subject in event else ""
    facts = [f"{k} {event[k]}" for k in ("seconds", "action", "stacks", "point", "name", "path") if event.get(k)]
    reason = [event["reason"]] if event.get("reason") else []
    return ": ".join(filter(None, [who, ", ".join([*reason, *facts])]))
