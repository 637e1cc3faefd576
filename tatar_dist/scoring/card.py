"""Model card of an exported model: `render` writes the `facts` by `model_card.md.j2`.

Earlier stages are found by following `model.path` from run to run. A card contains no paths of the writing machine.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

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
    """Return values for `render`; scoring/export.py adds prompts, dtype and limits.

    Raises UserError if `evaluation` holds no metrics, or those of another model.
    """
    directory, metrics = _evaluation_of(run, checkpoint, evaluation) or (None, None)
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
        "demo_base": Path(base).name == DEMO_BASE,
        "demo_sets": sorted({name for name, *_ in rows if name.startswith(DEMO_SETS)}),
        "data": rows,
        "missing": missing,
        "results": sorted(metrics["datasets"].items()) if metrics else [],
        "curve": _curve(run, state["step"]),
    }


def render(known: Mapping[str, Any]) -> str:
    """Render the card as Markdown."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["figure"] = lambda value: "—" if value is None else f"{value:.3f}"
    environment.filters["short"] = "{:g}".format
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(known) + "\n"


def _evaluation_of(run: Path, checkpoint: Path, given: str | Path | None) -> tuple[Path, dict[str, Any]] | None:
    """Return (directory, metrics) of `given` or of the newest evaluation beside `run`, or None."""
    beside = [file.parent for file in run.absolute().parent.glob("*/metrics.json")]
    for directory in [Path(given)] if given else sorted(beside, key=_written, reverse=True):
        metrics = _read(directory / "metrics.json")
        same = Path(str(metrics.get("model"))).resolve() == (checkpoint / "model").resolve()
        # an older one was of another checkpoint: `latest` moves as the run goes on
        if "datasets" in metrics and same and _written(directory) >= (checkpoint / STATE).stat().st_mtime:
            return directory, metrics
    if given:
        raise UserError(f"--evaluation {given}: metrics.json is absent or not of {checkpoint / 'model'}; evaluate that")
    return None


def _written(directory: Path) -> float:
    return (directory / "metrics.json").stat().st_mtime


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is none."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _stages(run: Path, config: Config, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the stages up to this run, oldest first, as the template reads them."""
    stages: list[dict[str, Any]] = []
    while True:
        stage, accepted = state["same"]["stage"], state.get("accepted", [])
        preset = Path(config.reward.preset).stem if stage == "grpo" else None
        entry = {"stage": stage.upper(), "steps": state["step"], "preset": preset, "config": config}
        stages.insert(0, entry | {"accepted": accepted})
        before = run_of(Path(config.model.path))
        newest = latest(before) if before else None
        if before is None or newest is None or not (before / "config.yaml").exists():
            return stages
        state = _read(Path(config.model.path).parent.resolve() / STATE) or newest[1]
        config = load_config([str(before / "config.yaml")], [])


def _data(configs: Iterable[Config]) -> tuple[list[tuple[str, str, str, int]], list[str]]:
    """Count the rows of the manifests that stages and evaluation read, each manifest once.
    Returns ([(data set, task, split, rows)], [file names of unreadable manifests])."""
    rows: Counter[tuple[str, str, str]] = Counter()
    missing = set()
    manifests = {
        ((Path(config.data.root) / name).absolute(), split)
        for config, split in product(configs, SPLITS)
        for name in getattr(config.data, split)
    }
    for path, split in manifests:
        try:
            pools = read_manifest(path).pools
        except UserError:
            missing.add(path.name)
            continue
        used = [p for p in pools if p.split == split] or list(pools)  # as prompts/source.py takes them
        rows.update({(p.dataset, p.task, p.split): p.rows for p in used})
    listed = sorted(rows.items(), key=lambda item: (item[0][1], SPLITS.index(item[0][2]), item[0][0]))
    return [(*key, n) for key, n in listed], sorted(missing)


def _curve(run: Path, step: int) -> dict[str, Any] | None:
    """Return the last eval/SET/{srcc,plcc} that the run itself logged before `step`, or None."""
    curve = None
    for row in read_metrics(run):
        # a set's name may contain a slash
        names = sorted(k[len("eval/") : -len("/srcc")] for k in row if k.startswith("eval/") and k.endswith("/srcc"))
        if names and isinstance(row.get("step"), int) and row["step"] < step:
            sets = [(name, (row[f"eval/{name}/srcc"], row.get(f"eval/{name}/plcc"))) for name in names]
            curve = {"step": row["step"] + 1, "sets": sets}
    return curve


def _is_hub_name(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/")) and not Path(model).exists()
