"""Make, check and show manifests: `tatar-dist data …`. Heavy imports are inside functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tatar_dist.commands import Json
from tatar_dist.errors import UserError

app = typer.Typer(help="Make and look at manifests, the Parquet files all stages read.", no_args_is_help=True)


@app.callback()
def _data() -> None:
    """Make and look at manifests, the Parquet files all stages read."""


@app.command("demo")
def demo(
    output: Annotated[Path, typer.Option(help="Directory of the manifests.")],
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    train: Annotated[int, typer.Option(min=1, help="Training crops per task.")] = 2000,
    validation: Annotated[int, typer.Option(min=1, help="Validation crops per task.")] = 300,
    test: Annotated[int, typer.Option(min=1, help="Test crops per task, of photographs never trained on.")] = 1000,
    as_json: Json = False,
) -> None:
    """Cut the demo's data set from photographs that installed Python packages carry.

    Example: [bold]tatar-dist data demo --output data/demo --seed 0[/bold]
    """
    from tatar_dist.demo.data.make import make_demo
    from tatar_dist.run.files import writing

    with writing(output):
        counts = make_demo(output, seed=seed, train=train, validation=validation, test=test)
    files = {str(output / f"{name}.parquet"): rows for name, rows in counts.items()}
    print(json.dumps(files) if as_json else "\n".join(f"{rows:6d}  {name}" for name, rows in files.items()))


Registries = Annotated[
    list[Path] | None, typer.Option("--registry", help="More sets, or other entries for known ones (YAML); may repeat.")
]


@app.command("import")
def import_set(
    name: Annotated[str, typer.Argument(help="The set, any case, with or without hyphens; see data sets.")],
    annotations: Annotated[list[Path], typer.Option(help="Scores: CSV, text, JSON, JSON lines, Excel; may repeat.")],
    images: Annotated[Path, typer.Option(help="Directory that image names are relative to.")],
    output: Annotated[Path, typer.Option(help="The manifest, a Parquet file.")],
    file_format: Annotated[str | None, typer.Option("--format", help="Format, where columns fit several.")] = None,
    split: Annotated[str | None, typer.Option(help="All rows are train, validation or test.")] = None,
    split_list: Annotated[
        list[str] | None, typer.Option(metavar="SPLIT=FILE", help="Image names of a split, one a line; may repeat.")
    ] = None,
    attributes: Annotated[Path | None, typer.Option(help="Attribute conversations, joined by image.")] = None,
    embed: Annotated[bool, typer.Option("--embed", help="Put the images' bytes into the manifest.")] = False,
    encoding: Annotated[str | None, typer.Option(help="Of the annotations, if not UTF-8.")] = None,
    no_check_images: Annotated[bool, typer.Option("--no-check-images", help="Do not look for the images.")] = False,
    drop_bad: Annotated[bool, typer.Option("--drop-bad", help="Leave bad rows out, listed beside the output.")] = False,
    registry: Registries = None,
    as_json: Json = False,
) -> None:
    """Import annotation files as a manifest; map scores from their declared range to 0-100.

    Example: [bold]tatar-dist data import KADID-10k --annotations dmos.csv --images images --output kadid.parquet[/bold]
    """
    from tatar_dist.commands import data_tables
    from tatar_dist.data.imports.importer import Choices, run_import
    from tatar_dist.data.registry import read_registry

    dataset = read_registry(registry or ()).find(name)
    choices = Choices(format=file_format, encoding=encoding, split=split, drop_bad=drop_bad)
    report = run_import(
        *(dataset, annotations, images, output, choices, split_list or (), attributes),
        check_images=not no_check_images,
        embed=embed,
    )
    print(json.dumps(report, ensure_ascii=False)) if as_json else data_tables.print_import(report)


@app.command("sets")
def sets(registry: Registries = None, as_json: Json = False) -> None:
    """List the data sets that can be imported: formats, columns, ranges, counts, sources.

    Example: [bold]tatar-dist data sets[/bold]
    """
    from tatar_dist.commands import data_tables
    from tatar_dist.data.registry import read_registry

    known = read_registry(registry or ())
    if as_json:
        print(json.dumps(data_tables.sets_as_json(known), ensure_ascii=False))
    else:
        data_tables.print_sets(known)


ImageRoot = Annotated[
    Path | None,
    typer.Option("--images", metavar="DIR", exists=True, file_okay=False, help="Base of image paths, if another."),
]


@app.command("validate")
def validate(
    manifests: Annotated[list[Path], typer.Argument(metavar="M.parquet...", help="Leaks are looked for across all.")],
    output: Annotated[Path | None, typer.Option(help="Directory of the reports; else beside each manifest.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Decoding threads; one a core when left out.")] = None,
    clean: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Write what can be used: OUT.parquet, or a directory for several manifests."),
    ] = None,
    images: ImageRoot = None,
    near_duplicates: Annotated[
        bool, typer.Option(help="Look for pictures nearly the same in several splits, a warning with a sheet of pairs.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Check every row and picture; list duplicates and leaks between splits. Exit 2 if unusable.

    Example: [bold]tatar-dist data validate data/koniq.parquet --clean data/koniq-clean.parquet[/bold]
    """
    import warnings
    from contextlib import ExitStack

    from rich.console import Console

    from tatar_dist.data.checks import compare, report
    from tatar_dist.data.checks.validate import validate
    from tatar_dist.errors import Interrupted
    from tatar_dist.faults.interrupts import StopSignals
    from tatar_dist.run.progress import Progress

    if clean is not None:
        compare.clean_paths(manifests, clean)  # a wrong place is known before hours of decoding
    # a flag that every picture asks for: the exception of a first Ctrl-C was seen to get lost
    with warnings.catch_warnings(), StopSignals() as stop, ExitStack() as stack:
        warnings.simplefilter("ignore")  # Pillow's, of oddities in metadata; what matters is found and listed
        progress: Progress | None = None

        def watch(done: int, total: int) -> None:
            nonlocal progress
            if stop.requested:
                raise Interrupted("interrupted: no report or clean manifest was written", stop.status)
            if progress is None:
                progress = stack.enter_context(Progress("validate", total, unit="picture"))
            if done:
                progress.update(done, {})

        validation = validate(manifests, output, workers, watch, images, near_duplicates)
    summaries = report.written_reports(validation)
    cleaned = compare.clean(validation, clean) if clean is not None else {}
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


@app.command("show")
def show(
    manifest: Annotated[Path, typer.Argument(metavar="M.parquet")],
    rows: Annotated[int, typer.Option(min=1, help="Pictures on the contact sheet.")] = 24,
    sort: Annotated[str, typer.Option(help="score (from lowest to highest), random or row.")] = "score",
    dataset: Annotated[str | None, typer.Option(help="Rows of this data set only.")] = None,
    output: Annotated[Path | None, typer.Option(help="The sheet, a PNG; else M.sheet.png beside the manifest.")] = None,
    images: ImageRoot = None,
    as_json: Json = False,
) -> None:
    """Show a manifest: a table of its pools, and a contact sheet of some pictures.

    Example: [bold]tatar-dist data show data/koniq.parquet --rows 40 --sort score[/bold]
    """
    from tatar_dist.commands import data_tables
    from tatar_dist.data.checks import sheet

    page = output or manifest.with_name(f"{manifest.stem}.sheet.png")
    shown = sheet.show(manifest, rows, sort, dataset, page, images)
    if as_json:
        print(json.dumps(shown.as_json(), ensure_ascii=False))
    else:
        data_tables.print_pools(shown)
