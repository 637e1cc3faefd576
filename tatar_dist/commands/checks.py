"""`tatar-dist rewards`, `bench`, `doctor`, `gpu-check`: score, time, check the machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import warnings
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
import yaml

from tatar_dist.commands import Json
from tatar_dist.errors import UserError

# modules of tatar_dist.bench
BENCHES = (
    "learner", "rollout", "sync", "reward", "data", "scaling", "step", "overlap", "staleness", "simulate",
)  # fmt: skip
TAKE_WORDS = ("step", "staleness", "simulate")


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
        str, typer.Option(help="tatar, paper, released, gaussian-both, thurstone-both, binary, or a YAML file.")
    ] = "tatar",
    output: Annotated[Path | None, typer.Option(help="Write the lines here and print a summary.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON (with --output).")] = False,
    lenient: Annotated[bool, typer.Option(help="Drop and count bad rows, read answers leniently.")] = False,
    all_terms: Annotated[bool | None, typer.Option(help="Compute every term, not only the preset's.")] = None,
    advantage: Annotated[str, typer.Option(help="std, mean (Dr. GRPO) or per_term.")] = "std",
    scale: Annotated[str, typer.Option(help="group or batch, whose spread divides (grpo.scale).")] = "group",
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
    how = {"all_terms": all_terms, "lenient": lenient, "advantage": advantage, "scale": scale}
    audits = [audit.run(f, preset, **how) for f in files]
    for warning in (w for each in audits for w in each.warnings):
        print(f"tatar-dist: {warning}", file=sys.stderr)
    if explain is not None:
        print(audit.explain_table(audits[0], explain))
        return
    audit.write(audits, output, sys.stdout)
    if output is not None:
        summary = {**audit.summary(audits), "output": str(output)}
        print(json.dumps(summary) if as_json else yaml.safe_dump(summary, sort_keys=False, allow_unicode=True).rstrip())


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=", ".join(BENCHES) + "; or table.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="WORD", help="simulate, staleness: config keys; step: tune; table: files."),
    ] = None,
    as_json: Json = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="learner: measure and draw how an update grows.")
    ] = None,
) -> None:
    """Time a part of the pipeline on this machine beside a baseline and the least it could take.

    The exit status is 1 if a target is missed.
    `bench table build/bench/*.json` prints what `--json` wrote as one Markdown table.

    Example: [bold]tatar-dist bench reward --json[/bold]
    """
    from tatar_dist.bench import table

    if name == "table":
        if not words:
            raise UserError("bench table: give it files that bench NAME --json wrote")
        print(table.markdown([table.read(Path(word)) for word in words]))
        return
    if name not in BENCHES:
        raise UserError(f"bench {name!r}: must be one of {', '.join(BENCHES)}, table")
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore::FutureWarning"}
    warnings.simplefilter("ignore", FutureWarning)  # libraries tell each other
    benchmark = import_module(f"tatar_dist.bench.{name}")
    if words and name not in TAKE_WORDS:
        raise UserError(f"bench {name}: takes no {words[0]!r}, only bench {', '.join(TAKE_WORDS)} take words")
    if plot and name != "learner":
        raise UserError(f"bench {name}: draws no plot, only bench learner does")
    with contextlib.redirect_stdout(sys.stderr):  # libraries print, too; standard output is for the result
        result = benchmark.run(words) if words else benchmark.run(grow=True) if plot else benchmark.run()
    print(json.dumps(result)) if as_json else table.show(result)
    if plot:
        from tatar_dist.bench import plot as drawing

        drawing.draw(result, plot)
    if not result["met"]:
        raise typer.Exit(1)


def doctor(
    everything: Annotated[bool, typer.Option("--all", help="Show what is in order, too.")] = False,
    as_json: Json = False,
) -> None:
    """Check this machine, and with RAY_ADDRESS a cluster's nodes: what is wrong, and what to do.

    Compilers, packages, GPUs and their driver, NVLink, NCCL, memory, networks, ports, clock, file systems; of nodes
    their versions, clocks and GPUs, and whether they see this directory. Exit 1 if something needed is missing.

    Example: [bold]tatar-dist doctor --all[/bold]
    """
    from tatar_dist.commands import doctor as checks

    results = checks.run()
    if as_json:
        print(json.dumps(checks.as_json(results)))
    else:
        from rich.console import Console

        console = Console()
        if (table := checks.as_table(results, everything)).row_count:
            console.print(table)
        console.print(checks.verdict(results, everything))
    if any(c.required and not c.ok for c in results):
        raise typer.Exit(1)


def gpu_check(
    parts: Annotated[
        list[str] | None, typer.Option("--part", metavar="NAME", help="Only this part; may repeat.")
    ] = None,
    pretend: Annotated[bool, typer.Option("--pretend", help="Walk the parts on the CPU; records nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Try on this machine's GPUs, in ten minutes, what training needs of them.

    The riskiest parts come first: kernels against the CPU's, engines, ZeRO-3, weight pushes, sleep, three GRPO steps,
    speed. `doctor` and runs show what passed. Exit 1 if a part failed, 2 without a GPU.

    Example: [bold]tatar-dist gpu-check --part packed --part speed-7b[/bold]
    """
    from rich.console import Console

    from tatar_dist.gpu_check import runner, table

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, which ends what was started
    logs, keep = Path(tempfile.mkdtemp(prefix="tatar-gpu-check-")), False
    try:
        with Console(stderr=True).status("gpu-check") as status:
            found = runner.check(parts or [], pretend, logs, lambda part: status.update(f"gpu-check: {part.name}"))
        keep = not found["ok"]
    finally:
        if not keep:
            shutil.rmtree(logs, ignore_errors=True)
    found["logs"] = str(logs) if keep else None
    if as_json:
        print(json.dumps(found))
    else:
        console = Console()
        console.print(table.as_table(found))
        console.print(table.verdict(found), soft_wrap=True)
    for note in found["notes"]:
        print(f"tatar-dist: {note}", file=sys.stderr)
    if not found["ok"]:
        raise typer.Exit(1)
