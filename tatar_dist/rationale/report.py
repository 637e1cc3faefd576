"""Write a run's rejected answers with their reasons, and a report of rejection rates.

From a ledger come `R.rejected.jsonl` (one line per rejected or failed answer or row, in manifest order), `R.report.md`
and a table for the terminal. They hold no times and no state of one process, so a resumed run writes the same files.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tatar_dist.rationale.checks import Reason
from tatar_dist.rationale.ledger import Ledger, LedgerEntry
from tatar_dist.run.files import write_whole
from tatar_dist.types import TASKS

COUNTS = ("rows", "accepted", "rejected", "failed", "not_asked", "answers", "rejected_answers")  # of a task
HEADER = ["task", *(count.replace("_", " ") for count in COUNTS)]
EXAMPLES = 2  # a reason
EXAMPLE_CHARS = 300


def beside(output: Path, ending: str) -> Path:
    """Return the path of a file beside the output: R.parquet -> R.<ending>."""
    return output.with_name(f"{output.stem}.{ending}")


def rejections(entry: LedgerEntry) -> Iterator[dict[str, Any]]:
    """Yield lines of one row: rejected answers, and the reasons if it was not asked or answered."""

    def line(attempt: int | None, reasons: tuple[Reason, ...], text: str | None = None) -> dict[str, Any]:
        return {
            "sample_id": entry.sample_id,
            "dataset": entry.dataset,
            "task": entry.task,
            "attempt": attempt,
            "accepted_later": entry.accepted,
            "reasons": [asdict(reason) for reason in reasons],
            "text": text,
        }

    if entry.before:
        yield line(None, entry.before)
    for attempt, (answer, outcome) in enumerate(entry.answers):
        if outcome.verdict != "accept":
            yield {**line(attempt, outcome.reasons, answer.text), "finish": answer.finish}
    if entry.failed:
        yield line(len(entry.answers), (entry.failed,))


def write_rejections(ledger: Ledger, path: Path) -> None:
    """Write the lines of all rows."""
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for entry in ledger.entries for line in rejections(entry))
    write_whole(path, "".join(lines))


def _quoted(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def _reasons(entries: list[LedgerEntry]) -> dict[str, list[str]]:
    """List rejections by code, most frequent first: sample id, reason, beginning of the text."""
    items: defaultdict[str, list[str]] = defaultdict(list)
    for entry in entries:
        for line in rejections(entry):
            text = f": `{_quoted(line['text'][:EXAMPLE_CHARS])}`" if line["text"] else ""
            for reason in line["reasons"]:
                items[reason["code"]].append(f"- `{_quoted(entry.sample_id)}` {_quoted(reason['says'])}{text}")
    return dict(sorted(items.items(), key=lambda pair: (-len(pair[1]), pair[0])))


def _by_task(ledger: Ledger) -> dict[str, list[LedgerEntry]]:
    entries = {task: [entry for entry in ledger.entries if entry.task == task] for task in TASKS}
    return {task: rows for task, rows in entries.items() if rows}


def _task_summary(ledger: Ledger, entries: list[LedgerEntry]) -> dict[str, Any]:
    """Count the rows of one task. `reasons`: rejections per code, the most frequent first."""
    verdicts = [outcome.verdict for entry in entries for _, outcome in entry.answers]
    accepted = sum(entry.accepted for entry in entries)
    failed = sum(entry.failed is not None for entry in entries)
    settled = sum(ledger.is_settled(entry) for entry in entries)
    refused = len(verdicts) - verdicts.count("accept")
    return {
        "rows": len(entries),
        "accepted": accepted,
        "rejected": settled - accepted,
        "failed": failed,
        "not_asked": len(entries) - settled - failed,
        "answers": len(verdicts),
        "rejected_answers": refused,
        "rejection_rate": refused / len(verdicts) if verdicts else None,
        "reasons": {code: len(items) for code, items in _reasons(entries).items()},
    }


def summary(ledger: Ledger) -> dict[str, Any]:
    """Return counts by task and reason, tokens and cost; part of what --json prints."""
    tasks = {task: _task_summary(ledger, entries) for task, entries in _by_task(ledger).items()}
    return {
        **{count: sum(task[count] for task in tasks.values()) for count in COUNTS[:5]},
        "tasks": tasks,
        "prompt_tokens": ledger.prompt_tokens,
        "completion_tokens": ledger.completion_tokens,
        "lost_tokens": ledger.lost_tokens,
        "cost": ledger.cost(),
    }


def _cells(name: str, task: dict[str, Any]) -> list[str]:
    """Return the table row of one task of a summary: its name and `COUNTS`."""
    rate = "" if task["rejection_rate"] is None else f" ({100 * task['rejection_rate']:.1f} %)"
    *counts, refused = (str(task[count]) for count in COUNTS)
    return [name, *counts, refused + rate]


def write_report(ledger: Ledger, path: Path) -> None:
    """Write the report of rejection rates as Markdown: by task, by reason, with examples."""
    totals = summary(ledger)
    lines = [f"# rationale {ledger.question.name}: {totals['accepted']} of {totals['rows']} rows accepted", ""]
    lines += [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    lines += [f"| {' | '.join(_cells(task, t))} |" for task, t in totals["tasks"].items()]
    lines += ["", f"Tokens: {totals['prompt_tokens']:,} prompt, {totals['completion_tokens']:,} completion."]
    for task, entries in _by_task(ledger).items():
        if reasons := _reasons(entries):
            lines += ["", f"## {task}: why answers were rejected", "", "| reason | answers |", "|---|---|"]
            lines += [f"| {code} | {len(items)} |" for code, items in reasons.items()]
        for code, items in reasons.items():
            lines += ["", f"**{code}**", "", *items[:EXAMPLES]]
    write_whole(path, "\n".join(lines) + "\n")


def as_table(totals: dict[str, Any], title: str) -> Any:
    """Return the same figures as a rich table, without the reasons (see `reason_lines`)."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in HEADER:
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, t in totals["tasks"].items():
        table.add_row(*_cells(task, t))
    return table


def reason_lines(totals: dict[str, Any]) -> list[str]:
    """Return one line per task: count of each reason, the most frequent first."""
    return [
        f"{task}: " + ", ".join(f"{code} {n}" for code, n in t["reasons"].items())
        for task, t in totals["tasks"].items()
        if t["reasons"]
    ]
