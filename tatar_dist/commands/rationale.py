"""`tatar-dist rationale …`: write, judge and template rationales. Parses, calls the package, prints."""

from __future__ import annotations

import typer

app = typer.Typer(help="Make the rationales that SFT learns from.", no_args_is_help=True)


@app.callback()
def _rationale() -> None:
    """Make the rationales that SFT learns from."""
