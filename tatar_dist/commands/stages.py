"""Run or plan the stages: `tatar-dist demo`, `probes`, `sft`, `grpo`, `evaluate`, `plan`."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tatar_dist.commands import Json
from tatar_dist.errors import UserError
from tatar_dist.plan import proven
from tatar_dist.plan.simulate import CardName

Configs = Annotated[list[Path], typer.Option("--config", help="YAML file; may repeat, later files win.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides of config keys, after all files.")
]
Stage = Literal["sft", "grpo", "evaluate"]
STAGE_MODULES = {"sft": "tatar_dist.sft", "grpo": "tatar_dist.grpo", "evaluate": "tatar_dist.evaluate.runner"}
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run, load nothing.")]


def demo(
    output: Annotated[Path, typer.Option(help="Directory for data, runs and report.")],
    overrides: Overrides = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps of everything, in minutes.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Whole runs on the same data, compared in figures.md.")] = 1,
) -> None:
    """Run the whole pipeline on the CPU with a tiny model: data, SFT, GRPO, evaluation, report.

    Example: [bold]tatar-dist demo --output runs/demo rollout.engines=2[/bold]
    """
    from tatar_dist.demo import pipeline as demo_pipeline

    demo_pipeline.run(output, smoke, overrides, seeds)


def probes(
    output: Annotated[Path, typer.Option(help="Directory for data, runs, table and plots.")],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions with other seeds.")] = 3,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps of everything: shows that it runs.")] = False,
    forms: Annotated[
        bool, typer.Option("--forms", help="Compare forms of the aesthetic reward instead, and choose the default.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Probe the paper's claims on the demo set: fast/slow rationales, Gaussian/Thurstone reward.

    Example: [bold]tatar-dist probes --seeds 3 --output runs/probes[/bold]
    """
    from tatar_dist.demo import forms as reward_forms
    from tatar_dist.demo import probes as controlled

    results = (reward_forms if forms else controlled).run(output, seeds, smoke, overrides)
    if as_json:
        print(json.dumps(results))


def _run_stage(stage: Stage, files: list[Path], words: list[str] | None, dry_run: bool, as_json: bool) -> None:
    from tatar_dist.config.load import load_config
    from tatar_dist.plan.plan import check_inputs

    config = load_config([str(f) for f in files], words or [])
    if dry_run:
        command = " ".join(["tatar-dist", stage, *(f"--config {f}" for f in files), *(words or [])])
        _print_plans(config, [stage], as_json, command)
        return
    for warning in proven.warnings_for(config, stage):
        print(f"tatar-dist: {warning}", file=sys.stderr)
    check_inputs(config, stage)
    result = import_module(STAGE_MODULES[stage]).run(config)
    if as_json:
        print(json.dumps({"output": config.output} if result is None else result, default=str))
    elif stage == "evaluate":
        from tatar_dist.evaluate import tables

        tables.show(result, config.evaluate.published)
        print(f"evaluate: predictions, metrics and tables are in {config.output}")
    else:
        print(f"{stage}: done, everything it made is in {config.output}")


def _print_plans(
    config: Any, stages: list[Stage], as_json: bool, command: str | None = None, gpu_memory: float | None = None
) -> None:
    """Print plans as tables (with start commands if `command`) or as JSON (by stage if several)."""
    from tatar_dist.plan import memory
    from tatar_dist.plan import plan as planning

    plans = [planning.resolve(config, stage) for stage in stages]
    estimates = [memory.estimate(config, p, gpu_memory) if command is None else None for p in plans]
    if as_json:
        sizes = [e.to_dict() if isinstance(e, memory.Estimate) else None for e in estimates]
        by_stage = {p.stage: p.to_dict() | {"memory": size} for p, size in zip(plans, sizes, strict=True)}
        print(json.dumps(by_stage[plans[0].stage] if len(plans) == 1 else by_stage))
        return
    from rich.console import Console

    console = Console()
    for p, e in zip(plans, estimates, strict=True):
        console.print(planning.as_table(p))
        if e is not None:
            console.print(e if isinstance(e, str) else memory.as_table(e))
        if command is not None:
            print("\n".join(planning.ray_commands(p, command)))
    if any(isinstance(e, memory.Estimate) for e in estimates):
        console.print(memory.NOTE)


def sft(config: Configs, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Run supervised fine-tuning: teach the answer format and the two ways of reasoning.

    Example: [bold]tatar-dist sft --config configs/sft.yaml cluster.nodes=4 --dry-run[/bold]
    """
    _run_stage("sft", config, overrides, dry_run, as_json)


def grpo(config: Configs, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Run GRPO: refine the scores by rewards over each global batch of completions.

    Example: [bold]tatar-dist grpo --config configs/grpo.yaml model.path=runs/sft/checkpoints/latest/model[/bold]
    """
    _run_stage("grpo", config, overrides, dry_run, as_json)


def evaluate(config: Configs, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Measure agreement with opinion scores by test data set, with n and parse failures.

    evaluate.samples=5 adds the spread of sampled answers, evaluate.expected=true expected scores,
    evaluate.direct=true answers without a thought, evaluate.bootstrap=1000 intervals, evaluate.published=true the
    figures of papers. Run it again to resume.

    Example: [bold]tatar-dist evaluate --config configs/eval.yaml model.path=runs/model data.eval_limit=200[/bold]
    """
    _run_stage("evaluate", config, overrides, dry_run, as_json)


def plan(
    config: Configs,
    overrides: Overrides = None,
    stage: Annotated[Stage | None, typer.Option(help="All of them when left out.")] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Predict a GRPO step, and the best split for 1 to 1024 GPUs.")
    ] = False,
    measured: Annotated[
        list[Path] | None, typer.Option(metavar="RUN", help="A GRPO run directory to take times from; may repeat.")
    ] = None,
    times: Annotated[Path | None, typer.Option(metavar="FILE", help="Times from a YAML file instead.")] = None,
    gpus: Annotated[str | None, typer.Option(metavar="N,N", help="Numbers of GPUs to simulate.")] = None,
    card: Annotated[CardName | None, typer.Option(help="GPUs to estimate times for; H100 when left out.")] = None,
    nics: Annotated[int | None, typer.Option(min=1, help="Network cards of a node of them.")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GiB", help="Of a GPU, for the estimate of memory; 80 when left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a run would start: processes, GPUs, batch split, memory per GPU. Loads no model.

    Without --measured or --times, --simulate estimates the times of --card from FLOPs and bytes.

    Example: [bold]tatar-dist plan --config configs/grpo.yaml --simulate --measured runs/grpo[/bold]
    """
    from tatar_dist.config.load import load_config
    from tatar_dist.plan.plan import STAGES

    if not simulate and (measured or times or gpus or card or nics):
        raise UserError("--measured, --times, --gpus, --card and --nics belong to --simulate: add it")
    if simulate and stage not in (None, "grpo"):
        raise UserError(f"--simulate --stage {stage}: only grpo is simulated")
    loaded = load_config([str(f) for f in config], overrides or [], unused=("output",))
    if simulate:
        from tatar_dist.plan.simulate import forecast

        forecast.run(loaded, forecast.costs_from(loaded, measured or [], times, card, nics), gpus, as_json)
        return
    _print_plans(loaded, [stage] if stage else list(STAGES), as_json, gpu_memory=gpu_memory)
