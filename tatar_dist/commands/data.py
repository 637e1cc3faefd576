"""`tatar-dist data …`: make, check and look at manifests. Parses, calls the package, prints; imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make and look at manifests, the Parquet files all stages read.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
    from tatar_dist.data.demo import make_demo

    counts = make_demo(output, seed=seed, train=train, validation=validation, test=test)
    files = {str(output / f"{name}.parquet"): rows for name, rows in counts.items()}
    print(json.dumps(files) if as_json else "\n".join(f"{rows:6d}  {name}" for name, rows in files.items()))
