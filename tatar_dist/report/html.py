"""Write the one-file HTML report of a run: `write(run)`, also `tatar-dist report RUN`.

Takes a run directory (SFT, GRPO, evaluation) or a demo directory. The page has no scripts and fetches nothing; its
content-security policy forbids both. All texts of the run are escaped, since model output is untrusted. The verdict
comes first, then health, curves, errors and texts. Missing parts are omitted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from omegaconf import OmegaConf

from tatar_dist import __version__
from tatar_dist.assets import CONFIGS
from tatar_dist.config.schema import Config
from tatar_dist.report.charts import nice_ticks, number, percent
from tatar_dist.report.explanation import explanations
from tatar_dist.report.gallery import Pictures, walls
from tatar_dist.report.panels import MORE, Panel, clouds, drawn, panels, photographs
from tatar_dist.report.reading import History, RunFiles, clean, is_number, read_rollouts, read_run
from tatar_dist.report.verdict import TASK_NAMES, checks, headline, name_of, verdict
from tatar_dist.run.files import write_whole, writing

MOST_QUARANTINED = 20
NOT_READ = {
    "sft": ("grpo", "rollout", "reward", "evaluate", "rationale"),
    "grpo": ("sft", "rationale"),
    "evaluate": ("sft", "grpo", "checkpoint", "watch", "rationale"),
}
RECIPES = {"sft": "sft.yaml", "grpo": "grpo.yaml", "evaluate": "eval.yaml"}
ABSENT = "—"
FACTS = {  # kind of run -> (section, key, what the page calls it)
    "sft": (("model", "path", "starts from"), ("sft", "global_batch", "global batch")),
    "grpo": (
        ("reward", "preset", "reward preset"),
        ("grpo", "prompts_per_step", "prompts a step"),
        ("grpo", "group_size", "completions a prompt"),
    ),
}


def write(directory: Path, file: Path | None = None) -> Path:
    """Write the page of a run to `file`, or to RUN/report.html, and return its path.

    Raises:
        UserError: no such directory, no run in it, or the page cannot be written there.
    """
    run = read_run(directory)
    notes = list(run.notes)
    quarantined = [
        [clean(str(q.get(k, ""))) for k in ("sample_id", "reason")] for t in run.trainings for q in t.quarantine
    ]
    sampled = run.training("grpo")
    rollouts = read_rollouts(sampled, notes) if sampled else None
    explained = explanations(sampled, rollouts, notes) if sampled and rollouts else []
    scores = _scores(run)
    pictures = Pictures(run.manifests, run.image_root, notes)
    drawn_clouds, held_out = clouds(run, rollouts)
    health = list(checks(run))
    return write_page(
        file or run.path / "report.html",
        "template.html.j2",
        name="/".join(run.path.resolve().parts[-2:]),
        kind=run.kind,
        headline=headline(run),
        strips=_strips(scores),
        scores=scores,
        gains=_gains(run),
        checks=health,
        verdict=verdict(run, health),
        quarantined=quarantined[:MOST_QUARANTINED],
        n_quarantined=len(quarantined),
        panels=panels(run),
        clouds=drawn_clouds,
        held_out=held_out,
        photographs=photographs(run),
        gallery=walls(run, rollouts, pictures),
        explained=explained,
        images={g.key: pictures.uri(g.key) for g in explained},
        task_names=TASK_NAMES,
        details=details(run),
        stages=run.summary.get("stages", []),
        facts=_facts(run),
        notes=list(dict.fromkeys(notes)),
    )


def write_page(file: Path, template: str, **content: Any) -> Path:
    """Render a template of this directory, autoescaped; write it atomically and return its path.

    Raises:
        UserError: the page cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("tatar_dist.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "duration": duration}
    environment.tests["figure"] = is_number
    page = environment.get_template(template).render(content, version=__version__)
    with writing(file):
        write_whole(file, page.encode("utf-8", "replace"))
    return file


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _gains(run: RunFiles) -> list[tuple[str, str, list[float]]]:
    """Return (task, measure, [change, low, high]) of a demo, without undefined changes."""
    gains: dict[str, dict[str, list[float]]] = run.summary.get("gains", {})
    return [
        (task, measure, values)
        for task, measures in gains.items()
        for measure, values in measures.items()
        if all(map(is_number, values))
    ]


Scores = list[tuple[str, str, list[tuple[str, Mapping[str, Any]]]]]  # (data set's name, task, [(model, metrics)])


def _scores(run: RunFiles) -> Scores:
    return [
        (name_of(run, d), run.task(d), [(e.model, e.metrics[d]) for e in run.evaluations if d in e.metrics])
        for d in run.datasets
    ]


def _strips(scores: Scores) -> dict[str, Any] | None:
    """Place data sets on an SRCC scale up to 1: (name, task, [(model, SRCC, place in percent)])."""
    known = [(name, task, [(m, v["srcc"]) for m, v in of if is_number(v.get("srcc"))]) for name, task, of in scores]
    known = [row for row in known if row[2]]
    if not known:
        return None
    lowest = min(v for *_, values in known for _, v in values)
    lo = 0.0 if lowest >= 0 else -0.25 if lowest >= -0.25 else -1.0

    def at(value: float) -> float:
        return round(100 * (value - lo) / (1 - lo), 2)

    rows = [(name, task, [(m, v, at(v)) for m, v in values]) for name, task, values in known]
    return {"rows": rows, "ticks": [(t, at(t)) for t in nice_ticks(lo, 1.0, 4)]}


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    """Select configuration values for the foot of the page."""
    facts = []
    for training in run.trainings:
        kind = training.kind.upper()
        facts.append((f"{kind} steps", f"{len(training.rows):,}"))
        for section, key, text in FACTS[training.kind]:
            values = training.config.get(section)
            if isinstance(values, dict) and key in values:
                facts.append((f"{kind} {text}", str(values[key])))
    return facts


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
    """Details of one training. recipe: the configuration file that settings are compared with."""

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


def differing(configs: Sequence[Mapping[str, Any]], stage: str) -> list[tuple[str, list[str]]]:
    """Return (key, value of each run) of keys that the stage reads and that differ between runs."""
    flattened = [flat(config, NOT_READ[stage]) for config in configs]
    rows = [(key, [f.get(key, ABSENT) for f in flattened]) for key in dict.fromkeys(k for f in flattened for k in f)]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


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
