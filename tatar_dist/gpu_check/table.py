"""Print what `gpu-check` found."""

from __future__ import annotations

from collections import Counter
from typing import Any

STYLES = {"passed": "green", "failed": "red", "late": "red", "no time": "yellow", "skipped": "dim"}


def _label(result: dict[str, Any]) -> str:
    """Return a result's status, marked where it is no success but does not count."""
    counts = result["required"] or result["status"] in ("passed", "skipped")
    return result["status"] if counts else f"{result['status']} (optional)"


def as_table(found: dict[str, Any]) -> Any:
    """Return a rich table with a line for each part."""
    from rich.markup import escape
    from rich.table import Table

    machine = found["machine"] or {}
    title = f"gpu-check of {machine.get('host')}, driver {machine.get('driver')}"
    if found["pretend"]:
        title = "gpu-check --pretend: on the CPU, which says nothing about a GPU"
    table = Table(title=title, title_justify="left")
    for column in ("part", "", "s", "found"):
        table.add_column(column, overflow="fold", justify="right" if column == "s" else "left")
    for result in found["parts"]:
        style = STYLES[result["status"]] if result["required"] else "dim"
        seconds = f"{result['seconds']:.0f}" if result["seconds"] else ""
        table.add_row(result["part"], f"[{style}]{_label(result)}[/]", seconds, escape(result["text"]))
    return table


def verdict(found: dict[str, Any]) -> str:
    """Return the lines below the table: how many parts passed, and where to look."""
    counts = Counter(_label(result) for result in found["parts"])
    text = ", ".join(f"{n} {label}" for label, n in counts.items()) + f" in {found['seconds']:.0f} s."
    if counts["no time"]:
        text += " Run the others by --part."
    if found["logs"]:
        text += f" Logs: {found['logs']}"
    return text
