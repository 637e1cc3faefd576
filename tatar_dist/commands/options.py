"""Shared by several commands: the `--json` option, and printing of result objects with and without it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_result(result: Any, as_json: bool) -> None:
    """Print a result object as JSON, or as indented `key: value` lines."""
    if as_json:
        print(json.dumps(result, default=str))
        return

    def lines(value: Any, indent: str) -> list[str]:
        out = []
        for key, item in value.items():
            if isinstance(item, dict):
                out += [f"{indent}{key}:", *lines(item, indent + "  ")]
            else:
                shown = "—" if item is None else f"{item:.4f}" if isinstance(item, float) else item
                out.append(f"{indent}{key}: {shown}")
        return out

    print("\n".join(lines(result, "")) if isinstance(result, dict) else result)
