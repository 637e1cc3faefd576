"""Show, report on, export and serve a run: `tatar-dist status`, `report`, `export`, `serve`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tatar_dist.commands import Json, Settings
from tatar_dist.errors import UserError


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Draw again every second, until Ctrl-C.")] = False,
) -> None:
    """Show what a run is doing, from its files alone: step, engines, speed, time left, faults.

    Example: [bold]tatar-dist status runs/grpo --watch[/bold]
    """
    from tatar_dist.run.status import RunWatcher

    if watch and as_json:
        raise UserError("--watch and --json cannot be combined: give one of them")
    files = RunWatcher(run)
    if as_json:
        print(json.dumps(asdict(files.read())))
        return
    import time

    from rich.console import Console

    from tatar_dist.run import status_view

    console = Console()
    if watch:
        status_view.watch(files, console)
    else:
        console.print(status_view.view(files.read(), time.time()))


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="A run directory or a demo's; several are compared.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="The page; else RUN/report.html, or ./compare.html of several runs."),
    ] = None,
) -> None:
    """Write an HTML page about a run, or comparing several: results, health, curves, answers.

    A run's page goes to RUN/report.html, a comparison to compare.html in the current directory, or either to --output.

    Example: [bold]tatar-dist report runs/grpo[/bold], [bold]tatar-dist report runs/a runs/b --output a-b.html[/bold]
    """
    if len(runs) == 1:
        from tatar_dist.report import html

        print(html.write(runs[0], output))
        return
    from tatar_dist.report import compare

    print(compare.write(runs, output or Path(compare.FILE)))


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    output: Annotated[Path, typer.Option(help="New directory for the model.")],
    step: Annotated[int | None, typer.Option(metavar="N", help="Of the checkpoint; the newest when left out.")] = None,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="The most of a weights file, as in 500MB.")] = "5GB",
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; as trained when left out.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What evaluate wrote about this checkpoint; else looked for.")
    ] = None,
) -> None:
    """Export the model as a Hugging Face directory (transformers, vLLM) with prompts and a card.

    Example: [bold]tatar-dist export runs/grpo --output models/scorer[/bold]
    """
    from tatar_dist.scoring import export as exporting

    options = {"step": step, "shard_size": shard_size, "dtype": dtype, "evaluation": evaluation}
    print(exporting.run(run, output, **options))  # type: ignore[arg-type]


def serve(
    model: Annotated[Path, typer.Option(metavar="DIR", help="A Hugging Face model directory, as export makes it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Config keys: model.*, rollout.*, data.prompts.")
    ] = None,
    settings: Settings = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the API key to ask for.")
    ] = None,
    open_to_all: Annotated[bool, typer.Option("--open", help="No key though others can reach --host.")] = False,
) -> None:
    """Serve a model: a page to drop images on, /score, vLLM's OpenAI API with models iqa, iaa.

    Example: [bold]tatar-dist serve --model runs/demo/grpo/checkpoints/latest/model --port 8000[/bold]
    """
    from tatar_dist.serve import server

    server.run(model, host, port, api_key_env, open_to_all, [*(settings or []), *(overrides or [])])
