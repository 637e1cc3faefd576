"""`tatar-dist serve`: run vLLM's server with our prompts, `/score` and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[Path, typer.Option(metavar="DIR", help="A Hugging Face model directory, as export makes it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Config keys: model.*, rollout.*, data.prompts.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the API key to ask for.")
    ] = None,
    open_to_all: Annotated[bool, typer.Option("--open", help="No key though others can reach --host.")] = False,
) -> None:
    """Serve a model: a page to drop images on, /score, and vLLM's OpenAI API with the models iqa and iaa.

    Example: [bold]tatar-dist serve --model runs/demo/grpo/checkpoints/latest/model --port 8000[/bold]
    """
    from tatar_dist.serve import server

    server.run(model, server.Address(host, port, api_key_env, open_to_all), overrides or [])
