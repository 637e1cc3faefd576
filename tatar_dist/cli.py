"""The command line: one sub-command per thing a user does (`commands/`: parse, call, print).

Nothing heavy is imported here: a sub-command imports what it runs, so that `--help` answers at once. Bad input
(`UserError`, wrong options) is one line on stderr and exit status 2; Ctrl-C is 130; other errors keep their traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer
from typer.exceptions import TyperException

from tatar_dist.commands import checks, data, evaluation, rationale, runs, stages
from tatar_dist.errors import EXIT_INTERRUPTED, Interrupted, RunError, UserError
from tatar_dist.run.files import FULL

EXTRAS = ("torch", "torchvision", "vllm", "deepspeed", "ray", "transformers", "accelerate", "datasets")
EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
OF_FILES = (  # what the user's files and disks refuse; other OSErrors are bugs
    *FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.ELOOP, errno.EIO,
)  # fmt: skip

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


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"tatar-dist {version('tatar_dist')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


PANELS = {
    "Train and look": (
        stages.demo, stages.probes, stages.sft, stages.grpo, stages.evaluate, evaluation.score, runs.status,
        runs.report, runs.export, runs.serve,
    ),
    "Check and audit": (
        stages.plan, checks.rewards, evaluation.metrics, evaluation.compare, checks.bench, checks.doctor,
        checks.gpu_check,
    ),
}  # fmt: skip
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
for name, group in (("data", data.app), ("rationale", rationale.app)):
    app.add_typer(group, name=name, rich_help_panel=next(iter(PANELS)))


def main(args: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    try:
        status = app(args=args, prog_name="tatar-dist", standalone_mode=False)
        sys.stdout.flush()  # a full disk is known here, not after the exit status
        if status == EXIT_INTERRUPTED:  # typer turns Ctrl-C into this status, silently
            _complain("interrupted")
        return status if isinstance(status, int) else 0
    except (UserError, RunError) as e:
        # Ray wraps what an actor raised: the wrapper's text is a traceback, its cause the one line.
        _complain(getattr(e, "cause", None) or e)
        return EXIT_BAD_INPUT if isinstance(e, UserError) else EXIT_FAILED
    except TyperException as e:
        if e.format_message():  # empty when the help page was the answer already
            _complain(e.format_message())
        return EXIT_BAD_INPUT
    except ModuleNotFoundError as e:
        if e.name not in EXTRAS:
            raise
        _complain(f"{e.name} is not installed: pip install 'tatar_dist[cpu]' or 'tatar_dist[cuda]'")
        return EXIT_BAD_INPUT
    except Interrupted as e:
        _complain(e)
        return e.status
    except OSError as e:
        cause = getattr(e, "cause", e)
        if cause.errno not in OF_FILES or not (cause.filename or cause.errno in FULL):
            raise
        where, reason = cause.filename or "the output", os.strerror(cause.errno)
        room = "; what was finished is kept: make room on that disk and run again" if cause.errno in FULL else ""
        _complain(f"{where}: {reason}{room}")
        _give_up_output()
        return EXIT_BAD_INPUT
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted")
        return EXIT_INTERRUPTED


def _give_up_output() -> None:
    """Throw away what was printed if it cannot be written: Python tries again as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: object) -> None:
    print(f"tatar-dist: {' '.join(str(message).split())}", file=sys.stderr)


def entry() -> None:
    """Run the command line as the console script."""
    sys.exit(main())
