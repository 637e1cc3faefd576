"""Our vLLM engines on Ray as teacher or judge: `rationale.teacher.local=true model.path=…`.

Rows go to the engines in rounds of one attempt. The answers of an engine call are on disk before that engine gets the
next call. With `rollout.deterministic` an answer depends only on its row and attempt, so that a killed
and resumed run writes the same file as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from itertools import accumulate, islice, product

from tatar_dist.cluster.ray_cluster import Cluster
from tatar_dist.data.images import UnreadableImage, decode_image
from tatar_dist.models import family
from tatar_dist.plan.memory import check_fit
from tatar_dist.plan.plan import resolve
from tatar_dist.rationale.checks import Reason
from tatar_dist.rationale.ledger import LedgerEntry, journal_line
from tatar_dist.rationale.questions import Answer, QuestionRow
from tatar_dist.rationale.rows import Asker
from tatar_dist.rollout.engine import Sampling
from tatar_dist.rollout.pool import RolloutPool
from tatar_dist.types import TASKS, Prompt

CALLS_AHEAD = 4  # rows held in memory with their images: this many full calls of every engine


@dataclass(frozen=True)
class _Rendered:
    """A row with its prompt. `most`: tokens of the prompt and of the longest allowed answer."""

    entry: LedgerEntry
    row: QuestionRow
    prompt: Prompt
    most: int


class LocalAsking(Asker):
    """One run on our own engines. Calls `progress` after every engine call, `stopping` before."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.config = self.question.config
        backbone = family(self.config.model.family)
        backbone.check_directory(self.config.model.path)
        with contextlib.redirect_stderr(StringIO()):
            self.backbone = backbone(self.config.model)
        self.backbone.check_weights()

    def run(self) -> bool:
        """Ask the rows. Raises UserError: unusable model or cluster; RunError: dead or late engine."""
        plan = resolve(self.config, "evaluate")
        with Cluster(self.config) as cluster:
            check_fit(self.config, plan, cluster.smallest_gpu())
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
        for attempt, task in product(range(self.ledger.attempts), TASKS):
            entries = [e for e in window if e.task == task and not self.ledger.is_settled(e)]
            rendered = [r for e in entries if len(e.answers) == attempt and (r := self._rendered(e)) is not None]
            if rendered:
                self._round(pool, rendered)
            if self.budget_spent or self.stopping():
                return

    def _rendered(self, entry: LedgerEntry) -> _Rendered | None:
        """Read a row and render its prompt; reject it and return None if it does not fit the engine."""
        kind, tokenizer, image_tokens = self.question.kinds[entry.task], self.backbone.tokenizer, 0
        try:
            row, sample = self.rows.get(entry.number)
            if kind.image:
                image_tokens = self.backbone.image_tokens(*decode_image(sample.image, entry.sample_id).size)
        except (UnreadableImage, ValueError) as e:  # ValueError: an image more than 200 times as wide as high
            self.reject_unreadable(entry, str(e))
            return None
        request = self.question.request(row, len(entry.answers))
        content: list[dict[str, str]] = [{"type": "image"}] if kind.image else []
        messages = [
            {"role": "system", "content": [{"type": "text", "text": request.system}]},
            {"role": "user", "content": [*content, {"type": "text", "text": request.user}]},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        most = len(tokenizer(text)["input_ids"]) + image_tokens + kind.max_tokens
        limit = self.config.rollout.max_model_len
        if most > limit:
            problem = f"prompt and answer need {most} tokens, over rollout.max_model_len={limit}"
            self.ledger.reject(entry, Reason("prompt-too-long", problem))
            return None
        return _Rendered(entry, row, Prompt(sample, text, f"{entry.number:09d}", kind.image), most)

    def _affordable(self, rendered: list[_Rendered]) -> Iterator[list[_Rendered]]:
        """Split the rows into parts whose maximal cost fits the budget left when the part is taken."""
        budget = self.question.c.limits.budget_tokens
        while rendered and not self.budget_spent:
            left = math.inf if budget is None else budget - self.ledger.tokens
            n = sum(total <= left for total in accumulate(r.most for r in rendered))
            if n:
                yield rendered[:n]
            self.budget_spent = n == 0
            rendered = rendered[n:]

    def _round(self, pool: RolloutPool, rendered: list[_Rendered]) -> None:
        """Get one answer for each of these rows of one task, made durable as engine calls return."""
        attempt, kind = len(rendered[0].entry.answers), self.question.kinds[rendered[0].entry.task]
        structured = kind.schema is not None and kind.endpoint.structured
        sampling = Sampling(
            n=1,
            temperature=kind.sampling.temperature,
            top_p=kind.sampling.top_p,
            max_tokens=kind.max_tokens,
            seed=self.config.seed,
            step=attempt,
            schema=json.dumps(kind.schema) if structured else None,
        )
        by_group = {r.prompt.group_id: r for r in rendered}
        for part in self._affordable(rendered):
            calls = pool.chunks([r.prompt for r in part], sampling.n)
            for groups in pool.stream(calls, sampling, more=lambda: not self.stopping()):
                answers = []
                for group in groups:
                    (completion,) = group.completions
                    tokens = len(group.prompt_token_ids), len(completion.token_ids)
                    answer = Answer(completion.text, completion.finish_reason, *tokens)
                    answers.append((by_group[group.prompt.group_id], answer))
                self.journal.write(*(journal_line(r.entry, attempt, answer) for r, answer in answers))
                for r, answer in answers:
                    self.ledger.take(r.entry, answer, self.question.read(r.row, answer))
                self.progress()
            if self.stopping():
                return
