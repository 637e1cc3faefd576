"""Send questions to OpenAI-compatible endpoints from concurrent slots.

`Asking` takes a ledger with rows to ask, a journal and a stop flag, and updates the ledger. Each slot takes a row,
prepares its image in a thread, has one request in flight and writes the answer to disk before it sends the next. To
keep to a token budget, the upper bound of a request's cost (`tokens_bound`) is reserved before it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tatar_dist.data.images import UnreadableImage
from tatar_dist.errors import RunError, UserError
from tatar_dist.rationale.checks import Reason
from tatar_dist.rationale.endpoint import Endpoint, NoAnswer, Stopped, tokens_bound
from tatar_dist.rationale.ledger import Ledger, LedgerEntry, journal_line
from tatar_dist.rationale.questions import Answer, Question, QuestionRow, Request
from tatar_dist.rationale.replies import NoAccess, ReplyRefused
from tatar_dist.rationale.rows import Picture, RationaleRows, picture, reject_unreadable
from tatar_dist.run.journal import Journal

ENCODERS = 2  # threads that decode and encode images; they release the interpreter lock
POLL_S = 0.1  # how soon a signal is seen


class BudgetSpent(Exception):
    """The next request might exceed the token budget."""


class Budget:
    """Count tokens spent and reserved. `limit` None means no budget. For use in one event loop only."""

    def __init__(self, limit: int | None, spent: int) -> None:
        self.limit, self.spent, self.reserved = limit, spent, 0
        self.closed = False
        self._changed = asyncio.Condition()

    async def reserve(self, tokens: int) -> None:
        """Reserve tokens, waiting for requests in flight to release what they do not use.

        Raises BudgetSpent when the tokens do not fit and nothing is in flight, and on every call after that.
        """
        async with self._changed:
            while self.limit is not None and self.spent + self.reserved + tokens > self.limit:
                if self.closed or not self.reserved:
                    self.closed = True
                    self._changed.notify_all()
                    raise BudgetSpent
                await self._changed.wait()
            if self.closed:
                raise BudgetSpent
            self.reserved += tokens

    async def release(self, tokens: int, spent: int) -> None:
        """Release a reservation of `tokens`, of which `spent` were used. `spent` may exceed the reservation."""
        async with self._changed:
            self.reserved -= tokens
            self.spent += spent
            self._changed.notify_all()


class Asking:
    """One run against endpoints. `progress` is called and `stopping` polled about every `POLL_S` seconds."""

    def __init__(
        self,
        ledger: Ledger,
        rows: RationaleRows,
        journal: Journal,
        say: Callable[[str], None],
        progress: Callable[[Ledger], None],
        stopping: Callable[[], bool],
    ) -> None:
        self.ledger, self.rows, self.journal = ledger, rows, journal
        self.say, self.progress, self.stopping = say, progress, stopping
        self.question: Question = ledger.question
        self.limits = self.question.c.limits
        self.budget = Budget(self.limits.budget_tokens, ledger.tokens)
        self._bound_factor = 1.0  # of prompt tokens: the most that an endpoint counted over our bound
        self._endpoints: dict[tuple[str, str], Endpoint] = {}
        self._writing = 0

    def run(self) -> bool:
        """Ask until every row is settled or the user requests a stop. Returns whether the budget ended it before.

        Raises UserError or RunError when the endpoint cannot be used. All answers received are in the journal,
        including those in flight at that moment that arrive within `stop_wait_s`.
        """
        asyncio.run(self._run())
        return self.budget.closed

    async def _run(self) -> None:
        for kind in self.question.kinds.values():
            target = kind.target
            if target.url and (target.url, target.api_key_env) not in self._endpoints:
                self._endpoints[target.url, target.api_key_env] = Endpoint(target, self.limits, self.say)
        todo = self.ledger.todo()
        with ThreadPoolExecutor(1, "rows") as reader, ThreadPoolExecutor(ENCODERS, "images") as encoders:
            self._reader, self._encoders = reader, encoders
            slots = [asyncio.create_task(self._slot(todo)) for _ in range(self.limits.concurrency)]
            try:
                await self._until_done(set(slots))
            finally:
                for slot in slots:
                    slot.cancel()
                await asyncio.gather(*slots, return_exceptions=True)
                await self.journal.settled()
                for endpoint in self._endpoints.values():
                    await endpoint.close()

    async def _until_done(self, pending: set[asyncio.Task[None]]) -> None:
        """Wait for the slots; after an error or stop, wait up to `stop_wait_s` for answers in flight: they are paid."""
        deadline: float | None = None
        error: BaseException | None = None
        clock = asyncio.get_running_loop().time
        while pending:
            done, pending = await asyncio.wait(pending, timeout=POLL_S, return_when=asyncio.FIRST_EXCEPTION)
            error = error or next((e for task in done if (e := task.exception())), None)
            self.ledger.retries = sum(e.retries for e in self._endpoints.values())
            self.progress(self.ledger)
            if deadline is None and (error is not None or self.stopping()):
                deadline = clock() + self.limits.stop_wait_s
                for endpoint in self._endpoints.values():
                    endpoint.stopped = True
            if deadline is not None and (not self.in_flight or clock() > deadline):
                break
        if error is not None:
            raise error

    @property
    def in_flight(self) -> int:
        """Number of requests being sent and of answers not on disk yet."""
        return self._writing + sum(e.sending for e in self._endpoints.values())

    async def _slot(self, todo: Iterator[LedgerEntry]) -> None:
        """Ask row after row, one request at a time. All slots share `todo`."""
        with contextlib.suppress(BudgetSpent, Stopped):
            for entry in todo:
                try:
                    row, image = await self._prepare(entry)
                except UnreadableImage as e:
                    reject_unreadable(self.ledger, self.rows, entry, str(e))
                else:
                    self.ledger.images_read += 1
                    await self._settle(entry, row, image)

    async def _prepare(self, entry: LedgerEntry) -> tuple[QuestionRow, Picture | None]:
        """Read a row and encode its image. Raises UnreadableImage."""
        loop, kind = asyncio.get_running_loop(), self.question.kinds[entry.task]
        row, sample = await loop.run_in_executor(self._reader, self.rows.get, entry.number)
        if not kind.image:
            return row, None
        pixels = kind.target.max_pixels
        return row, await loop.run_in_executor(self._encoders, picture, sample.image, pixels, row.sample_id)

    async def _settle(self, entry: LedgerEntry, row: QuestionRow, image: Picture | None) -> None:
        """Ask about one row until it is settled. Raises BudgetSpent, Stopped, and errors that end the run."""
        while True:
            request = self.question.request(row, len(entry.answers))
            try:
                answer = await self._ask(entry, request, image)
            except ReplyRefused as e:
                return self.ledger.fail(entry, Reason("endpoint-refused", f"the endpoint refused it: {e}"))
            except NoAnswer as e:
                return self.ledger.fail(entry, Reason("no-answer", f"all tries failed, the last: {e}"))
            outcome = self.question.read(row, answer)
            if self.ledger.take(entry, answer, outcome):
                return

    async def _ask(self, entry: LedgerEntry, request: Request, image: Picture | None) -> Answer:
        """Get one durable answer. Its tokens are reserved before the request and accounted for after it."""
        endpoint = self._endpoints[request.target.url, request.target.api_key_env]
        key = {"sample_id": request.sample_id, "attempt": request.attempt}
        bound = tokens_bound(request, image)
        most = int(bound * self._bound_factor) + request.max_tokens
        await self.budget.reserve(most)
        reserved, spent = most, 0

        async def lost() -> None:
            """Count the whole reservation of a failed try as spent, and reserve as much for the next try."""
            nonlocal reserved
            self.ledger.lost_tokens += most
            reserved = 0
            await self.budget.release(most, most)
            await self.journal.append({**key, "lost": most})
            await self.budget.reserve(most)
            reserved = most
            await self._note({**key, "asking": most})

        try:
            await self._note({**key, "asking": most})  # a kill must not hide what is being spent
            answer = await endpoint.ask(request, image, lost)
            self._writing += 1
            try:
                spent = answer.prompt_tokens + answer.completion_tokens
                self._bound_factor = max(self._bound_factor, (spent - request.max_tokens) / bound)
                await self.journal.append(journal_line(entry, request.attempt, answer))
            finally:
                self._writing -= 1
            return answer
        except (ReplyRefused, NoAnswer, NoAccess, RunError) as e:  # it is known to have cost nothing more
            await self.journal.append({**key, "lost": 0, "failed": str(e)})
            raise
        except (Stopped, UserError):
            await self._note({**key, "lost": 0})
            raise
        finally:
            await self.budget.release(reserved, spent)

    async def _note(self, line: dict[str, Any]) -> None:
        """Journal a line about spending. With a budget, wait until it is on disk; else it joins the next commit."""
        noted = self.journal.hand_in(line)
        if self.limits.budget_tokens is not None:
            await asyncio.shield(noted)
