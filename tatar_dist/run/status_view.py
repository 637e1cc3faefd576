"""A run's `Status` on the terminal: one panel for the run, one table for its processes, one for what went wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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
    """Everything, from the most to the least important."""
    parts: list[RenderableType] = [_run(s, now)]
    if s.state in LIVING and (s.engines or s.learners):
        parts.append(_processes(s, now))
    if s.troubles:
        parts.append(_troubles(s, now))
    if s.unreadable_lines:
        parts.append(Text(f" {s.unreadable_lines} unreadable line(s) of events.jsonl left out", style=OVER))
    return Group(*parts)


def _span(seconds: float) -> str:
    """Minutes and seconds; clocks of two hosts may differ a little."""
    return clock(max(0.0, seconds))


def _run(s: Status, now: float) -> Panel:
    style = STYLES[s.state]
    rows = Table.grid(padding=(0, 2), expand=True)
    rows.add_column(style=OVER, no_wrap=True)
    rows.add_column(ratio=1, overflow="fold")
    rows.add_row("run", Text(s.run))
    if s.total:
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        done = ProgressBar(s.total, s.step, complete_style=style, finished_style=GOOD)
        bar.add_row(f"[bold]{s.step}[/] of {s.total}", done, f"{s.step / s.total:.0%}")
        rows.add_row("step", bar)
    elif s.step:
        rows.add_row("step", f"[bold]{s.step}[/]")
    for name, parts in _lines(s, now):
        if texts := [part for part in parts if part]:
            rows.add_row(name, Text.assemble((" · ", OVER)).join(texts))
    title = f"[{style}]● [bold]{s.state}[/]{f'  {s.stage}' if s.stage else ''}"
    return Panel(rows, title=title, title_align="left", border_style=style, padding=(0, 1))


def _lines(s: Status, now: float) -> Iterator[tuple[str, list[Text | None]]]:
    """(name, what there is to say) of the panel's lines."""

    def part(text: str, value: Any = True, style: str = "") -> Text | None:
        return None if value is None else Text(text.format(value), style=style)

    if reason := s.reason or EXPLAINED.get(s.state):
        yield "", [part("{}", reason, STYLES[s.state])]
    if s.phase and s.phase_since:
        version = s.version if s.stage == "grpo" else None
        since = _span(now - s.phase_since)
        yield "now", [Text.assemble((s.phase, "bold"), f" for {since}"), part("weights of version {}", version)]
    left = None if s.eta_seconds is None else clock(s.eta_seconds)
    speed = part("{:,.0f} tokens/s", s.tokens_per_second)
    yield "pace", [part("{:.1f} s a step", s.seconds_per_step), speed, part("{} left", left)]
    shown = [(name, s.metrics.get(key)) for key, name in SHOWN.items()]
    yield "last", [part(f"{name} {{:.3g}}", v) for name, v in shown if isinstance(v, int | float)]
    if c := s.checkpoint:
        yield "saved", [part("checkpoint of step {}", c.step), part("{} ago", _span(now - c.time))]
    began = None if s.started is None else _span(now - s.started)
    silent = None if s.state in LIVING or s.last_event is None else _span(now - s.last_event)
    process = f"{s.host} pid {s.pid}" if s.host else None
    yield "since", [part("started {} ago", began), part("last heard of {} ago", silent), part("{}", process)]


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 1), header_style=OVER)
    for column in columns:
        table.add_column(column, no_wrap=column != "what", overflow="fold" if column == "what" else "ellipsis")
    return table


def _processes(s: Status, now: float) -> RenderableType:
    """A row for each; the healthy engines of a large run share one."""
    table = _table("process", "state", "for", "restarts", "host", "pid")

    def row(name: str, p: ProcessStatus, hosts: list[str | None], pids: list[int | None]) -> None:
        mark = Text(f"● {p.state}", style=STYLES.get(p.state, ""))
        since = "" if p.since is None else _span(now - p.since)
        table.add_row(name, mark, since, str(p.restarts or ""), _some(hosts, 2), _some(pids, 1))

    if g := s.learners:
        row(f"learners × {g.world_size or '?'}", g, [*g.hosts], [*g.pids])
    healthy = [e for e in s.engines if e.state == "healthy"]
    shared = healthy if len(s.engines) > ROWS else []
    if shared:
        row(f"engines × {len(shared)}", ProcessStatus("healthy"), [e.host for e in shared], [e.pid for e in shared])
    for e in s.engines:
        if e not in shared:
            row(f"engine {e.engine}", e, [e.host], [e.pid])
    if r := s.reward:
        row("reward", r, [r.host], [r.pid])
    return Group("", table)


def _some(values: Sequence[Any], n: int) -> str:
    """The first `n` different ones and how many more there are."""
    different = sorted({v for v in values if v is not None})
    return ", ".join(map(str, different[:n])) + (f" +{len(different) - n}" if len(different) > n else "")


def _troubles(s: Status, now: float) -> RenderableType:
    table = _table("when", "step", "event", "what")
    for t in s.troubles:
        name, where = str(t["event"]), (t.get("step"), t.get("phase"))
        bad = name.endswith(("dead", "failed", "gone", "lost", "late")) or name in ("stall", "fault")
        table.add_row(
            f"{_span(now - t['time'])} ago",
            " ".join(str(x) for x in where if x is not None),
            Text(name, style=BAD if bad else WORKING),
            Text(_what(t)),
        )
    return Group("", table)


def _what(event: dict[str, Any]) -> str:
    """The rest of an event in words."""
    who = f"engine {event['engine']}: " if "engine" in event else ""
    if event["event"] == "stall":
        return f"{event.get('seconds')} s without progress, action {event.get('action')}, see {event.get('stacks')}"
    if event["event"] == "fault":
        return f"{event.get('point')} {event.get('action')}"
    if str(event["event"]).startswith("node/"):
        who = f"node {event.get('node')} "
    return who + ", ".join(str(event[k]) for k in ("reason", "name", "path") if event.get(k))
