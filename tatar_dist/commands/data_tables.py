"""Print the import report and the registry as tables, for `data import` and `data sets`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from tatar_dist.data.registry import Dataset, Registry


def _table(title: str, *columns: str, numbers: Iterable[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="bold")
    for name in columns:
        right = name in numbers
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def _facts() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


_QUANTILES = ("min", "5 %", "25 %", "median", "75 %", "95 %", "max")


def print_import(report: dict[str, Any], console: Console | None = None) -> None:
    """Print a report of `run_import`: recognised formats, score mapping, rows kept and dropped, next command."""
    out = console or Console()
    title = f"{report['dataset']} ({report['task'].upper()}) → {report['manifest']}"
    files = _table(escape(title), "file", "format", "columns read", "mapped", "rows", numbers=("rows",))
    files.columns[3].no_wrap = True
    scores = _table("Scores", "", *_QUANTILES, numbers=_QUANTILES)
    scores.columns[0].min_width = len("on 0–100")
    short = _short_names([f["file"] for f in report["files"]])
    for f in report["files"]:
        low, high = (f"{end:.10g}" for end in f["range"])
        mapped = f"{low}–{high} → {'100–0' if f['lower_is_better'] else '0–100'}"
        columns, kind = ", ".join(_shortened(f["columns"])), f"{f['format']} ({f['kind']})"
        files.add_row(*map(escape, (short[f["file"]], kind, columns, mapped, f"{f['rows']:,}")))
        if f["raw"]:
            name = "raw" if len(report["files"]) == 1 else f"raw, {short[f['file']]}"
            scores.add_row(escape(name), *_quantiles(f["raw"]))
    scores.add_row("on 0–100", *_quantiles(report["score"]))

    of_ratings = report["images"] != report["kept"]
    counts = _table("Rows", "", "rows", "published", numbers=("rows", "published"))
    counts.add_row("read", f"{report['rows']:,}", "")
    for reason, n in report["dropped"].items():
        counts.add_row(f"[yellow]dropped: {reason}", f"[yellow]{n:,}", "")
    counts.add_row("kept", f"{report['kept']:,}", "" if of_ratings else _published(report, "total"))
    if of_ratings:
        counts.add_row("images, their ratings averaged", f"{report['images']:,}", _published(report, "total"))
    for split, n in report["splits"].items():
        counts.add_row(f"  {split}", f"{n:,}", _published(report, split))

    facts = _facts()
    official = {True: "the official split", False: "[yellow]not the official split[/]", None: "as you say"}
    known = report["split_official"] is not False or report["official_split"]
    facts.add_row("Split", escape(report["split_rule"]) + (f" ({official[report['split_official']]})" if known else ""))
    if report["split_official"] is False and known:
        facts.add_row("", f"[dim]official: {escape(report['official_split'])}")
    if not report["images_checked"]:
        facts.add_row("Images", "not looked for (--no-check-images)")
    for note in report["notes"]:
        facts.add_row("Note", escape(note))
    if report["dropped_file"]:
        facts.add_row("Dropped", f"each row with its reason: {escape(report['dropped_file'])}")
    facts.add_row("Next", f"[bold]tatar-dist data validate {escape(report['manifest'])}")
    for part in (files, counts, scores, facts):
        out.print(part)


def _quantiles(quantiles: dict[str, float]) -> list[str]:
    return [f"{v:.4g}" if abs(v) < 1000 else f"{v:.0f}" for k, v in quantiles.items() if k != "n"]


def _published(report: dict[str, Any], key: str) -> str:
    published = report["published"].get(key)
    if published is None:
        return ""
    imported = report["images"] if key == "total" else report["splits"][key]
    return f"{published:,}" if imported != published else f"[green]{published:,} ✓[/]"


def _short_names(files: list[str]) -> dict[str, str]:
    """File names without directories if these are unique, else the full paths."""
    names = {file: Path(file).name for file in files}
    return names if len(set(names.values())) == len(names) else {file: file for file in files}


def _shortened(columns: list[str]) -> list[str]:
    return columns if len(columns) <= 8 else [*columns[:3], "…", *columns[-2:]]


def print_sets(registry: Registry, console: Console | None = None) -> None:
    """Print all data sets with counts, their own formats, the shared lists, and where to get the sets."""
    out = console or Console()
    numbers = ("images", "test")
    sets = _table("Data sets", "set", "task", "domain", *numbers, "gt_score in lists", numbers=numbers)
    where = _facts()
    for dataset in registry.datasets.values():
        name, domain = f"[bold]{escape(dataset.name)}[/]", "in" if dataset.in_domain else "cross"
        counts = [f"{dataset.counts[k]:,}" if k in dataset.counts else "" for k in ("total", "test")]
        lists = str(dataset.formats[dataset.lists[0]].range) if dataset.lists else ""
        sets.add_row(name, dataset.task.upper(), domain, *counts, lists)
        where.add_row(name, f"{escape(dataset.url)}\n[dim]{escape(dataset.terms)}")
    shared = _table("Lists, of every set", "format", "keys", "file")
    lists_by_name = {n: d.formats[n] for d in registry.datasets.values() for n in d.lists}
    for fmt in lists_by_name.values():
        shared.add_row(escape(fmt.name), escape(", ".join(fmt.columns)), ", ".join(fmt.kind))
    out.print(sets)
    out.print("[bold]Files of the releases, recognised by their columns[/]")
    for dataset in registry.datasets.values():
        _print_formats(dataset, out)
    for part in ("", shared, "[bold]Where to get them[/]", where):
        out.print(part)
    out.print("\nImport one: [bold]tatar-dist data import NAME --annotations F --images DIR --output M.parquet[/]")


def _print_formats(dataset: Dataset, out: Console) -> None:
    formats = [f for f in dataset.formats.values() if f.name not in dataset.lists]
    out.print(f" [bold]{escape(dataset.name)}[/]" + ("" if formats else "  [dim]the lists below only[/]"))
    for fmt in formats:
        score = (fmt.score or "mean of votes") + (", mean per image" if fmt.worker else "")
        scale = f"{fmt.range}{', lower is better' if fmt.lower_is_better else ''}"
        row = f"   {fmt.name:<25}{', '.join(fmt.kind):<10}{score:<22}{scale}"
        out.print(escape(row.rstrip()), highlight=False)
        fields = f"{len(fmt.columns)} fields, no header: " if "text" in fmt.kind else ""
        columns = f"[dim]{escape(fields + ', '.join(_shortened(list(fmt.columns))))}[/]"
        out.print(Padding(columns, (0, 0, 0, 5)), highlight=False)


def sets_as_json(registry: Registry) -> list[dict[str, Any]]:
    """Records of the registry for `data sets --json`."""
    return [
        {
            "name": dataset.name,
            "task": dataset.task,
            "in_domain": dataset.in_domain,
            "url": dataset.url,
            "terms": dataset.terms,
            "counts": dict(dataset.counts),
            "official_split": dataset.split.official,
            "formats": [
                {
                    "name": f.name,
                    "kinds": list(f.kind),
                    "columns": list(f.columns),
                    "image": f.image,
                    "score": f.score,
                    "range": [f.range.low, f.range.high],
                    "lower_is_better": f.lower_is_better,
                    "source": f.source,
                }
                for f in dataset.formats.values()
            ],
        }
        for dataset in registry.datasets.values()
    ]
