"""Print results of benches: one in the terminal, several as the Markdown table of README.md."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tatar_dist.assets import looked_in
from tatar_dist.errors import UserError

COLUMNS = ("bench", "baseline", "ratio, median (min–max)", "target", "met", "limit")
FIELDS = ("name", "baseline", "ratio", "target", "met", "limit")
SECONDS = ((1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
UNITS = {
    "seconds": SECONDS,
    "time": SECONDS,
    "mib": ((1, "MiB"),),
    "bytes": ((1e6, "MB"), (1e3, "kB"), (1, "B")),
}


def read(file: Path) -> dict[str, Any]:
    """Read a result that `bench NAME --json` wrote. Raises UserError for anything else."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file{looked_in(file)}") from None
    except ValueError:
        content = None
    if not isinstance(content, dict) or not content.keys() >= set(FIELDS):
        raise UserError(f"{file}: not what a bench prints with --json; was it cut short?")
    return content


def cells(result: dict[str, Any]) -> tuple[str, ...]:
    """Return the texts of COLUMNS for one result."""
    spread = "{median:.2f} ({min:.2f}–{max:.2f})".format(**result["ratio"])
    met = "yes" if result["met"] else "no"
    return result["name"], result["baseline"], spread, f"{result['target']:.3g}", met, result["limit"]


def markdown(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table with one row per result, in the order given."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, results)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def show(result: dict[str, Any]) -> None:
    """Print what is compared and how it came out, other figures, and tables of records."""
    console, head, tables = Console(highlight=False, markup=False), Table.grid(padding=(0, 2)), []
    for column, cell in zip(COLUMNS, cells(result), strict=True):
        head.add_row(column, cell, style="bold red" if (column, cell) == ("met", "no") else None)
    for key, value in result.items():
        if records := _records(value):
            tables.append(_table(_label(key), records))
        elif key not in (*FIELDS, "versions"):
            figures = (f"{_label(path)} {_text(f'{key} {path}', v)}".strip() for path, v in _flat(value).items())
            head.add_row(_label(key), ", ".join(figures))
    console.print(head)
    for table in tables:  # wider than the terminal rather than cut
        console.width = console.measure(table, options=console.options.update_width(1000)).maximum
        console.print("", table, sep="\n")


def _is_spread(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"min", "median", "max"}


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts with their keys joined; a spread is a leaf."""
    if not isinstance(value, dict) or _is_spread(value):
        return {path: value}
    return {p: leaf for key, inner in value.items() for p, leaf in _flat(inner, f"{path} {key}".strip()).items()}


def _records(value: Any) -> list[dict[str, Any]]:
    """Return a list of dicts, or a dict of them or of such lists, as flat records, else nothing."""
    named = value if isinstance(value, dict) else {"": value}
    rows = [(name, row) for name, inner in named.items() for row in (inner if isinstance(inner, list) else [inner])]
    if not all(isinstance(row, dict) and not _is_spread(row) for _, row in rows):
        return []
    return [{"": name} | _flat(row) for name, row in rows]


def _table(title: str, records: list[dict[str, Any]]) -> Table:
    """Return a table with a record per column."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    for record in ({"": ""}, *records):
        table.add_column(record[""], justify="right" if table.columns else "left")
    for field in list(dict.fromkeys(field for record in records for field in record if field)):
        table.add_row(_label(field), *(_text(field, record.get(field)) for record in records))
    return table


def _label(key: str) -> str:
    """Return a key as words, without the unit that its values are printed with."""
    return re.sub(r"(?<=\w) (seconds|mib|bytes)\b", "", re.sub("[_/]", " ", key))


def _text(key: str, value: Any) -> str:
    """Return a value with the unit that its key names; for several numbers the median and range."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value in (None, [], ()):
        return "—"
    if isinstance(value, list | tuple):
        if len(value) == 1 or not all(isinstance(v, int | float) for v in value):
            return ", ".join(_text(key, v) for v in value)
        value = {"min": min(value), "median": statistics.median(value), "max": max(value)}
    middle = value["median"] if _is_spread(value) else value
    if not isinstance(middle, int | float):
        return str(value)
    units = next((UNITS[word] for word in re.split("[ _/]", key) if word in UNITS), ((1, ""),))
    size, unit = next((u for u in units if abs(middle) >= u[0]), units[-1])
    shown = f"{_number(middle, size)} {unit}".strip()
    return f"{shown} ({_number(value['min'], size)}–{_number(value['max'], size)})" if _is_spread(value) else shown


def _number(value: float, size: float) -> str:
    value = value if size == 1 else value / size
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"
