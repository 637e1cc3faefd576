"""`make demo`: data, baseline, SFT, GRPO, evaluation, one table and one page, on a laptop's CPU.

Runs the same stages as on a cluster in sequence, with configs/demo.yaml over the recipes. Writes DIR/{data, baseline,
sft, sft_eval, grpo, grpo_eval}/, DIR/summary.json and DIR/report.html. With several seeds, the same is written to
DIR/seed_K with one DIR/data, and the figures of all seeds to DIR/figures.md. A repeated call resumes: stages with a
result are skipped.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tatar_dist.assets import CONFIGS, TINY_MODEL
from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config
from tatar_dist.demo import figures
from tatar_dist.demo.data.make import make_demo, signal_on_death_of_parent
from tatar_dist.errors import UserError
from tatar_dist.scoring.export import model_of
from tatar_dist.types import SPLITS, TASKS


@dataclass(frozen=True)
class DemoSize:
    """Sizes of the demo. `budget`: seconds per stage on two cores, printed beside the measured time."""

    data: dict[str, int]
    baseline_images: int  # per task; the base model rarely stops by itself, so its answers are long
    eval_images: int  # per task
    samples: int  # sampled completions per image, for the reward terms
    overrides: tuple[str, ...]
    budget: dict[str, float]


FULL = DemoSize(
    data={"train": 2000, "validation": 300, "test": 1000},
    baseline_images=64,
    eval_images=300,
    samples=2,
    overrides=(),
    budget={"data": 30, "baseline": 40, "sft": 240, "sft_eval": 60, "grpo": 360, "grpo_eval": 60},
)
SMOKE = DemoSize(
    data={"train": 200, "validation": 40, "test": 60},
    baseline_images=8,
    eval_images=16,
    samples=1,
    overrides=("sft.max_steps=50", "sft.eval_every=0", "grpo.max_steps=3", "grpo.eval_every=0"),
    budget={"data": 10, "baseline": 40, "sft": 75, "sft_eval": 30, "grpo": 50, "grpo_eval": 30},
)

# name, description, the stage whose model it starts from (None: the base model)
STAGES = (
    ("baseline", "the base model, before any training", None),
    ("sft", "supervised fine-tuning on rationales and scores", None),
    ("sft_eval", "held-out photographs after SFT", "sft"),
    ("grpo", "reinforcement learning with Gaussian and Thurstone rewards", "sft"),
    ("grpo_eval", "held-out photographs after GRPO", "grpo"),
)


def run(output: str | Path, smoke: bool = False, overrides: list[str] | None = None, seeds: int = 1) -> None:
    """Run every stage that has no result yet, print the tables, and write summary.json and report.html.

    With `seeds` over 1: run everything once per seed on the same data, in seed_K/, evaluate every model on all test
    crops, and write figures.md.
    """
    signal_on_death_of_parent(signal.SIGTERM)  # killed make or shell: do not run on unnoticed
    out, size, words = Path(output), SMOKE if smoke else FULL, list(overrides or [])
    console = Console()
    same_settings(out, {"smoke": smoke, "seeds": seeds, "overrides": words})
    if seeds == 1:
        _run_one(out, size, words, console)
        return
    _data(out, size, console)
    directories = [out / f"seed_{k}" for k in range(seeds)]
    for k, directory in enumerate(directories):
        console.rule(f"seed {k}")
        directory.mkdir(exist_ok=True)
        if not (directory / "data").exists():
            (directory / "data").symlink_to("../data")
        _run_one(directory, size, [f"seed={k}", f"evaluate.seed={k}", "data.eval_limit=null", *words], console)
    head = figures.regression_head(_config(out / "base", words).model.path, out / "data")
    (out / "figures.md").write_text(figures.markdown(directories, head))
    console.print(f"All seeds together: {out / 'figures.md'}")


def same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Save the settings on the first call and require the same later, so that results are not mixed.

    Raises:
        UserError: they differ, or the directory cannot be written.
    """
    file = out / "settings.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.write_text(json.dumps(settings))
        saved = json.loads(file.read_text())
    except OSError as e:
        raise UserError(f"{out}: cannot write there: {e.strerror}") from e
    if saved != settings:
        differing = ", ".join(f"{k}={saved.get(k)}" for k in settings if saved.get(k) != settings[k])
        raise UserError(f"{out}: holds a demo with other settings ({differing}): give another --output or remove it")


def _data(out: Path, size: DemoSize, console: Console) -> float:
    """Make the data set unless it exists; returns the seconds taken, 0 if it existed."""
    start, fresh = time.perf_counter(), not (out / "data" / "demo.json").exists()
    if fresh:
        console.print("[bold]data[/bold]  crops of real photographs, with measured targets and rationales")
    make_demo(out / "data", **size.data)
    return time.perf_counter() - start if fresh else 0.0


def _run_one(out: Path, size: DemoSize, words: list[str], console: Console) -> None:
    """Run all stages of one seed."""
    from tatar_dist import grpo, sft
    from tatar_dist.cluster.ray_cluster import Cluster
    from tatar_dist.evaluate import runner
    from tatar_dist.report import html

    words = [*size.overrides, *words]
    base = _config(out / "base", words).model.path
    stages: list[dict[str, Any]] = []

    def note(name: str, seconds: float) -> None:
        stages.append({"name": name, "seconds": seconds, "budget_seconds": size.budget[name], "reused": seconds == 0.0})

    note("data", _data(out, size, console))
    with Cluster(_config(out / "base", words)):  # one Ray for all stages
        for name, text, model in STAGES:
            done = out / name / ("metrics.json" if name in figures.MODELS.values() else "finished")
            if done.exists():
                note(name, 0.0)
                continue
            start = time.perf_counter()
            console.print(f"[bold]{name}[/bold]  {text}")
            settings = [f"model.path={model_of(out / model) if model else base}"]
            if name in figures.MODELS.values():
                first = name == "baseline"
                settings.append(f"data.eval_limit={size.baseline_images if first else size.eval_images}")
                settings.append(f"evaluate.samples={0 if first else size.samples}")
                kept = [w for w in words if not (first and w.startswith("data.eval_limit="))]
                runner.run(_config(out / name, [*settings, *kept]))
            else:
                (sft if name == "sft" else grpo).run(_config(out / name, [*settings, *words]))
                done.touch()
            note(name, time.perf_counter() - start)
    summary = {"stages": stages, **figures.results(out)}
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    page = html.write(out)
    figures.print_tables(console, summary)
    console.print(f"The page with curves and a gallery: {page}")


def demo_config(directory: Path, data: Path, words: list[str], files: Sequence[Path] = ()) -> Config:
    """Load the recipes with demo.yaml, overridden by `files`, then by `words`.
    `data` is the directory of the manifests; files and words give their names."""
    recipes = [CONFIGS / name for name in ("sft.yaml", "grpo.yaml", "demo.yaml")]
    # the paths of demo.yaml are relative to the checkout; the demo may be started anywhere
    paths = [f"model.path={TINY_MODEL}", f"data.prompts={CONFIGS / 'prompts.yaml'}", f"data.root={data}"]
    return load_config([str(f) for f in (*recipes, *files)], [f"output={directory}", *paths, *words])


def _config(directory: Path, words: list[str]) -> Config:
    manifests = [f"data.{s}=[{','.join(f'{task}_{s}.parquet' for task in TASKS)}]" for s in SPLITS]
    return demo_config(directory, directory.parent / "data", [*manifests, *words])
