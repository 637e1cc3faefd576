"""Folded part of the page: secondary curves, configurations and the log of faults.

A configuration is compared by dotted keys with the recipe: the schema's defaults (config/schema.py), overridden by
configs/STAGE.yaml. Sections that a stage does not read are omitted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from tatar_dist.assets import CONFIGS
from tatar_dist.config.schema import Config
from tatar_dist.report.panels import MORE, Panel, drawn
from tatar_dist.report.reading import History, RunFiles, clean

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


@dataclass(frozen=True)
class Details:
    """Details of one training. `recipe`: the configuration file that the settings are compared with."""

    kind: str
    panels: list[Panel]
    settings: list[Setting]
    recipe: str
    history: History | None


def details(run: RunFiles) -> list[Details]:
    """Return one record per training."""
    return [
        Details(t.kind, drawn(t, MORE), settings(t.config, t.kind), f"configs/{RECIPES[t.kind]}", t.history)
        for t in run.trainings
    ]


def settings(config: Mapping[str, Any], stage: str) -> list[Setting]:
    """Return every key that the stage reads. stage: sft | grpo | evaluate."""
    recipe = recipe_of(stage)
    return [Setting(k, v, recipe.get(k)) for k, v in flat(config, NOT_READ[stage]).items()]


def differing(configs: Sequence[tuple[Mapping[str, Any], str]]) -> list[tuple[str, list[str]]]:
    """Return (key, value of each run) of the keys that differ between runs, given as (configuration, stage)."""
    flattened = [flat(config, NOT_READ[stage]) for config, stage in configs]
    keys = dict.fromkeys(k for f in flattened for k in f)
    rows = [(k, [f.get(k, ABSENT) for f in flattened]) for k in keys]
    return [(k, values) for k, values in rows if len(set(values)) > 1]


def flat(config: Mapping[Any, Any], left_out: Sequence[str] = (), prefix: str = "") -> dict[str, str]:
    """Flatten a configuration to {dotted key: value as text}, without the keys in `left_out`."""
    values: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in left_out:
            continue
        values |= (
            flat(value, left_out, f"{name}.")
            if isinstance(value, Mapping)
            else {name: clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))}
        )
    return values


@cache
def recipe_of(stage: str) -> dict[str, str]:
    """Return the recipe of a stage as {dotted key: value as text}."""
    recipe: Any = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(CONFIGS / RECIPES[stage]))
    return flat(OmegaConf.to_container(recipe), NOT_READ[stage])  # type: ignore[arg-type]
