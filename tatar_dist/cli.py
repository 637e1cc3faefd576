"""The command line: one command, one sub-command per thing a user does. Parses, calls the package, prints.

Nothing heavy is imported here: a sub-command imports what it runs, so that `--help` answers at once. Bad input
(`UserError`, wrong options) is one line on stderr and exit status 2; Ctrl-C is 130; other errors keep their traceback.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from tatar_dist import proven
from tatar_dist.commands import data as data_commands
from tatar_dist.commands import evaluation
from tatar_dist.commands import rationale as rationale_commands
from tatar_dist.commands.serve import serve
from tatar_dist.errors import RunError, UserError
from tatar_dist.interrupts import EXIT_INTERRUPTED, Interrupted

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
# modules of tatar_dist.bench
BENCHES = (
    "learner", "rollout", "sync", "reward", "data", "scaling", "overlap", "step", "shapes", "images", "rationale",
    "simulate", "staleness", "evaluate", "report",
)  # fmt: skip
RUN, CHECK = "Train and look", "Check and audit"  # the two panels of --help

app = typer.Typer(
    name="tatar-dist",
    help="Post-train a vision-language model to score images for quality (IQA) and aesthetics (IAA): "
    "supervised fine-tuning, then GRPO with asymmetric rewards, on Ray, vLLM and DeepSpeed.",
    epilog="Start with: tatar-dist doctor, then tatar-dist demo --output runs/demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(data_commands.app, name="data", rich_help_panel=RUN)
app.add_typer(rationale_commands.app, name="rationale", rich_help_panel=RUN)

Configs = Annotated[list[Path], typer.Option("--config", help="YAML file; may repeat, later files win.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides of config keys, after all files.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run, load nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(rich_help_panel=RUN)
def demo(
    output: Annotated[Path, typer.Option(help="Directory for data, runs and report.")],
    overrides: Overrides = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps of everything, in minutes.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Whole runs on the same data, compared in figures.md.")] = 1,
) -> None:
    """The whole pipeline on this machine's CPU with a tiny model: data, SFT, GRPO, evaluation, report.

    Example: [bold]tatar-dist demo --output runs/demo rollout.engines=2[/bold]
    """
    from tatar_dist import demo as demo_pipeline

    demo_pipeline.run(output, smoke, overrides, seeds)


@app.command(rich_help_panel=RUN)
def probes(
    output: Annotated[Path, typer.Option(help="Directory for data, runs, table and plots.")],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions with other seeds.")] = 3,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps of everything: shows that it runs.")] = False,
    as_json: Json = False,
) -> None:
    """The paper's controlled comparisons on the demo set: fast or slow rationales, Gaussian or Thurstone rewards.

    Example: [bold]tatar-dist probes --seeds 3 --output runs/probes[/bold]
    """
    from tatar_dist import probes as controlled

    found = controlled.run(output, seeds, smoke, overrides)
    if as_json:
        print(json.dumps(found))


def _run_stage(stage: str, files: list[Path], words: list[str] | None, dry_run: bool, as_json: bool) -> None:
    from tatar_dist.config import load_config

    config = load_config([str(f) for f in files], words or [])
    if dry_run:
        command = " ".join(["tatar-dist", stage, *(f"--config {f}" for f in files), *(words or [])])
        _print_plans(config, [stage], as_json, command)
        return
    for warning in proven.warnings_for(config, stage):
        print(f"tatar-dist: {warning}", file=sys.stderr)
    result: Any
    if stage == "sft":
        from tatar_dist import sft as sft_stage

        result = sft_stage.run(config)
    elif stage == "grpo":
        from tatar_dist import controller

        result = controller.run(config)
    else:
        from tatar_dist.evaluate import runner

        result = runner.run(config)
        if not as_json:
            from tatar_dist.evaluate import tables

            tables.show(result, config.evaluate.published)
            print(f"evaluate: predictions, metrics and tables are in {config.output}")
            return
    if result is not None:
        _print_result(result, as_json)
    elif as_json:
        print(json.dumps({"output": config.output}))
    else:
        print(f"{stage}: done, everything it made is in {config.output}")


def _print_plans(
    config: Any, stages: list[str], as_json: bool, command: str | None = None, gpu_memory: float | None = None
) -> None:
    """Tables, and the lines that would start them; as JSON one object, by stage when there are several."""
    from tatar_dist import memory
    from tatar_dist import plan as planning

    plans = [planning.resolve(config, stage) for stage in stages]  # type: ignore[arg-type]
    estimates = [memory.of_plan(config, p, gpu_memory) if command is None else None for p in plans]
    if as_json:
        found = {p.stage: p.to_dict() for p in plans}
        for p, e in zip(plans, estimates, strict=True):
            found[p.stage]["memory"] = e.to_dict() if isinstance(e, memory.Estimate) else None
        print(json.dumps(found[plans[0].stage] if len(plans) == 1 else found))
        return
    from rich.console import Console

    console = Console()
    for p, e in zip(plans, estimates, strict=True):
        console.print(planning.as_table(p))
        if e is not None:
            console.print(e if isinstance(e, str) else memory.as_table(e))
        if command is not None:
            print("\n".join(planning.ray_commands(p, command)))


def _print_result(result: Any, as_json: bool) -> None:
    """A result object as JSON, or as indented `key: value` lines."""
    if as_json:
        print(json.dumps(result, default=str))
        return

    def lines(value: Any, indent: str) -> list[str]:
        out = []
        for key, item in value.items():
            if isinstance(item, dict):
                out += [f"{indent}{key}:", *lines(item, indent + "  ")]
            else:
                shown = "—" if item is None else f"{item:.4f}" if isinstance(item, float) else item
                out.append(f"{indent}{key}: {shown}")
        return out

    print("\n".join(lines(result, "")) if isinstance(result, dict) else result)


@app.command(rich_help_panel=RUN)
def sft(config: Configs, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Supervised fine-tuning: teaches the answer format and the two ways of reasoning.

    Example: [bold]tatar-dist sft --config configs/sft.yaml cluster.nodes=4 --dry-run[/bold]
    """
    _run_stage("sft", config, overrides, dry_run, as_json)


