"""`tatar-dist rationale build` and `judge`: ask about open rows, write the accepted ones.

From a manifest and a config, `run` writes the output manifest (accepted rows in manifest order), and beside it the
journal, the rejected answers and a report. The same command resumes a stopped run; a finished run asks nothing.
"""

from __future__ import annotations

import glob
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tatar_dist.config.schema import Config
from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import Interrupted, RunError, UserError
from tatar_dist.faults.interrupts import StopSignals
from tatar_dist.rationale import report
from tatar_dist.rationale.ledger import Ledger
from tatar_dist.rationale.questions import Build, Judge, Question
from tatar_dist.rationale.rows import Asker, RationaleRows
from tatar_dist.rationale.wording import load_wording
from tatar_dist.run.journal import Journal
from tatar_dist.run.progress import Progress

QUESTIONS: dict[str, type[Build] | type[Judge]] = {"build": Build, "judge": Judge}
FAILURES = {  # code of a row without an answer -> how messages describe it
    "no-answer": "rows got no answer after all retries",
    "endpoint-refused": "rows were refused by the endpoint",
}


def _prepare(name: str, source: Path, config: Config) -> tuple[Question, RationaleRows]:
    c = config.rationale
    question = QUESTIONS[name](config, load_wording(c.prompts))
    return question, RationaleRows(source, c.splits or (), c.limit, config.data.image_root, written=name == "judge")


def dry_run(name: str, source: Path, config: Config) -> dict[str, Any]:
    """Plan a run: rows by task, addresses, one rendered prompt per task; send and write nothing."""
    question, rows = _prepare(name, source, config)
    tasks: dict[str, dict[str, Any]] = {}
    for row in rows:
        task = tasks.setdefault(row.task, {"rows": 0, "asked": 0, "not_asked": Counter()})
        task["rows"] += 1
        if reasons := question.before(row):
            task["not_asked"][reasons[0].code] += 1
            continue
        task["asked"] += 1
        if "prompt" in task:
            continue
        request = question.request(row, 0)
        kind, endpoint = request.kind, request.kind.endpoint
        task |= {
            "endpoint": "our own engines" if endpoint.local else endpoint.url or None,
            "model": endpoint.model or None,
            "key": f"from ${endpoint.api_key_env}" if endpoint.api_key_env else "none",
            "image": kind.image,
            "temperature": kind.sampling.temperature,
            "top_p": kind.sampling.top_p,
            "max_tokens": kind.max_tokens,
            "sample_id": row.sample_id,
            "prompt": {"system": request.system, "user": request.user},
        }
    return {
        "command": f"rationale {name}",
        "rows": len(rows),
        "splits": rows.splits or None,
        "journal": str(report.beside(Path(config.output), "journal.jsonl")),
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
    question.require_endpoint(rows.tasks)
    journal_file = report.beside(output, "journal.jsonl")
    files = (journal_file, output, report.beside(output, "rejected.jsonl"), report.beside(output, "report.md"))
    for path in files:
        if path.is_dir():
            raise UserError(f"{path}: is a directory, a file will be written there; choose another --output")
    with Journal(journal_file, question.settings(rows.tasks)) as journal, StopSignals() as stop:
        for path in files:
            for left in output.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                left.unlink()  # of a killed run: the lock is ours, so nobody is writing it
        ledger = Ledger(question)
        journal.read(ledger.remember)
        if journal.cut:
            _say(journal.cut)
        journal.write(*ledger.unanswered())
        for row in rows:
            ledger.enter(row)
        spent = ledger.open > 0 and _ask(ledger, rows, journal, stop)
        _write(ledger, rows, output)
    summary = {**report.summary(ledger), "splits": rows.splits or None, "output": str(output)}
    _raise_if_incomplete(ledger, summary, stop, spent)
    return summary


def _ask(ledger: Ledger, rows: RationaleRows, journal: Journal, stop: StopSignals) -> bool:
    """Ask about the open rows. Returns whether the budget was spent."""
    settled_before = ledger.settled

    def show() -> None:
        done, cost = ledger.settled + ledger.failed, ledger.cost()
        if done > settled_before:
            parts = [f"{ledger.accepted} accepted", f"{ledger.rejected} rejected", f"{ledger.failed} failed"]
            progress.show(done, [*parts, f"{ledger.tokens:,} tokens", *([f"cost {cost:.2f}"] if cost else [])])

    with Progress(f"rationale {ledger.question.name}", len(rows), settled_before, unit="row") as progress:
        asker: type[Asker]
        if ledger.question.endpoint.local:
            from tatar_dist.rationale.local import LocalAsking as asker
        else:
            from tatar_dist.rationale.asking import Asking as asker
        return asker(ledger, rows, journal, _say, show, lambda: stop.requested).run()


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
    again = "the same command continues from here"
    if spent:
        budget = ledger.question.c.limits.budget_tokens
        raise RunError(
            f"rationale.limits.budget_tokens={budget}: {ledger.tokens} tokens are spent and the next request might "
            f"exceed it; {ledger.open} rows were not asked; {kept}; with a larger budget {again}"
        )
    if stop.requested and ledger.open:
        raise Interrupted(f"stopped: {ledger.open} rows are left; {kept}; {again}", stop.status)
    if ledger.failed:
        reasons = [entry.failed for entry in ledger.entries if entry.failed]
        codes = Counter(reason.code for reason in reasons)
        failures = " and ".join(f"{codes[code]} {text}" for code, text in FAILURES.items() if codes[code])
        raise RunError(f"{failures}; {kept}; the same command asks about them again; the last: {reasons[-1].says}")
    if not ledger.accepted:
        rejections = "; ".join(report.reason_lines(summary))
        where = report.beside(Path(summary["output"]), "report.md")
        raise RunError(f"none of {len(ledger.entries)} rows was accepted ({rejections}): see {where}")
