"""Files that come with the package: the recipes and tables of `configs/`, and the demo's base model.

`configs/` stands at the top of the repository; the link in this directory makes a wheel carry it.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parent
CONFIGS = ASSETS / "configs"
RECIPES = ("sft.yaml", "grpo.yaml", "eval.yaml", "demo.yaml", "lora.yaml", "rationale.yaml")  # of --config
TINY_MODEL = ASSETS / "tiny-qwen2_5-vl"


def locate(name: str | Path) -> Path:
    """Return the path `name` where it exists, else the bundled file of that name, else `name` as it is.

    A bundled file has its name below `configs/` or below this directory: `grpo.yaml`, `configs/grpo.yaml`,
    `probes/probe.yaml`, `tiny-qwen2_5-vl`, `tatar_dist/assets/tiny-qwen2_5-vl`.
    """
    path = Path(name)
    if path.exists() or path.is_absolute() or ".." in path.parts:
        return path
    short = str(path).removeprefix("tatar_dist/assets/")
    found = (p for p in (CONFIGS / short, ASSETS / short) if short and p.exists())
    return next(found, path)


def looked_in(path: str | Path) -> str:
    """Say for an error message where a path that does not exist was looked up: " in DIRECTORY" if it is relative."""
    return "" if Path(path).is_absolute() else f" in {Path.cwd()}"