@app.command(rich_help_panel=RUN)
def grpo(config: Configs, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """GRPO: refines the scores by rewards over each global batch of completions.

    Example: [bold]tatar-dist grpo --config configs/grpo.yaml model.path=runs/sft/checkpoints/latest/model[/bold]
    """
    _run_stage("grpo", config, overrides, dry_run, as_json)


@app.command(rich_help_panel=RUN)
def evaluate(config: Configs, overrides: Overrides = None, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Agreement with opinion scores on test manifests, by data set, with n and parse failures. Killed, it goes on.

    evaluate.samples=5 adds the spread of sampled answers, evaluate.expected=true expected scores,
    evaluate.bootstrap=1000 intervals, evaluate.published=true the figures of papers.

    Example: [bold]tatar-dist evaluate --config configs/eval.yaml model.path=runs/model data.eval_limit=200[/bold]
    """
    _run_stage("evaluate", config, overrides, dry_run, as_json)


app.command(rich_help_panel=RUN)(evaluation.score)


@app.command(rich_help_panel=RUN)
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    as_json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Draw again every second, until Ctrl-C.")] = False,
) -> None:
    """What a run is doing: step, phase, engines' health, speed, time left, checkpoint, faults. Reads its files only.

    Example: [bold]tatar-dist status runs/grpo --watch[/bold]
    """
    from tatar_dist.status import RunFiles

    if watch and as_json:
        raise UserError("--watch draws, --json prints one object: give one of them")
    files = RunFiles(run)
    if as_json:
        print(json.dumps(files.read().to_dict()))
        return
    import time

    from rich.console import Console

    from tatar_dist import status_view

    console = Console()
    if watch:
        status_view.watch(files, console)
    else:
        console.print(status_view.view(files.read(), time.time()))


@app.command(rich_help_panel=RUN)
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="A run directory or a demo's; several are compared.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="The page; else RUN/report.html, or ./compare.html of several runs."),
    ] = None,
) -> None:
    """Write one HTML page about a run, or one that compares several: what was learned, health, curves, answers.

    A run's page goes to RUN/report.html, a comparison to compare.html in the current directory, or either to --output.

    Example: [bold]tatar-dist report runs/grpo[/bold], [bold]tatar-dist report runs/a runs/b --output a-b.html[/bold]
    """
    if len(runs) == 1:
        from tatar_dist.report import html

        print(html.write(runs[0], output))
        return
    from tatar_dist.report import compare

    print(compare.write(runs, output or Path(compare.FILE)))


@app.command(rich_help_panel=RUN)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    output: Annotated[Path, typer.Option(help="New directory for the model.")],
    step: Annotated[int | None, typer.Option(metavar="N", help="Of the checkpoint; the newest when left out.")] = None,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="The most of a weights file, as in 500MB.")] = "5GB",
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32; as trained when left out.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What evaluate wrote about this checkpoint; else looked for.")
    ] = None,
) -> None:
    """The trained model as a Hugging Face directory for transformers and vLLM, with prompts and a model card.

    Example: [bold]tatar-dist export runs/grpo --output models/scorer[/bold]
    """
    from tatar_dist import export as exporting

    options = {"step": step, "shard_size": shard_size, "dtype": dtype, "evaluation": evaluation}
    print(exporting.run(run, output, **options))  # type: ignore[arg-type]


app.command("serve", rich_help_panel=RUN)(serve)


@app.command(rich_help_panel=CHECK)
def plan(
    config: Configs,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="sft, grpo or evaluate; all of them when left out.")] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Predict a GRPO step, and the best split for 1 to 1024 GPUs.")
    ] = False,
    measured: Annotated[
        list[Path] | None, typer.Option(metavar="RUN", help="A GRPO run directory to take times from; may repeat.")
    ] = None,
    times: Annotated[Path | None, typer.Option(metavar="FILE", help="Times from a YAML file instead.")] = None,
    gpus: Annotated[str | None, typer.Option(metavar="N,N", help="Numbers of GPUs to simulate.")] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GiB", help="Of a GPU, for the estimate of memory; 80 when left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a run would start: processes, GPUs, the split of a batch, the memory of a GPU. Loads no model.

    Without --measured or --times, --simulate estimates from FLOPs and bytes on H100s.

    Example: [bold]tatar-dist plan --config configs/grpo.yaml --simulate --measured runs/grpo[/bold]
    """
    from tatar_dist.config import load_config
    from tatar_dist.plan import STAGES

    if stage is not None and stage not in STAGES:
        raise UserError(f"--stage {stage}: must be one of {', '.join(STAGES)}")
    if not simulate and (measured or times or gpus):
        raise UserError("--measured, --times and --gpus belong to --simulate: add it")
    if simulate and stage not in (None, "grpo"):
        raise UserError(f"--simulate --stage {stage}: only grpo is simulated")
    loaded = load_config([str(f) for f in config], overrides or [])
    if simulate:
        from tatar_dist.simulate import command

        command.run(loaded, measured or [], times, gpus, as_json)
        return
    _print_plans(loaded, [stage] if stage else list(STAGES), as_json, gpu_memory=gpu_memory)


@app.command(rich_help_panel=CHECK)
def rewards(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="JSON lines (group_id, task, dataset, target, completion) or a run's rollouts/*.parquet; "
            "each file is one global batch.",
        ),
    ],
    preset: Annotated[
        str, typer.Option(help="tatar, released, gaussian-both, thurstone-both, binary, or a YAML file.")
    ] = "tatar",
    output: Annotated[Path | None, typer.Option(help="Write the lines here and print a summary.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON (with --output).")] = False,
    lenient: Annotated[bool, typer.Option(help="Drop and count bad rows, read answers leniently.")] = False,
    all_terms: Annotated[bool | None, typer.Option(help="Compute every term, not only the preset's.")] = None,
    advantage: Annotated[str, typer.Option(help="std, mean (Dr. GRPO) or per_term.")] = "std",
    explain: Annotated[
        int | None, typer.Option(metavar="ROW", help="Show the comparisons behind one row, from 1.")
    ] = None,
) -> None:
    """Score completions: every reward term and the advantage, line by line.

    Example: [bold]tatar-dist rewards batch.jsonl --preset tatar --output scored.jsonl[/bold]
    """
    from tatar_dist.rewards import audit

    if explain is not None and len(files) > 1:
        raise UserError("--explain looks at one file, give only that")
    found = [audit.run(f, preset, all_terms=all_terms, lenient=lenient, advantage=advantage) for f in files]
    for warning in (w for each in found for w in each.warnings):
        print(f"tatar-dist: {warning}", file=sys.stderr)
    if explain is not None:
        print(audit.explain_table(found[0], explain))
        return
    audit.write(found, output, sys.stdout)
    if output is not None:
        _print_result({**audit.summary(found), "output": str(output)}, as_json)


