"""Print tables for `data import`, `sets`, `show`: import report, registry, manifest pools."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tatar_dist.data.checks import report as checks_report
from tatar_dist.data.checks.sheet import Shown
from tatar_dist.data.registry import Format, Registry


def _table(title: str, *columns: str, unbroken: Iterable[str] = (), numbers: Iterable[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="bold")
    for name in columns:
        right = name in numbers
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right or name in unbroken)
    return table


_QUANTILES = ("min", "5 %", "25 %", "median", "75 %", "95 %", "max")


def print_import(report: dict[str, Any]) -> None:
    """Print `run_import`'s report: formats, score mapping, rows kept and dropped, next command."""
    title = f"{report['dataset']} ({report['task'].upper()}) → {report['manifest']}"
    numbers = ("rows", "published", *_QUANTILES)
    files = _table(
        escape(title), "file", "format", "columns read", "mapped", "rows", unbroken=["mapped"], numbers=numbers
    )
    scores = _table("Scores", "", *_QUANTILES, numbers=numbers)
    for f in report["files"]:
        low, high = (f"{end:.10g}" for end in f["range"])
        mapped = f"{low}–{high} → {'100–0' if f['lower_is_better'] else '0–100'}"
        columns, kind = _shortened(f["columns"]), f"{f['format']} ({f['kind']})"
        files.add_row(*map(escape, (f["file"], kind, columns, mapped, f"{f['rows']:,}")))
        if f["raw"]:
            scores.add_row(escape(f"raw, {Path(f['file']).name}"), *_quantiles(f["raw"]))
    scores.add_row("on 0–100", *_quantiles(report["score"]))

    counts = _table("Rows", "", "rows", "published", numbers=numbers)
    counts.add_row("read", f"{report['rows']:,}")
    for reason, n in report["dropped"].items():
        counts.add_row(f"[yellow]dropped: {reason}", f"[yellow]{n:,}")
    counts.add_row("kept", f"{report['kept']:,}")
    for key, n in {"total": report["images"], **report["splits"]}.items():
        published = report["published"].get(key)
        text = "" if published is None else f"{published:,}{' ✓' if n == published else ''}"
        counts.add_row("images" if key == "total" else f"  {key}", f"{n:,}", text)

    facts = Table.grid(padding=(0, 2))
    official = {
        True: " (the official split)",
        False: f" (not the official split: {report['official_split']})" if report["official_split"] else "",
        None: " (as you say)",
    }
    facts.add_row("Split", escape(report["split_rule"] + official[report["split_official"]]))
    if not report["images_checked"]:
        facts.add_row("Images", "not looked for (--no-check-images)")
    for note in report["notes"]:
        facts.add_row("Note", escape(note))
    if report["dropped_file"]:
        facts.add_row("Dropped", f"each row with its reason: {escape(report['dropped_file'])}")
    facts.add_row("Next", f"[bold]tatar-dist data validate {escape(report['manifest'])}")
    for part in (files, counts, scores, facts):
        Console().print(part)


def _quantiles(quantiles: dict[str, float]) -> list[str]:
    return [f"{v:.4g}" if abs(v) < 1000 else f"{v:.0f}" for k, v in quantiles.items() if k != "n"]


def _shortened(columns: Iterable[str]) -> str:
    names = list(columns)
    return ", ".join(names if len(names) <= 8 else [*names[:3], "…", *names[-2:]])


def print_sets(registry: Registry) -> None:
    """Print all data sets with counts, release formats, shared lists, and where to get them."""
    numbers = ("images", "test")
    sets = _table("Data sets", "set", "task", "domain", *numbers, "gt_score in lists", numbers=numbers)
    lists = _table("Lists, of every set", "format", "file", "columns", unbroken=("format",))
    where = _table("Where to get them", "set", "address and terms")
    for dataset in registry.datasets.values():
        counts = [f"{dataset.counts[k]:,}" if k in dataset.counts else "" for k in ("total", "test")]
        scale = str(dataset.formats[dataset.lists[0]].range) if dataset.lists else ""
        domain = "in" if dataset.in_domain else "cross"
        sets.add_row(escape(dataset.name), dataset.task.upper(), domain, *counts, scale)
        where.add_row(escape(dataset.name), f"{escape(dataset.url)}\n[dim]{escape(dataset.terms)}")
    for fmt in {name: d.formats[name] for d in registry.datasets.values() for name in d.lists}.values():
        lists.add_row(*map(escape, (fmt.name, ", ".join(fmt.kind), ", ".join(fmt.columns))))
    console = Console()
    console.print(sets)
    print("Files of the releases, recognised by their columns")
    for dataset in registry.datasets.values():
        formats = [f for f in dataset.formats.values() if f.name not in dataset.lists]
        print(f" {dataset.name}{'' if formats else '  the lists below only'}")
        for fmt in formats:
            score = (fmt.score or "mean of votes") + (", mean per image" if fmt.worker else "")
            scale = f"{fmt.range}{', lower is better' if fmt.lower_is_better else ''}"
            print(f"   {fmt.name:<25}{', '.join(fmt.kind):<10}{score:<22}{scale}")
            print(f"     {'no header: ' if 'text' in fmt.kind else ''}{_shortened(fmt.columns)}")
    console.print("", lists, where)
    print("Import one: tatar-dist data import NAME --annotations F --images DIR --output M.parquet")


def sets_as_json(registry: Registry) -> list[dict[str, Any]]:
    """Return the registry's records for `data sets --json`."""

    def layout(fmt: Format) -> dict[str, Any]:
        values = {key: getattr(fmt, key) for key in ("name", "image", "score", "lower_is_better", "source")}
        lists = {"kinds": list(fmt.kind), "columns": list(fmt.columns), "range": [fmt.range.low, fmt.range.high]}
        return values | lists

    return [
        {key: getattr(dataset, key) for key in ("name", "task", "in_domain", "url", "terms", "counts")}
        | {"official_split": dataset.split.official, "formats": [layout(f) for f in dataset.formats.values()]}
        for dataset in registry.datasets.values()
    ]


def print_pools(shown: Shown) -> None:
    """Print the pools of a manifest and where its contact sheet is, for `data show`."""
    columns = ("data set", "task", "split", "rows", "scores", "rationale", "attributes")
    title = escape(f"{shown.path}: {shown.rows:,} rows, {shown.images}")
    table = _table(title, *columns, numbers=columns[3:])
    for pool in shown.pools:
        cells = checks_report.pool_cells(pool)
        table.add_row(*(escape(checks_report.printable(cell)) for cell in [*cells[:5], *cells[7:9]]))
    Console().print(table)
    if shown.absent == len(shown.chosen):
        print("None of these images is there: name their directory with --images.")
    print(shown.sheet)
