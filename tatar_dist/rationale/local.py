"""Use our own vLLM engines on Ray as teacher or judge: `rationale.teacher.local=true model.path=...`.

As for an endpoint (asking.py), `LocalAsking` takes a ledger with rows to ask, a journal and a stop flag, and updates
the ledger. Rows go to the engines in rounds of one attempt. The answers of an engine call are on disk before that
engine gets the next call. With `rollout.deterministic` an answer depends only on its row and attempt, so that a killed
and resumed run writes the same file as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import StringIO
from itertools import accumulate, islice

from tatar_dist.cluster.ray_cluster import Cluster
from tatar_dist.data.images import UnreadableImage, decode_image
from tatar_dist.models import family
from tatar_dist.plan.plan import resolve
from tatar_dist.rationale.checks import Reason
from tatar_dist.rationale.ledger import Ledger, LedgerEntry, journal_line
from tatar_dist.rationale.questions import Answer, QuestionRow, Request
from tatar_dist.rationale.rows import RationaleRows, reject_unreadable
from tatar_dist.rollout.engine import Sampling
from tatar_dist.rollout.pool import RolloutPool
from tatar_dist.run.journal import Journal
from tatar_dist.types import Group, Prompt, Sample

CALLS_AHEAD = 4  # rows held in memory with their images: this many full calls of every engine


@dataclass(frozen=True)
class _Asked:
    """A row being asked in a round. `most`: tokens of its prompt plus those of the longest allowed answer."""

    entry: LedgerEntry
    row: QuestionRow
    request: Request
    prompt: Prompt
    most: int


class LocalAsking:
    """One run on our own engines. `progress` is called after every engine call, `stopping` before one."""

    def __init__(
        self,
        ledger: Ledger,
        rows: RationaleRows,
        journal: Journal,
        progress: Callable[[], None],
        stopping: Callable[[], bool],
    ) -> None:
        self.ledger, self.rows, self.journal = ledger, rows, journal
        self.progress, self.stopping = progress, stopping
        self.question = ledger.question
        self.config = self.question.config
        self.budget = self.question.c.limits.budget_tokens
        self.budget_spent = False
        backbone = family(self.config.model.family)
        backbone.check_directory(self.config.model.path)
        with contextlib.redirect_stderr(StringIO()):
            self.backbone = backbone(self.config.model)

    def run(self) -> bool:
        """Ask until every row is settled or the user requests a stop. Returns whether the budget ended it before.

        Raises UserError for a model or cluster that cannot be used, RunError when an engine dies or is late.
        """
        plan = resolve(self.config, "evaluate")
        with Cluster(self.config) as cluster:
            pool = cluster.engines(plan.engines)
            pool.start(cluster.threads(plan.engines))
            pool.started()
            size = CALLS_AHEAD * plan.engines * self.config.rollout.max_num_seqs
            todo = self.ledger.todo()
            while window := list(islice(todo, size)):
                self._settle(pool, window)
                if self.budget_spent or self.stopping():
                    break
        return self.budget_spent

    def _settle(self, pool: RolloutPool, window: list[LedgerEntry]) -> None:
        """Ask about these rows, one attempt at a time, until each is settled."""
        samples = {}
        for entry in window:
            try:
                samples[entry.number] = self.rows.get(entry.number)
                if self.question.kinds[entry.task].image:
                    decode_image(samples[entry.number][1].image, entry.sample_id)
            except UnreadableImage as e:
                reject_unreadable(self.ledger, self.rows, entry, str(e))
        for attempt in range(self.ledger.attempts):
            for task in sorted({entry.task for entry in window}):
                entries = [e for e in window if e.task == task and not self.ledger.is_settled(e)]
                asked = [
                    rendered
                    for e in entries
                    if len(e.answers) == attempt and (rendered := self._asked(e, *samples[e.number])) is not None
                ]
                if asked:
                    self._round(pool, asked)
                if self.budget_spent or self.stopping():
                    return

    def _asked(self, entry: LedgerEntry, row: QuestionRow, sample: Sample) -> _Asked | None:
        """Render a row's prompt. Rejects the row and returns None if prompt or image do not fit the engine."""
        request = self.question.request(row, len(entry.answers))
        content: list[dict[str, str]] = [{"type": "image"}] if request.kind.image else []
        messages = [
            {"role": "system", "content": [{"type": "text", "text": request.system}]},
            {"role": "user", "content": [*content, {"type": "text", "text": request.user}]},
        ]
        tokenizer = self.backbone.tokenizer
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        try:
            tokens = len(tokenizer(text)["input_ids"])
            if request.kind.image:
                tokens += self.backbone.image_tokens(*decode_image(sample.image, entry.sample_id).size)
        except ValueError as e:  # an image more than 200 times as wide as high
            self.ledger.reject(entry, Reason("image-unreadable", str(e)))
            return None
        most, limit = tokens + request.kind.max_tokens, self.config.rollout.max_model_len
        if most > limit:
            says = f"prompt and answer need {most} tokens, over rollout.max_model_len={limit}"
            self.ledger.reject(entry, Reason("prompt-too-long", says))
            return None
        return _Asked(entry, row, request, Prompt(sample, text, f"{entry.number:09d}", request.kind.image), most)

    def _affordable(self, asked: list[_Asked]) -> Iterator[list[_Asked]]:
        """Split the rows into parts whose maximal cost fits the budget left when the part is taken."""
        while asked:
            left = math.inf if self.budget is None else self.budget - self.ledger.tokens
            n = sum(total <= left for total in accumulate(a.most for a in asked))
            if not n:
                self.budget_spent = True
                return
            yield asked[:n]
            asked = asked[n:]

    def _round(self, pool: RolloutPool, asked: list[_Asked]) -> None:
        """Get one answer for each of these rows of one task, made durable as engine calls return."""
        request = asked[0].request  # all differ in row and text only
        kind = request.kind
        structured = kind.schema is not None and kind.endpoint.structured
        sampling = Sampling(
            n=1,
            temperature=kind.sampling.temperature,
            top_p=kind.sampling.top_p,
            max_tokens=kind.max_tokens,
            seed=self.config.seed,
            step=request.attempt,
            schema=json.dumps(kind.schema) if structured else None,
        )
        by_group = {a.prompt.group_id: a for a in asked}
        for part in self._affordable(asked):
            calls = pool.chunks([a.prompt for a in part], sampling.n)
            for groups in pool.stream(calls, sampling, more=lambda: not self.stopping()):
                self._take([(by_group[g.prompt.group_id], g) for g in groups])
                self.progress()
            if self.stopping():
                return

    def _take(self, answered: Iterable[tuple[_Asked, Group]]) -> None:
        """Write the answers of one engine call to the journal in one commit, then count them."""
        answers = []
        for asked, group in answered:
            (completion,) = group.completions
            tokens = len(group.prompt_token_ids), len(completion.token_ids)
            answers.append((asked, Answer(completion.text, completion.finish_reason, *tokens)))
        self.journal.write(*(journal_line(a.entry, a.request.attempt, answer) for a, answer in answers))
        for asked, answer in answers:
            self.ledger.take(asked.entry, answer, self.question.read(asked.row, answer))