app.command(rich_help_panel=CHECK)(evaluation.metrics)
app.command(rich_help_panel=CHECK)(evaluation.compare)


@app.command(rich_help_panel=CHECK)
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=", ".join(BENCHES) + "; or table.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="WORD", help="simulate, staleness: config keys; step: tune; table: files."),
    ] = None,
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="learner: draw how an update grows.")] = None,
) -> None:
    """Time a part of the pipeline on this machine beside a baseline and the least it could take.

    `bench table build/bench/*.json` prints what `--json` wrote as one Markdown table.

    Example: [bold]tatar-dist bench reward --json[/bold]
    """
    if name == "table":
        from tatar_dist.bench import table

        if not words:
            raise UserError("bench table: give it files that bench NAME --json wrote")
        print(table.markdown([table.read(Path(word)) for word in words]))
        return
    if name not in BENCHES:
        raise UserError(f"bench {name!r}: must be one of {', '.join(BENCHES)}, table")
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore::FutureWarning"}
    warnings.simplefilter("ignore", FutureWarning)  # libraries tell each other
    benchmark = import_module(f"tatar_dist.bench.{name}")
    if words and name not in ("simulate", "staleness", "step"):
        raise UserError(f"bench {name}: takes no {words[0]!r}, only bench simulate, staleness and step take words")
    if plot and name != "learner":
        raise UserError(f"bench {name}: draws no plot, only bench learner does")
    with contextlib.redirect_stdout(sys.stderr):  # libraries print, too; standard output is for the result
        found = benchmark.run(words) if words else benchmark.run()
    print(json.dumps(found)) if as_json else benchmark.print_table(found)
    if plot:
        from tatar_dist.bench import plot as drawing

        drawing.draw(found, plot)
    if not found.get("ok", True):
        raise typer.Exit(1)


