"""Compare a run's configuration with the recipe, and configurations of several runs, as dotted keys.

Takes resolved configurations from run directories, without validation, and returns `Setting`s in file order. The recipe
is the schema's defaults (config/schema.py), overridden by configs/STAGE.yaml where this checkout has it. Sections that
a stage does not read are omitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from tatar_dist.assets import CONFIGS
from tatar_dist.config.schema import Config
from tatar_dist.report.text import clean

NOT_READ = {
    "sft": ("grpo", "rollout", "reward", "evaluate", "rationale"),
    "grpo": ("sft", "rationale"),
    "evaluate": ("sft", "grpo", "checkpoint", "watch", "rationale"),
}
RECIPES = {"sft": "sft.yaml", "grpo": "grpo.yaml", "evaluate": "eval.yaml"}
ABSENT = "—"


@dataclass(frozen=True)
class Setting:
    """One key. default: the recipe's value as text, None if the recipe has no such key."""

    key: str
    value: str
    default: str | None

    @property
    def differs(self) -> bool:
        return self.value != self.default


def settings(config: Mapping[str, Any], stage: str) -> list[Setting]:
    """Return every key that the stage reads. stage: sft | grpo | evaluate."""
    recipe = recipe_of(stage)
    return [Setting(k, v, recipe.get(k)) for k, v in flat(config, NOT_READ[stage]).items()]


def differing(configs: Sequence[tuple[Mapping[str, Any], str]]) -> list[tuple[str, list[str]]]:
    """Return (key, value of each run) of the keys that differ between runs, given as (configuration, stage)."""
    found = [flat(config, NOT_READ[stage]) for config, stage in configs]
    keys = list(dict.fromkeys(k for f in found for k in f))
    rows = [(k, [f.get(k, ABSENT) for f in found]) for k in keys]
    return [(k, values) for k, values in rows if len(set(values)) > 1]


def flat(config: Mapping[str, Any], left_out: Sequence[str] = ()) -> dict[str, str]:
    """Flatten a configuration to {dotted key: value as text}, without the keys in `left_out`."""
    found: dict[str, str] = {}

    def walk(section: Mapping[Any, Any], prefix: str) -> None:
        for key, value in section.items():
            name = f"{prefix}{key}"
            if name in left_out:
                continue
            if isinstance(value, Mapping):
                walk(value, name + ".")
            else:
                found[name] = _text(value)

    walk(config, "")
    return found


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:g}" if abs(value) < 1e5 and value == float(f"{value:g}") else str(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_text(v) for v in value) + "]"
    return clean(str(value))


@cache
def recipe_of(stage: str) -> dict[str, str]:
    """Return the recipe of a stage as {dotted key: value as text}."""
    recipe: Any = OmegaConf.structured(Config)
    file = CONFIGS / RECIPES[stage]
    if file.is_file():
        recipe = OmegaConf.merge(recipe, OmegaConf.load(file))
    return flat(OmegaConf.to_container(recipe), NOT_READ[stage])  # type: ignore[arg-type]
