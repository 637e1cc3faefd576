"""Folded part of the page: secondary curves, configurations and the log of faults.

Functions of `Training` that return plain records for the template. Metrics that were not logged are omitted. A
configuration is compared by dotted keys with the recipe: the schema's defaults (config/schema.py), overridden by
configs/STAGE.yaml. Sections that a stage does not read are omitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from markupsafe import Markup
from omegaconf import OmegaConf

from tatar_dist.assets import CONFIGS
from tatar_dist.config.schema import Config
from tatar_dist.report.charts import Line, line_chart, number
from tatar_dist.report.faults import History, history
from tatar_dist.report.panels import Panel
from tatar_dist.report.reading import RunFiles, Training, clean, is_number
from tatar_dist.report.verdict import TASK_NAMES, edges

SHORT = 105  # height of one of two charts in a panel
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
    """Details of one training. `recipe`: configuration file compared with; differing: settings that deviate."""

    kind: str
    panels: list[Panel]
    settings: list[Setting]
    differing: list[Setting]
    recipe: str
    history: History | None


def details(run: RunFiles) -> list[Details]:
    """Return one record per training that has anything to show."""
    found = []
    for training in run.trainings:
        known = settings(training.config, training.kind)
        past = history(training.events, len(training.rows))
        differing = [s for s in known if s.differs]
        found.append(
            Details(training.kind, _panels(training), known, differing, f"configs/{RECIPES[training.kind]}", past)
        )
    return [d for d in found if d.panels or d.settings or d.history]


def _panels(training: Training) -> list[Panel]:
    found = [_gap(training), _waste(training), _failures(training), _optimiser(training), _speed(training)]
    return [p for p in found if any(p.charts)]


def _shares(training: Training, metric: str, title: str, most: float, height: int = SHORT) -> Markup:
    lines = [Line(n, *training.series(f"{metric}/{t}"), t) for t, n in TASK_NAMES.items()]
    return line_chart(lines, title, y_range=(0.0, most), height=height)


def _one(training: Training, metric: str, name: str, smooth: bool = True) -> Markup:
    line = Line(name, *training.series(metric), "ink", smooth=smooth)
    return line_chart([line], f"{name} over steps", y_range=(0.0, 1e-9), height=SHORT)


def _gap(training: Training) -> Panel:
    grpo = training.config.get("grpo")
    limit = grpo.get("logprob_gap_limit") if isinstance(grpo, dict) else None
    stops = f" The run stops at {limit:g}." if is_number(limit) else ""
    caption = f"How far log-probabilities of engine and learner differ, in nats a token: mean, and largest.{stops}"
    charts = [_one(training, "sync/logprob_gap", "mean gap"), _one(training, "sync/logprob_gap_max", "largest")]
    return Panel("Sync gap", caption, charts)


def _waste(training: Training) -> Panel:
    chart = _shares(training, "reward/frac_zero_std/total", "Groups that teach nothing over steps", 1.0, 210)
    return Panel("Groups that teach nothing", "Share of groups whose completions all got one reward.", [chart])


def _failures(training: Training) -> Panel:
    charts = [
        _shares(training, "completion/parse_failures", "Unparsed completions over steps", 0.1),
        _shares(training, "completion/clipped_ratio", "Completions cut off over steps", 0.1),
    ]
    return Panel(
        "Unparsed, and cut off", "Shares of the sampled completions: without a score above, cut off below.", charts
    )


def _optimiser(training: Training) -> Panel:
    charts = [
        _one(training, "optim/grad_norm", "gradient"),
        _one(training, "optim/lr", "rate", smooth=False),
    ]
    return Panel("Optimiser", "Norm of the gradient before clipping, and the learning rate.", charts)


def _speed(training: Training) -> Panel:
    speed, idle = training.series("perf/tokens_per_second")[1], training.series("perf/learner_idle")[1]
    late = f" Late: {number(edges(speed)[1])} tokens a second." if len(speed) else ""
    lines = [
        Line("engines", *training.series("perf/rollout_idle"), "t1"),
        Line("learners", *training.series("perf/learner_idle"), "t2"),
    ]
    charts = [_one(training, "perf/tokens_per_second", "tokens/s")]
    charts += [line_chart(lines, "Idle share over steps", y_range=(0.0, 1.0), height=SHORT)] if len(idle) else []
    return Panel("Speed", f"Sampled tokens a second, and the share of a step in which each side waits.{late}", charts)


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
