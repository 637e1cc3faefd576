"""`tatar-dist data …`: make, check and show manifests. Command-line layer without heavy imports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tatar_dist.commands.options import Json

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
    """Annotation files of a data set -> a manifest with scores on 0-100, mapped by the format's declared range.

    Example: [bold]tatar-dist data import KADID-10k --annotations dmos.csv --images images --output kadid.parquet[/bold]
    """
    from tatar_dist.data.imports.importer import Choices, run_import
    from tatar_dist.data.registry import read_registry

    dataset = read_registry(registry or ()).find(name)
    choices = Choices(format=file_format, encoding=encoding, split=split, drop_bad=drop_bad)
    report = run_import(
        *(dataset, annotations, images, output, choices, split_list or (), attributes),
        check_images=not no_check_images,
        embed=embed,
    )
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        from tatar_dist.commands.data_tables import print_import

        print_import(report)


@app.command("sets")
def sets(registry: Registries = None, as_json: Json = False) -> None:
    """The data sets that can be imported: formats, columns, ranges, counts, where to get them.

    Example: [bold]tatar-dist data sets[/bold]
    """
    from tatar_dist.commands.data_tables import print_sets, sets_as_json
    from tatar_dist.data.registry import read_registry

    known = read_registry(registry or ())
    if as_json:
        print(json.dumps(sets_as_json(known), ensure_ascii=False))
    else:
        print_sets(known)


ImageRoot = Annotated[
    Path | None, typer.Option("--images", metavar="DIR", help="Where image paths start, whatever the manifest says.")
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
    as_json: Json = False,
) -> None:
    """Decode every picture, check every row; duplicates, leaks between splits, score histograms. Exit 2 if unusable.

    Example: [bold]tatar-dist data validate data/koniq.parquet --clean data/koniq-clean.parquet[/bold]
    """
    from tatar_dist.commands.data_validation import run_validation

    run_validation(manifests, output, workers, clean, images, as_json)


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
    """What is in a manifest: a table of its pools, and a contact sheet of some pictures.

    Example: [bold]tatar-dist data show data/koniq.parquet --rows 40 --sort score[/bold]
    """
    from tatar_dist.commands.data_validation import run_show

    run_show(manifest, rows, sort, dataset, output, images, as_json)
