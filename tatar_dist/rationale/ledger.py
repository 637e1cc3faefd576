"""State of a build or judge run: answers and outcome of each row, token counts and cost.

`Ledger` takes the rows of the manifest, the journal lines of earlier runs and the answers of this run. It yields the
rows still to be asked, and counts. The outcome of a row depends only on its answers in order of attempt, so a resumed
run gets the same outcomes as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tatar_dist.rationale.checks import Reason
from tatar_dist.rationale.questions import Answer, Outcome, Question, QuestionRow
from tatar_dist.types import Task


@dataclass
class LedgerEntry:
    """State of one row."""

    number: int
    sample_id: str
    dataset: str
    task: Task
    digest: str  # hash of what is asked about the row
    before: tuple[Reason, ...]  # reasons to reject it without asking
    answers: list[tuple[Answer, Outcome]] = field(default_factory=list)
    failed: Reason | None = None  # why it got no answer; the next run asks again

    @property
    def verdict(self) -> str | None:
        """Return the last verdict (accept, again or reject); reject if the row failed before asking."""
        if self.before:
            return "reject"
        return self.answers[-1][1].verdict if self.answers else None

    @property
    def accepted(self) -> bool:
        return self.verdict == "accept"


def journal_line(entry: LedgerEntry, attempt: int, answer: Answer) -> dict[str, Any]:
    return {"sample_id": entry.sample_id, "row": entry.digest, "attempt": attempt, **asdict(answer)}


class Ledger:
    """Ledger of a run. `remember` every journal line, `enter` every row in order, then `take`."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.attempts = question.c.attempts
        self.entries: list[LedgerEntry] = []
        self.prompt_tokens = self.completion_tokens = self.lost_tokens = 0
        self.accepted = self.rejected = self.failed = 0
        self._durable: dict[tuple[str, str], dict[int, Answer]] = {}  # by sample id and digest of the row
        self._failed_before: set[str] = set()
        self._reserved: dict[tuple[str, int], int] = {}  # asked by a killed run, never answered

    def remember(self, line: dict[str, Any]) -> None:
        """Read a journal line: an answer, or a request's tokens, reserved ("asking") or "lost".

        "failed" beside "lost" holds the error of a request that got no answer after all retries.
        """
        key = (line["sample_id"], line["attempt"])
        if "asking" in line:
            self._reserved[key] = line["asking"]
            return
        self._reserved.pop(key, None)
        if "lost" in line:
            self.lost_tokens += line["lost"]
            if "failed" in line:
                self._failed_before.add(line["sample_id"])
            return
        answer = Answer(line["text"], line["finish"], line["prompt_tokens"], line["completion_tokens"])
        self._count(answer)
        self._durable.setdefault((line["sample_id"], line["row"]), {})[line["attempt"]] = answer
        self._failed_before.discard(line["sample_id"])

    def unanswered(self) -> list[dict[str, Any]]:
        """Count reservations of a killed run as spent, after all `remember`; return journal lines."""
        lines = [{"sample_id": key[0], "attempt": key[1], "lost": n} for key, n in self._reserved.items()]
        for line in lines:
            self.remember(line)
        return lines

    @property
    def tokens(self) -> int:
        """Return the tokens of all runs of this output; a lost request counts as its reservation."""
        return self.prompt_tokens + self.completion_tokens + self.lost_tokens

    def _count(self, answer: Answer) -> None:
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens

    def enter(self, row: QuestionRow) -> None:
        """Add the next row of the manifest, with its answers from the journal."""
        digest = self.question.digest(row)
        entry = LedgerEntry(row.number, row.sample_id, row.dataset, row.task, digest, self.question.before(row))
        known = self._durable.pop((row.sample_id, digest), {})
        while not self.is_settled(entry) and len(entry.answers) in known:
            answer = known[len(entry.answers)]
            entry.answers.append((answer, self.question.read(row, answer)))
        self.entries.append(entry)
        self._settle(entry)

    def is_settled(self, entry: LedgerEntry) -> bool:
        """Return whether the row needs no further answer: accepted, rejected, or out of attempts."""
        return entry.verdict in ("accept", "reject") or len(entry.answers) >= self.attempts

    def _settle(self, entry: LedgerEntry) -> None:
        if self.is_settled(entry):
            self.accepted += entry.accepted
            self.rejected += not entry.accepted

    def todo(self) -> Iterator[LedgerEntry]:
        """Yield unsettled rows in order, those unanswered in earlier runs last, not to delay others."""
        for entry in sorted(self.entries, key=lambda e: e.sample_id in self._failed_before):
            if not self.is_settled(entry):
                yield entry

    def take(self, entry: LedgerEntry, answer: Answer, outcome: Outcome) -> None:
        """Record a durable answer of this run."""
        entry.answers.append((answer, outcome))
        self._count(answer)
        self._settle(entry)

    def fail(self, entry: LedgerEntry, reason: Reason) -> None:
        """Record that a row got no answer: this run's output omits it, the next run asks it again."""
        entry.failed = reason
        self.failed += 1

    def reject(self, entry: LedgerEntry, reason: Reason) -> None:
        """Reject a row that cannot be asked, for example because its image cannot be read."""
        entry.before = (reason,)
        self.rejected += 1

    @property
    def settled(self) -> int:
        return self.accepted + self.rejected

    @property
    def open(self) -> int:
        return len(self.entries) - self.settled - self.failed

    def cost(self) -> float:
        """Return the cost in the currency of the prices; lost tokens at the dearer completion price."""
        c = self.question.endpoint
        prompt, completion = self.prompt_tokens, self.completion_tokens + self.lost_tokens
        return (prompt * c.prompt_price + completion * c.completion_price) / 1e6
