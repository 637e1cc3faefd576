"""Command-line layer of `tatar-dist data validate` and `data show`: call, print, set the exit status."""

from __future__ import annotations

import json
import warnings
from contextlib import ExitStack
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tatar_dist.assets import looked_in
from tatar_dist.data.checks import report
from tatar_dist.data.checks.compare import clean, clean_paths
from tatar_dist.data.checks.sheet import show
from tatar_dist.data.checks.validate import validate
from tatar_dist.errors import Interrupted, UserError
from tatar_dist.faults.interrupts import StopSignals
from tatar_dist.run.progress import Progress


def run_validation(
    paths: list[Path],
    output: Path | None,
    workers: int | None,
    clean_to: Path | None,
    images: Path | None,
    as_json: bool,
) -> None:
    """Validate manifests, write reports and clean manifests, print the summary.
    Raises UserError if something is unusable or leaks between splits, Interrupted after a signal."""
    _check_directory(images)
    if clean_to is not None:
        clean_paths(paths, clean_to)  # a wrong place is known before hours of decoding
    # a flag that every picture asks for: the exception of a first Ctrl-C was seen to get lost
    with warnings.catch_warnings(), StopSignals() as stop, ExitStack() as stack:
        warnings.simplefilter("ignore")  # Pillow's, of oddities in metadata; what matters is found and listed
        progress: Progress | None = None

        def watch(done: int, total: int) -> None:
            nonlocal progress
            if stop.requested:
                raise Interrupted("interrupted", stop.status)
            if progress is None:
                progress = stack.enter_context(Progress("validate", total, unit="picture"))
            if done:
                progress.update(done, {})

        validation = validate(paths, output, workers, watch, images)
    summaries = report.written_reports(validation)
    cleaned = clean(validation, clean_to) if clean_to is not None else {}
    if as_json:
        print(json.dumps(report.as_json(validation) | ({"clean": cleaned} if cleaned else {}), ensure_ascii=False))
    else:
        report.print_summary(validation, Console())
        for path, counts in cleaned.items():
            dropped = ", ".join(f"{n:,} {why}" for why, n in counts.items() if why != "kept" and n) or "none"
            print(f"clean   {path}: {counts['kept']:,} rows kept, dropped: {dropped}")
    if not validation.ok:
        to_read = [s for s, m in zip(summaries, validation.manifests, strict=True) if m.log.counts or not m.rows]
        hints = dict.fromkeys(filter(None, map(report.hint, validation.manifests)))
        message = f"{report.verdict(validation)[:-1]}: read {', '.join(map(str, to_read))}"
        raise UserError("; ".join([message, *hints]))


def _check_directory(images: Path | None) -> None:
    if images is not None and not images.is_dir():
        raise UserError(f"--images {images}: no such directory{looked_in(images)}")


def run_show(
    path: Path,
    rows: int,
    sort: str,
    dataset: str | None,
    output: Path | None,
    images: Path | None,
    as_json: bool,
) -> None:
    """Print the pools of one manifest and write its contact sheet."""
    _check_directory(images)
    sheet = output or path.with_name(f"{path.stem}.sheet.png")
    shown = show(path, rows, sort, dataset, sheet, images)
    if as_json:
        print(json.dumps(shown.as_json(), ensure_ascii=False))
        return
    console = Console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(("data set", "task", "split", "rows", "scores", "rationale", "attributes")):
        table.add_column(name, justify="left" if k < 3 else "right", overflow="fold")
    for pool in shown.pools:
        row = report.pool_cells(pool)
        table.add_row(*(Text(report.printable(cell)) for cell in [*row[:5], *row[7:9]]))
    console.print(Text(f"{path}: {shown.rows:,} rows, {shown.images}", style="bold"))
    console.print(table)
    if shown.absent == len(shown.chosen):
        print("None of these images is there: name their directory with --images.")
    print(shown.sheet)
