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
from tatar_dist.config.schema import Config, ModelConfig, OptimConfig
from tatar_dist.data.manifest import read_manifest
from tatar_dist.errors import UserError
from tatar_dist.run.checkpoints import STATE, latest
from tatar_dist.run.directory import read_metrics
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
    found = evaluation_of(run, checkpoint, evaluation)
    stages, configs, base = _history(run, config, state)
    measured = [load_config([str(found[0] / "config.yaml")], [])] if found else []
    rows, missing = _data([*configs, *measured])
    return {
        "stages": stages,
        "base": _public(base),
        "hub": _is_hub_name(base),
        "family": config.model.family,
        "demo": Path(base).name == DEMO_BASE or any(name.startswith(DEMO_SETS) for name, *_ in rows),
        "data": rows,
        "missing": missing,
        "results": _results(found[1]) if found else [],
        "curve": _curve(run, state["step"]),
    }


def render(known: Mapping[str, Any]) -> str:
    """Render the card as Markdown."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["figure"] = lambda value: "—" if value is None else f"{value:.3f}"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(known) + "\n"


def evaluation_of(run: Path, checkpoint: Path, given: str | Path | None = None) -> tuple[Path, dict[str, Any]] | None:
    """(directory, metrics.json) of an evaluation of `checkpoint`: `given`, else the newest beside `run`, else None.

    Raises:
        UserError: `given` holds no metrics, or those of another model.
    """
    if given is not None:
        found = _read(Path(given) / "metrics.json")
        if found is None or "datasets" not in found:
            raise UserError(f"--evaluation {given}: no metrics.json of an evaluation in it")
        if not _is_of(Path(given), found, checkpoint):
            raise UserError(f"--evaluation {given}: evaluated {found.get('model')}, not {checkpoint / 'model'}")
        return Path(given), found
    beside = run.absolute().parent.glob("*/metrics.json")
    for file in sorted(beside, key=lambda f: f.stat().st_mtime, reverse=True):
        found = _read(file)
        if found is not None and "datasets" in found and _is_of(file.parent, found, checkpoint):
            return file.parent, found
    return None


def _is_of(directory: Path, found: Mapping[str, Any], checkpoint: Path) -> bool:
    """Whether metrics are of `checkpoint`: same path, and not older, because `latest` moves as the run goes on."""
    same = Path(str(found.get("model"))).resolve() == (checkpoint / "model").resolve()
    return same and (directory / "metrics.json").stat().st_mtime >= (checkpoint / STATE).stat().st_mtime


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _history(run: Path, config: Config, state: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Config], str]:
    """(stages, first to last; their configs; the path or name of the base model)."""
    stages, configs = [_stage(config, state["same"]["stage"], state["step"])], [config]
    while (before := _run_of(config.model.path)) is not None:
        directory, checkpoint = before
        newest = latest(directory)
        if newest is None or not (directory / "config.yaml").exists():
            break
        config = load_config([str(directory / "config.yaml")], [])
        named = (_read(checkpoint / STATE) or newest[1])["step"]
        stages.insert(0, _stage(config, newest[1]["same"]["stage"], named))
        configs.insert(0, config)
    return stages, configs, config.model.path


def _run_of(path: str) -> tuple[Path, Path] | None:
    """(run directory, checkpoint) when `path` is the model of a run's checkpoint."""
    model = Path(path)
    if model.name != "model" or model.parent.parent.name != "checkpoints":
        return None
    return model.parents[2], model.parent.resolve()


def _adapters(m: ModelConfig) -> str:
    layers = ", ".join(m.lora_targets) or "all linear layers but the head"
    return f"LoRA of rank {m.lora_rank}, alpha {m.lora_alpha:g}, of {layers}; merged"


def _stage(config: Config, stage: str, steps: int) -> dict[str, Any]:
    """Name, reward preset and settings of a stage; settings are (label, value) pairs for people."""
    m, d, s, g, r = config.model, config.data, config.sft, config.grpo, config.rollout
    shared = [
        ("optimiser steps", steps),
        ("weights", f"{m.dtype}, vision tower {'trained' if m.train_vision else 'frozen'}"),
        *([("trained as adapters", _adapters(m))] if m.lora_rank else []),
        ("pixels of an image", f"{m.min_pixels} to {m.max_pixels}"),
        ("share of IQA", d.iqa_fraction),
        ("seed", config.seed),
    ]
    if stage == "sft":
        own = [("rows a step", s.global_batch), ("optimiser", _optimiser(s.optim))]
        return {"stage": "SFT", "preset": None, "settings": [*shared, *own]}
    preset = Path(config.reward.preset).stem
    changed = {**config.reward.weights, **config.reward.params}
    own = [
        ("batch", f"{g.prompts_per_step} prompts x {g.group_size} completions"),
        ("reward preset", preset + "".join(f", {k}={v:g}" for k, v in changed.items())),
        ("advantage; loss", f"{g.advantage}; {g.aggregation}, ratio by {g.ratio}, clip {g.clip_low:g}/{g.clip_high:g}"),
        ("KL to the start", f"{g.kl_beta:g}, {g.kl_schedule}"),
        ("sampling", f"temperature {r.temperature:g}, at most {r.max_new_tokens} tokens, staleness {g.staleness}"),
        ("optimiser", _optimiser(g.optim)),
    ]
    return {"stage": "GRPO", "preset": preset, "settings": [*shared, *own]}


def _optimiser(o: OptimConfig) -> str:
    scaled = "".join(f", x {factor:g} for {part}" for part, factor in o.lr_scale.items())
    return f"{o.name}, rate {o.lr:g}{scaled}, {o.schedule}, {o.warmup_steps} steps of warm-up"


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


def _results(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(metrics["datasets"].items())


def _curve(run: Path, step: int) -> dict[str, Any] | None:
    """The last eval/SET/{srcc,plcc} that the run itself logged before `step`, or None. A run logs no counts."""
    last = None
    for row in read_metrics(run):
        if isinstance(row.get("step"), int) and row["step"] < step and _measured_sets(row):
            last = row
    if last is None:
        return None
    found = {name: (last[f"eval/{name}/srcc"], last.get(f"eval/{name}/plcc")) for name in _measured_sets(last)}
    return {"step": last["step"] + 1, "sets": sorted(found.items())}


def _measured_sets(row: Mapping[str, Any]) -> list[str]:
    """Data sets whose SRCC is in a line of metrics.jsonl. Their names may contain a slash."""
    keys = [k for k in row if k.startswith("eval/") and k.endswith("/srcc")]
    return [k.removeprefix("eval/").removesuffix("/srcc") for k in keys]


def _is_hub_name(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/")) and not Path(model).exists()


def _public(model: str) -> str:
    """Name to publish: a hub name unchanged, or the last part of a directory."""
    return model if _is_hub_name(model) else Path(model).name