@app.command(rich_help_panel=CHECK)
def doctor(as_json: Json = False) -> None:
    """Check this machine: compilers, packages, devices, memory, ports. Exit 1 if something needed is missing.

    Example: [bold]tatar-dist doctor --json[/bold]
    """
    from tatar_dist import doctor as checks

    found = checks.run()
    if as_json:
        print(json.dumps(checks.as_json(found)))
    else:
        from rich.console import Console

        console = Console()
        console.print(checks.as_table(found))
        console.print(checks.verdict(found))
    if any(c.required and not c.ok for c in found):
        raise typer.Exit(1)


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        status = app(args=args, prog_name="tatar-dist", standalone_mode=False)
        if status == EXIT_INTERRUPTED:  # typer turns Ctrl-C into this status, silently
            _complain("interrupted")
        return status if isinstance(status, int) else 0
    except UserError as e:
        # Ray wraps what an actor raised: the wrapper's text is a traceback, its cause the one line.
        _complain(getattr(e, "cause", None) or e)
        return EXIT_BAD_INPUT
    except RunError as e:
        _complain(getattr(e, "cause", None) or e)
        return EXIT_FAILED
    except TyperException as e:
        if e.format_message():  # empty when the help page was the answer already
            _complain(e.format_message())
        return EXIT_BAD_INPUT
    except Interrupted as e:
        _complain(e)
        return e.status
    except OSError as e:
        cause = getattr(e, "cause", e)
        if cause.errno != errno.ENOSPC:
            raise
        where = cause.filename or "the output"
        _complain(f"no space left on the disk of {where}; what was finished is kept, make room and run again")
        return EXIT_BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted")
        return EXIT_INTERRUPTED


def _complain(message: object) -> None:
    print(f"tatar-dist: {' '.join(str(message).split())}", file=sys.stderr)


def entry() -> None:
    """The console script."""
    sys.exit(main())
