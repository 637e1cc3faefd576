"""Model card of an exported model: base model, training, data, measurements, usage.

`facts` collects a dict from a run directory, the exported checkpoint and its evaluation; `render` makes the text of
README.md from it with `model_card.md.j2`. Earlier stages are found by following `model.path` from run to run. A card
contains no paths of the machine that wrote it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config
from tatar_dist.data.manifest import read_manifest
from tatar_dist.errors import UserError
from tatar_dist.run.checkpoints import STATE, latest
from tatar_dist.run.directory import read_metrics
from tatar_dist.scoring.directory import run_of
from tatar_dist.types import SPLITS

NAME = "README.md"
TEMPLATE = Path(__file__).with_name("model_card.md.j2")
DEMO_BASE, DEMO_SETS = "tiny-qwen2_5-vl", "demo-"  # the demo's base model; how its data sets' names begin


def facts(
    run: Path, checkpoint: Path, state: Mapping[str, Any], config: Config, evaluation: str | Path | None
) -> dict[str, Any]:
    """Values for `render`, except prompts, dtype and limits, which scoring/export.py adds.

    Raises:
        UserError: `evaluation` holds no metrics, or those of another model.
    """
    directory, metrics = evaluation_of(run, checkpoint, evaluation) or (None, None)
    stages = _stages(run, config, state)
    configs = [s["config"] for s in stages]
    base = configs[0].model.path
    measured = [load_config([str(directory / "config.yaml")], [])] if directory else []
    rows, missing = _data([*configs, *measured])
    return {
        "stages": stages,
        "base": base if _is_hub_name(base) else Path(base).name,
        "hub": _is_hub_name(base),
        "family": config.model.family,
        "demo": Path(base).name == DEMO_BASE or any(name.startswith(DEMO_SETS) for name, *_ in rows),
        "data": rows,
        "missing": missing,
        "results": sorted(metrics["datasets"].items()) if metrics else [],
        "curve": _curve(run, state["step"]),
    }


def render(known: Mapping[str, Any]) -> str:
    """Render the card as Markdown."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["figure"] = lambda value: "—" if value is None else f"{value:.3f}"
    environment.filters["short"] = "{:g}".format
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(known) + "\n"


def evaluation_of(run: Path, checkpoint: Path, given: str | Path | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Return (directory, metrics) of an evaluation of `checkpoint`: `given`, else the newest beside `run`, else None.

    Raises:
        UserError: `given` holds no metrics, or those of another model.
    """
    if given is not None:
        directory = Path(given)
        metrics = _read(directory / "metrics.json")
        if "datasets" not in metrics:
            raise UserError(f"--evaluation {given}: no metrics.json of an evaluation in it")
        if not _is_of(directory, metrics, checkpoint):
            raise UserError(f"--evaluation {given}: evaluated {metrics.get('model')}, not {checkpoint / 'model'}")
        return directory, metrics
    beside = run.absolute().parent.glob("*/metrics.json")
    for file in sorted(beside, key=lambda f: f.stat().st_mtime, reverse=True):
        metrics = _read(file)
        if "datasets" in metrics and _is_of(file.parent, metrics, checkpoint):
            return file.parent, metrics
    return None


def _is_of(directory: Path, metrics: Mapping[str, Any], checkpoint: Path) -> bool:
    """Whether metrics are of `checkpoint`: same path, and not older, because `latest` moves as the run goes on."""
    same = Path(str(metrics.get("model"))).resolve() == (checkpoint / "model").resolve()
    return same and (directory / "metrics.json").stat().st_mtime >= (checkpoint / STATE).stat().st_mtime


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is none."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _stages(run: Path, config: Config, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Stage, optimiser steps, reward preset and config of the run and of those that it started from, first to last."""
    stages = [_stage(config, state["same"]["stage"], state["step"])]
    while (directory := run_of(Path(config.model.path))) is not None:
        checkpoint = Path(config.model.path).parent.resolve()
        newest = latest(directory)
        if newest is None or not (directory / "config.yaml").exists():
            break
        config = load_config([str(directory / "config.yaml")], [])
        steps = (_read(checkpoint / STATE) or newest[1])["step"]
        stages.insert(0, _stage(config, newest[1]["same"]["stage"], steps))
    return stages


def _stage(config: Config, stage: str, steps: int) -> dict[str, Any]:
    preset = Path(config.reward.preset).stem if stage == "grpo" else None
    return {"stage": stage.upper(), "steps": steps, "preset": preset, "config": config}


def _data(configs: Iterable[Config]) -> tuple[list[tuple[str, str, str, int]], list[str]]:
    """([(data set, task, split, rows)], [names of unreadable manifests]) of the manifests of all stages.
    Each manifest that a stage or the evaluation read is counted once."""
    rows: Counter[tuple[str, str, str]] = Counter()
    missing, seen = [], set()
    for config, split in ((c, s) for c in configs for s in SPLITS):
        for name in getattr(config.data, split):
            path = (Path(config.data.root) / name).absolute()
            if (path, split) in seen:
                continue
            seen.add((path, split))
            try:
                pools = read_manifest(path).pools
            except UserError:
                missing.append(path.name)
                continue
            used = [p for p in pools if p.split == split] or list(pools)  # as prompts/source.py takes them
            rows.update({(p.dataset, p.task, p.split): p.rows for p in used})
    order = {s: i for i, s in enumerate(SPLITS)}
    listed = sorted(rows.items(), key=lambda item: (item[0][1], order[item[0][2]], item[0][0]))
    return [(*key, n) for key, n in listed], sorted(set(missing))


def _curve(run: Path, step: int) -> dict[str, Any] | None:
    """Return the last eval/SET/{srcc,plcc} that the run itself logged before `step`, or None."""
    last = None
    for row in read_metrics(run):
        if isinstance(row.get("step"), int) and row["step"] < step and _measured_sets(row):
            last = row
    if last is None:
        return None
    sets = {name: (last[f"eval/{name}/srcc"], last.get(f"eval/{name}/plcc")) for name in _measured_sets(last)}
    return {"step": last["step"] + 1, "sets": sorted(sets.items())}


def _measured_sets(row: Mapping[str, Any]) -> list[str]:
    """Data sets whose SRCC is in a line of metrics.jsonl. Their names may contain a slash."""
    keys = [k for k in row if k.startswith("eval/") and k.endswith("/srcc")]
    return [k.removeprefix("eval/").removesuffix("/srcc") for k in keys]


def _is_hub_name(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/")) and not Path(model).exists()
