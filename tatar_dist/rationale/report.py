"""Write a run's rejected answers with their reasons, and a report of rejection rates.

From a ledger come `R.rejected.jsonl` (one line per rejected or failed answer or row, in manifest order), `R.report.md`
and a table for the terminal. They hold no times and no state of one process, so a resumed run writes the same files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tatar_dist.rationale.checks import Reason
from tatar_dist.rationale.ledger import Ledger, LedgerEntry
from tatar_dist.run.files import write_whole, written_whole
from tatar_dist.types import TASKS

FAILURES = {  # code of a row without an answer -> how messages describe it
    "no-answer": "rows got no answer after all retries",
    "endpoint-refused": "rows were refused by the endpoint",
}
COLUMNS = ("rows", "accepted", "rejected", "failed", "not asked", "answers", "rejected answers")
EXAMPLES = 2  # a reason
EXAMPLE_CHARS = 300


def beside(output: Path, ending: str) -> Path:
    """Path of a file beside the output: R.parquet -> R.<ending>."""
    return output.with_name(f"{output.stem}.{ending}")


def rejections(entry: LedgerEntry) -> Iterator[dict[str, Any]]:
    """Lines of one row: its rejected answers, and the reasons if it was not asked or not answered."""
    base = {"sample_id": entry.sample_id, "dataset": entry.dataset, "task": entry.task}

    def listed(reasons: tuple[Reason, ...]) -> list[dict[str, str]]:
        return [{"code": r.code, "says": r.says} for r in reasons]

    if entry.before:
        yield {**base, "attempt": None, "accepted_later": False, "reasons": listed(entry.before), "text": None}
    for attempt, (answer, outcome) in enumerate(entry.answers):
        if outcome.verdict != "accept":
            yield {
                **base,
                "attempt": attempt,
                "accepted_later": entry.accepted,
                "reasons": listed(outcome.reasons),
                "text": answer.text,
                "finish": answer.finish,
            }
    if entry.failed:
        failed = {"attempt": len(entry.answers), "accepted_later": False, "reasons": listed((entry.failed,))}
        yield {**base, **failed, "text": None}


def write_rejections(ledger: Ledger, path: Path) -> int:
    """Write the lines of all rows. Returns their number."""
    count = 0
    with written_whole(path) as place, open(place, "w", encoding="utf-8") as f:
        for entry in ledger.entries:
            for line in rejections(entry):
                f.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
    return count


def summary(ledger: Ledger) -> dict[str, Any]:
    """Counts by task and reason, tokens and cost; part of what --json prints."""
    tasks: dict[str, Any] = {}
    counts = ledger.reasons()
    for task in TASKS:
        entries = [e for e in ledger.entries if e.task == task]
        if not entries:
            continue
        answers = sum(len(e.answers) for e in entries)
        refused = sum(o.verdict != "accept" for e in entries for _, o in e.answers)
        tasks[task] = {
            "rows": len(entries),
            "accepted": sum(e.accepted for e in entries),
            "rejected": sum(not e.accepted and ledger.is_settled(e) for e in entries),
            "failed": sum(e.failed is not None for e in entries),
            "not_asked": sum(not ledger.is_settled(e) and e.failed is None for e in entries),
            "answers": answers,
            "rejected_answers": refused,
            "rejection_rate": refused / answers if answers else None,
            "reasons": dict(sorted(counts[task].items(), key=lambda pair: (-pair[1], pair[0]))),
        }
    return {
        "rows": len(ledger.entries),
        "accepted": ledger.accepted,
        "rejected": ledger.rejected,
        "failed": ledger.failed,
        "not_asked": ledger.open,
        "tasks": tasks,
        "prompt_tokens": ledger.prompt_tokens,
        "completion_tokens": ledger.completion_tokens,
        "lost_tokens": ledger.lost_tokens,
        "cost": ledger.cost(),
    }


def _figures(task: dict[str, Any]) -> list[str]:
    """Figures of one task of a summary, in the order of `COLUMNS`."""
    rate = "" if task["rejection_rate"] is None else f" ({100 * task['rejection_rate']:.1f} %)"
    counts = [str(task[name]) for name in ("rows", "accepted", "rejected", "failed", "not_asked", "answers")]
    return [*counts, f"{task['rejected_answers']}{rate}"]


def _examples(ledger: Ledger, task: str, code: str) -> list[tuple[str, str, str]]:
    """(sample id, sentence of the reason, beginning of the text) of the first rejections with a code."""
    examples = []
    for entry in ledger.entries:
        if entry.task != task:
            continue
        for line in rejections(entry):
            says = next((r["says"] for r in line["reasons"] if r["code"] == code), None)
            if says is not None:
                examples.append((entry.sample_id, says, (line["text"] or "")[:EXAMPLE_CHARS]))
                if len(examples) == EXAMPLES:
                    return examples
    return examples


def _quoted(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def write_report(ledger: Ledger, path: Path) -> None:
    """Write the report of rejection rates as Markdown: by task, by reason, with examples."""
    totals = summary(ledger)
    lines = [f"# rationale {ledger.question.name}: {totals['accepted']} of {totals['rows']} rows accepted", ""]
    lines += [f"| {' | '.join(('task', *COLUMNS))} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {' | '.join((task, *_figures(t)))} |" for task, t in totals["tasks"].items()]
    lines += ["", f"Tokens: {totals['prompt_tokens']:,} prompt, {totals['completion_tokens']:,} completion."]
    for task, t in totals["tasks"].items():
        if not t["reasons"]:
            continue
        lines += ["", f"## {task}: why answers were rejected", "", "| reason | answers |", "|---|---|"]
        lines += [f"| {code} | {n} |" for code, n in t["reasons"].items()]
        for code in t["reasons"]:
            lines += ["", f"**{code}**", ""]
            for sample_id, says, text in _examples(ledger, task, code):
                excerpt = f": `{_quoted(text)}`" if text else ""
                lines.append(f"- `{_quoted(sample_id)}` {_quoted(says)}{excerpt}")
    write_whole(path, "\n".join(lines) + "\n")


def as_table(totals: dict[str, Any], title: str) -> Any:
    """The same figures as a rich table, without the reasons (see `reason_lines`)."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in ("task", *COLUMNS):
        table.add_column(name, justify="left" if name == "task" else "right")
    for task, t in totals["tasks"].items():
        table.add_row(task, *_figures(t))
    return table


def reason_lines(totals: dict[str, Any]) -> list[str]:
    """One line per task: count of each reason, the most frequent first."""
    return [
        f"{task}: " + ", ".join(f"{code} {n}" for code, n in t["reasons"].items())
        for task, t in totals["tasks"].items()
        if t["reasons"]
    ]
