"""Run `make demo` on a laptop's CPU: data, baseline, SFT, GRPO, evaluation, report.

Runs the stages of a cluster run one after another, with configs/demo.yaml overriding the recipes. Writes DIR/{data,
baseline, sft, sft_eval, grpo, grpo_eval}/, DIR/summary.json and DIR/report.html. With several seeds, each seed has its
own DIR/seed_K, all share DIR/data, and DIR/figures.md tabulates the results of all seeds. A repeated call resumes:
stages with a result are skipped.
"""

from __future__ import annotations

import ctypes
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
from tatar_dist.demo.data.make import make_demo
from tatar_dist.errors import UserError
from tatar_dist.run.files import write_whole, writing
from tatar_dist.scoring.export import model_of
from tatar_dist.types import SPLITS, TASKS

PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True)
class DemoSize:
    """Sizes of the demo. `budget`: seconds per stage on two cores, printed beside measured ones."""

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

# name, description, what is run, the stage whose model it starts from (None: the base model)
STAGES = (
    ("baseline", "the base model, before any training", "evaluate", None),
    ("sft", "supervised fine-tuning on rationales and scores", "sft", None),
    ("sft_eval", "held-out photographs after SFT", "evaluate", "sft"),
    ("grpo", "reinforcement learning with Gaussian and Thurstone rewards", "grpo", "sft"),
    ("grpo_eval", "held-out photographs after GRPO", "evaluate", "grpo"),
)


def run(output: str | Path, smoke: bool = False, overrides: list[str] | None = None, seeds: int = 1) -> None:
    """Run all stages without a result, print tables, and write summary.json and report.html.

    With `seeds` over 1: run everything once per seed on the same data, in seed_K/, evaluate every model on all test
    crops, and write figures.md.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # killed make or shell: do not run on unnoticed
    out, size, words = Path(output), SMOKE if smoke else FULL, list(overrides or [])
    console = Console()
    same_settings(out, {"smoke": smoke, "seeds": seeds, "overrides": words})
    words = [*size.overrides, *words]
    if seeds == 1:
        _run_one(out, size, words, console)
        return
    make_demo(out / "data", **size.data)
    directories = [out / f"seed_{k}" for k in range(seeds)]
    for k, directory in enumerate(directories):
        console.rule(f"seed {k}")
        directory.mkdir(exist_ok=True)
        if not (directory / "data").exists():
            (directory / "data").symlink_to("../data")
        _run_one(directory, size, [f"seed={k}", f"evaluate.seed={k}", "data.eval_limit=null", *words], console)
    from tatar_dist.demo.tiny.probe import regression_head

    head = regression_head(demo_config(out / "base", out / "data", words).model.path, out / "data")
    write_whole(out / "figures.md", figures.markdown(directories, head))
    console.print(f"All seeds together: {out / 'figures.md'}")


def same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Save the settings on the first call and require them later, so that results do not mix.

    Raises:
        UserError: they differ, or the directory cannot be written.
    """
    file = out / "settings.json"
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_whole(file, json.dumps(settings))
    saved = json.loads(file.read_text())
    if saved != settings:
        differing = ", ".join(f"{k}={saved.get(k)}" for k in settings if saved.get(k) != settings[k])
        raise UserError(f"{out}: holds a demo with other settings ({differing}): give another --output or remove it")


def _run_one(out: Path, size: DemoSize, words: list[str], console: Console) -> None:
    """Run all stages of one seed."""
    from tatar_dist.cluster.ray_cluster import Cluster
    from tatar_dist.report import html

    console.print("[bold]data[/bold]  crops of real photographs, with measured targets and rationales")
    start, reused = time.perf_counter(), (out / "data" / "demo.json").exists()
    make_demo(out / "data", **size.data)
    seconds = {"data": 0.0 if reused else time.perf_counter() - start}
    with Cluster(demo_config(out / "base", out / "data", words)):  # one Ray for all stages
        for name, text, stage, before in STAGES:
            console.print(f"[bold]{name}[/bold]  {text}")
            settings = list(words)
            if stage == "evaluate":
                settings = [f"data.eval_limit={size.eval_images}", f"evaluate.samples={size.samples}", *words]
            if name == "baseline":
                settings += [f"data.eval_limit={size.baseline_images}", "evaluate.samples=0"]
            if before:
                settings.append(f"model.path={model_of(out / before)}")
            seconds[name] = run_stage(stage, demo_config(out / name, out / "data", settings))
    stages = [
        {"name": name, "seconds": s, "budget_seconds": size.budget[name], "reused": s == 0.0}
        for name, s in seconds.items()
    ]
    summary = {"stages": stages, **figures.results(out)}
    write_whole(out / "summary.json", json.dumps(summary, indent=1))
    page = html.write(out)
    figures.print_tables(console, summary)
    console.print(f"The page with curves and a gallery: {page}")


def run_stage(stage: str, config: Config) -> float:
    """Run a stage unless `config.output` holds its result. Returns the seconds taken, else 0."""
    from tatar_dist import grpo, sft
    from tatar_dist.evaluate import runner

    result = Path(config.output) / ("metrics.json" if stage == "evaluate" else "finished")
    if result.exists():
        return 0.0
    start = time.perf_counter()
    {"sft": sft.run, "grpo": grpo.run, "evaluate": runner.run}[stage](config)
    result.touch()
    return time.perf_counter() - start


def demo_config(directory: Path, data: Path, words: list[str], files: Sequence[Path] = ()) -> Config:
    """Load recipes and demo.yaml for manifests in `data`; `files`, then `words` override them.

    The files name the manifests where there are any.
    """
    recipes = [CONFIGS / name for name in ("sft.yaml", "grpo.yaml", "demo.yaml")]
    # the paths of demo.yaml are relative to the checkout; the demo may be started anywhere
    paths = [f"model.path={TINY_MODEL}", f"data.prompts={CONFIGS / 'prompts.yaml'}", f"data.root={data}"]
    if not files:
        paths += [f"data.{s}=[{','.join(f'{task}_{s}.parquet' for task in TASKS)}]" for s in SPLITS]
    return load_config([str(f) for f in (*recipes, *files)], [f"output={directory}", *paths, *words])
