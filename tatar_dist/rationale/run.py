"""`tatar-dist rationale build` and `judge`: ask about the open rows, write the accepted ones.

From a manifest and a config, `run` writes the output manifest (accepted rows in manifest order), and beside it the
journal, the rejected answers and a report. The same command resumes a stopped run; a finished run asks nothing.
"""

from __future__ import annotations

import glob
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from tatar_dist.config.schema import Config
from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import Interrupted, RunError, UserError
from tatar_dist.faults.interrupts import StopSignals
from tatar_dist.rationale import report
from tatar_dist.rationale.ledger import Ledger
from tatar_dist.rationale.questions import Build, Judge, Question, require_target
from tatar_dist.rationale.rows import RationaleRows
from tatar_dist.rationale.wording import load_wording
from tatar_dist.run.journal import Journal
from tatar_dist.run.progress import ProgressLine, clock

QUESTIONS: dict[str, type[Build] | type[Judge]] = {"build": Build, "judge": Judge}
SHOW_EVERY = 1000  # rows entered between two updates of the progress display
PLAIN_EVERY_S = 15.0  # between two plain lines of progress, where there is no terminal
FAILURES = {  # code of a row without an answer -> how messages describe it
    "no-answer": "rows got no answer after all retries",
    "endpoint-refused": "rows were refused by the endpoint",
}


class Meter(ProgressLine):
    """Progress of a run: a bar on a terminal, else a plain line every 15 s. Call it with the ledger, at any rate."""

    def __init__(self, name: str, total: int, console: Console | None = None) -> None:
        super().__init__(name, total, console=console)
        self._printed = self.began - PLAIN_EVERY_S + 2.0  # the first plain line after two seconds
        self._settled_before = 0

    def reading(self, ledger: Ledger) -> None:
        """Show progress while rows enter the ledger, before any is asked. The pace is measured from the last call."""
        self.began, self._settled_before = time.monotonic(), ledger.settled
        self._show(len(ledger.entries), "reading what is there", self.began)

    def __call__(self, ledger: Ledger, last: bool = False) -> None:
        now = time.monotonic()
        self._show(ledger.settled + ledger.failed, self.line(ledger, now), now, last)

    def _show(self, done: int, text: str, now: float, last: bool = False) -> None:
        due = last or now - self._printed >= PLAIN_EVERY_S
        if due:
            self._printed = now
        self.show(done, text, due)

    def line(self, ledger: Ledger, now: float) -> str:
        """Return the text shown beside the progress bar: counts, tokens, cost, rate and time left."""
        done = ledger.settled + ledger.failed
        gone = max(now - self.began, 1e-9)
        here = done - self._settled_before
        parts = [f"{ledger.accepted} accepted", f"{ledger.rejected} rejected"]
        if ledger.failed:
            parts.append(f"{ledger.failed} failed")
        if ledger.retries:
            parts.append(f"{ledger.retries} retries")
        parts.append(f"{ledger.tokens:,} tokens")
        if cost := ledger.cost():
            parts.append(f"cost {cost:.2f}")
        if here:
            parts += [f"{here / gone:.1f}/s", f"{clock((self.total - done) * gone / here)} left"]
        return "  ".join(parts)


def _prepare(name: str, source: Path, config: Config) -> tuple[Question, RationaleRows]:
    c = config.rationale
    question = QUESTIONS[name](config, load_wording(c.prompts))
    return question, RationaleRows(source, c.splits or (), c.limit, config.data.image_root, written=name == "judge")


def dry_run(name: str, source: Path, config: Config) -> dict[str, Any]:
    """Plan of a run: rows by task, addresses, one rendered prompt per task. Nothing is sent or written."""
    question, rows = _prepare(name, source, config)
    journal = report.beside(Path(config.output), "journal.jsonl")
    tasks: dict[str, dict[str, Any]] = {}
    for row in rows:
        task = tasks.setdefault(row.task, {"rows": 0, "asked": 0, "not_asked": {}})
        task["rows"] += 1
        if reasons := question.before(row):
            code = reasons[0].code
            task["not_asked"][code] = task["not_asked"].get(code, 0) + 1
            continue
        task["asked"] += 1
        if "prompt" not in task:
            request = question.request(row, 0)
            task |= {
                "endpoint": request.target.url or ("our own engines" if question.endpoint.local else None),
                "model": request.target.model or None,
                "key": f"from ${request.target.api_key_env}" if request.target.api_key_env else "none",
                "image": request.image,
                "temperature": request.temperature,
                "top_p": request.top_p,
                "max_tokens": request.max_tokens,
                "sample_id": row.sample_id,
                "prompt": {"system": request.system, "user": request.user},
            }
    return {
        "command": f"rationale {name}",
        "rows": len(rows),
        "splits": rows.splits or None,
        "journal": str(journal),
        "tasks": tasks,
    }


