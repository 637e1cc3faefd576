"""Bundled files: the recipes and tables of `configs/`, and the demo's base model.

`configs/` stands at the top of the repository; the link in this directory makes a wheel carry it.
"""

from __future__ import annotations

import os
from pathlib import Path

ASSETS = Path(__file__).parent
CONFIGS = ASSETS / "configs"
if not CONFIGS.is_dir():  # a checkout without symbolic links
    CONFIGS = ASSETS.parents[1] / "configs"
RECIPES = ("sft.yaml", "grpo.yaml", "eval.yaml", "demo.yaml", "lora.yaml", "rationale.yaml")  # of --config
TINY_MODEL = ASSETS / "tiny-qwen2_5-vl"


def locate(name: str | Path) -> Path:
    """Return path `name` if it exists, else the bundled file of that name, else `name` as it is.

    A bundled file has its name below `configs/`, and the model its own: `grpo.yaml`, `configs/grpo.yaml`,
    `probes/probe.yaml`, `tiny-qwen2_5-vl`, `tatar_dist/assets/tiny-qwen2_5-vl`. What begins with `./`, `../` or `/` is
    never bundled.
    """
    path = Path(name)
    if os.path.lexists(path) or path.is_absolute() or str(name).startswith(".") or ".." in path.parts:
        return path
    short = path.as_posix().removeprefix("tatar_dist/assets/")
    if short == TINY_MODEL.name:
        return TINY_MODEL
    bundled = CONFIGS / short.removeprefix("configs/")
    return bundled if bundled.is_file() else path


def looked_in(path: str | Path) -> str:
    """Say in an error message where a missing path was looked up: " in DIRECTORY" if relative."""
    return "" if Path(path).is_absolute() else f" in {Path.cwd()}"
