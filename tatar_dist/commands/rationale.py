"""Have rationales written and judged, or made from templates: `tatar-dist rationale …`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tatar_dist.commands import Json

app = typer.Typer(help="Make the rationales that SFT learns from.", no_args_is_help=True)

Manifest = Annotated[Path, typer.Argument(metavar="M.parquet", help="A manifest.")]
Written = Annotated[Path, typer.Argument(metavar="R.parquet", help="A manifest with rationales.")]
Output = Annotated[Path, typer.Option(help="The manifest to write; journal and report lie beside it.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides of config keys.")]
Configs = Annotated[
    list[Path] | None, typer.Option("--config", help="YAML file; may repeat; default configs/rationale.yaml.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be asked, send nothing.")]

DEFAULT_CONFIG = "configs/rationale.yaml"


@app.callback()
def _rationale() -> None:
    """Make the rationales that SFT learns from."""


@app.command("build")
def build(
    manifest: Manifest,
    output: Output,
    overrides: Overrides = None,
    config: Configs = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Have a teacher write each row's rationale (fast for IQA, slow for IAA). Rerun to resume.

    Example: [bold]tatar-dist rationale build koniq.parquet --output koniq_r.parquet
    rationale.teacher.url=http://127.0.0.1:8000/v1 rationale.teacher.model=teacher[/bold]
    """
    _ask("build", manifest, output, config, overrides, dry_run, as_json)


@app.command("judge")
def judge(
    rationales: Written,
    output: Output,
    overrides: Overrides = None,
    config: Configs = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Check rationales, have a judge mark them, drop rows with low marks. Resumes like build.

    Example: [bold]tatar-dist rationale judge koniq_r.parquet --output koniq_kept.parquet
    rationale.judge.url=http://127.0.0.1:8000/v1 rationale.judge.model=judge[/bold]
    """
    _ask("judge", rationales, output, config, overrides, dry_run, as_json)


@app.command("template")
def template(
    manifest: Manifest,
    output: Output,
    seed: Annotated[int, typer.Option(help="Same seed, same texts.")] = 0,
    as_json: Json = False,
) -> None:
    """Write rationales without a teacher, from distortions or measured attributes in rows' meta.

    Example: [bold]tatar-dist rationale template kadid.parquet --output kadid_r.parquet[/bold]
    """
    from tatar_dist.rationale import template as templates

    result = templates.run(manifest, output, seed)
    print(json.dumps(result) if as_json else f"{result['rows']} rows with rationales: {result['output']}")


def _ask(
    name: str,
    source: Path,
    output: Path,
    files: list[Path] | None,
    words: list[str] | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    from tatar_dist.config.load import load_config
    from tatar_dist.rationale import run as running

    named = [str(f) for f in files or [DEFAULT_CONFIG]]
    config = load_config(named, [*(words or []), f"output={output}"], unused=("model.path",))
    if dry_run:
        plan = running.dry_run(name, source, config)
        print(json.dumps(plan)) if as_json else _print_plan(plan)
        return
    summary = running.run(name, source, config)
    print(json.dumps(summary)) if as_json else _print_summary(name, summary)


def _print_summary(name: str, summary: dict[str, Any]) -> None:
    from rich.console import Console

    from tatar_dist.rationale.report import as_table, reason_lines

    console = Console(highlight=False)
    console.print(as_table(summary, f"rationale {name}: {_of(summary)}"))
    for line in reason_lines(summary):
        console.print(line, soft_wrap=True)
    cost = f", cost {summary['cost']:.2f}" if summary["cost"] else ""
    tokens = summary["prompt_tokens"] + summary["completion_tokens"] + summary["lost_tokens"]
    console.print(f"{summary['accepted']} rows in {summary['output']}; {tokens:,} tokens{cost}", soft_wrap=True)


def _of(summary: dict[str, Any]) -> str:
    splits = f"of {' and '.join(summary['splits'])}" if summary["splits"] else "of all splits"
    return f"{summary['rows']} rows {splits}"


def _print_plan(plan: dict[str, Any]) -> None:
    print(f"{plan['command']}: {_of(plan)}; nothing is sent")
    for task, t in plan["tasks"].items():
        left_out = "".join(f", {n} not ({code})" for code, n in t["not_asked"].items())
        print(f"\n{task}: {t['asked']} rows would be asked{left_out}")
        if "prompt" not in t:
            continue
        who = f"{t['model'] or 'no model yet'} at {t['endpoint'] or 'no address yet'}, key {t['key']}"
        sampling = f"temperature {t['temperature']:g}, top_p {t['top_p']:g}, {t['max_tokens']} tokens"
        print(f"{who}; {sampling}; {'with' if t['image'] else 'without'} its image")
        print(f"--- {t['sample_id']}, system\n{t['prompt']['system']}\n--- user\n{t['prompt']['user']}")