def run(name: str, source: Path, config: Config) -> dict[str, Any]:
    """Build or judge `source` into `config.output`. Returns the summary that is printed.

    Raises:
        UserError: bad input, or an endpoint that cannot be used. Interrupted: stopped by the user.
        RunError: the endpoint failed too often, the budget is spent, some rows got no answer, or none was accepted.
    """
    output = Path(config.output)
    if output.suffix != ".parquet":
        raise UserError(f"--output {output}: must end in .parquet")
    if output.resolve() == source.resolve():
        raise UserError(f"--output {output}: is the input itself")
    question, rows = _prepare(name, source, config)
    require_target(question, rows.tasks)
    beside = [report.beside(output, ending) for ending in ("journal.jsonl", "rejected.jsonl", "report.md")]
    for path in (output, *beside):
        if path.is_dir():
            raise UserError(f"{path}: is a directory, a file will be written there; choose another --output")
    with Journal(beside[0], question.settings(rows.tasks)) as journal, StopSignals() as stop:
        for path in (output, *beside):
            for left in output.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                left.unlink()  # of a killed run: the lock is ours, so nobody is writing it
        ledger = Ledger(question)
        journal.read(ledger.remember)
        if journal.cut:
            _say(journal.cut)
        journal.write(*ledger.unanswered())
        with Meter(f"rationale {name}", len(rows)) as meter:
            for n, row in enumerate(rows):
                ledger.enter(row)
                if n % SHOW_EVERY == 0:
                    meter.reading(ledger)
            meter.reading(ledger)
            spent = next(ledger.todo(), None) is not None and _ask(ledger, rows, journal, meter, stop)
            meter(ledger, last=True)
        _write(ledger, rows, output)
    summary = {**report.summary(ledger), "splits": rows.splits or None, "output": str(output)}
    _raise_if_incomplete(ledger, summary, stop, spent)
    return summary


def _ask(ledger: Ledger, rows: RationaleRows, journal: Journal, meter: Meter, stop: StopSignals) -> bool:
    """Ask about the open rows. Returns whether the budget was spent."""
    if ledger.question.endpoint.local:
        from tatar_dist.rationale.local import LocalAsking

        return LocalAsking(ledger, rows, journal, meter, lambda: stop.requested).run()
    from tatar_dist.rationale.asking import Asking

    return Asking(ledger, rows, journal, _say, meter, lambda: stop.requested).run()


def _say(text: str) -> None:
    print(f"tatar-dist: {text}", file=sys.stderr, flush=True)


def _write(ledger: Ledger, rows: RationaleRows, output: Path) -> None:
    """Write the accepted rows in manifest order, the rejected answers and the report."""

    def accepted() -> Iterator[dict[str, Any]]:
        for entry in ledger.entries:
            if entry.accepted:
                values = rows.manifest.row(entry.number)
                attempt = len(entry.answers) - 1
                yield ledger.question.finished(values, rows.row_of(values, entry.number), attempt, entry.answers[-1][0])

    write_manifest(output, accepted(), image_root=rows.manifest.image_root)
    report.write_rejections(ledger, report.beside(output, "rejected.jsonl"))
    report.write_report(ledger, report.beside(output, "report.md"))


def _raise_if_incomplete(ledger: Ledger, summary: dict[str, Any], stop: StopSignals, spent: bool) -> None:
    """Raise the error of an incomplete run. The files have been written before."""
    kept = f"{ledger.accepted} accepted rows are in {summary['output']}"
    again = "the same command goes on from here"
    if spent:
        budget = ledger.question.c.limits.budget_tokens
        raise RunError(
            f"rationale.limits.budget_tokens={budget}: {ledger.tokens} tokens are spent and the next request might "
            f"exceed it; {ledger.open} rows were not asked; {kept}; with a larger budget {again}"
        )
    if stop.requested and ledger.open:
        raise Interrupted(f"stopped: {ledger.open} rows are left; {kept}; {again}", stop.status)
    if ledger.failed:
        codes = Counter(entry.failed.code for entry in ledger.entries if entry.failed)
        failures = " and ".join(f"{codes[code]} {text}" for code, text in FAILURES.items() if codes[code])
        raise RunError(f"{failures}; {kept}; the same command asks about them again")
    if not ledger.accepted:
        reasons = "; ".join(report.reason_lines(summary))
        where = report.beside(Path(summary["output"]), "report.md")
        raise RunError(f"none of {len(ledger.entries)} rows was accepted ({reasons}): see {where}")
