"""Send questions to OpenAI-compatible endpoints from concurrent slots.

Each slot takes a row, prepares its image in a thread, has one request in flight and writes the answer to disk before it
sends the next. To keep to a token budget, the upper bound of a request's cost is reserved before it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from tatar_dist.data.images import UnreadableImage
from tatar_dist.errors import RunError, UserError
from tatar_dist.rationale.checks import Reason
from tatar_dist.rationale.endpoint import Endpoint, Send, Stopped, tokens_bound
from tatar_dist.rationale.ledger import LedgerEntry, journal_line
from tatar_dist.rationale.questions import QuestionRow
from tatar_dist.rationale.replies import RequestFailed
from tatar_dist.rationale.rows import Asker, Picture, picture

ENCODERS = 2  # threads that decode and encode images; they release the interpreter lock
POLL_S = 0.1  # how soon a signal is seen


class Asking(Asker):
    """One run against endpoints. Calls `progress` and `stopping` about every `POLL_S` seconds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.limits = self.question.c.limits
        self.budget = math.inf if self.limits.budget_tokens is None else self.limits.budget_tokens
        self._reserved = 0  # tokens of requests in flight
        self._bound_factor = 1.0  # of prompt tokens: the most that an endpoint counted over our bound

    def run(self) -> bool:
        """Ask about open rows; return `budget_spent`. Raises UserError, RunError: unusable endpoint."""
        asyncio.run(self._run())
        return self.budget_spent

    async def _run(self) -> None:
        self._stop, self._released = asyncio.Event(), asyncio.Condition()
        self._endpoints: dict[tuple[str, str], Endpoint] = {}  # by address and key variable
        for kind in self.question.kinds.values():
            address = kind.endpoint.url, kind.endpoint.api_key_env
            if kind.endpoint.url and address not in self._endpoints:
                self._endpoints[address] = Endpoint(kind, self.limits, self.say, self._stop)
        todo = self.ledger.todo()
        with ThreadPoolExecutor(1, "rows") as self._reader, ThreadPoolExecutor(ENCODERS, "images") as self._encoders:
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
        """Wait for the slots; after an error or stop, up to `stop_wait_s` for answers already paid."""
        deadline = math.inf
        error: BaseException | None = None
        while pending and time.monotonic() < deadline:
            done, pending = await asyncio.wait(pending, timeout=POLL_S, return_when=asyncio.FIRST_EXCEPTION)
            error = error or next((e for task in done if (e := task.exception())), None)
            self.progress()
            if not self._stop.is_set() and (error is not None or self.stopping()):
                self._stop.set()
                deadline = time.monotonic() + self.limits.stop_wait_s
        if error is not None:
            raise error

    async def _slot(self, todo: Iterator[LedgerEntry]) -> None:
        """Ask row after row, one request at a time. All slots share `todo`."""
        with contextlib.suppress(Stopped):
            for entry in todo:
                try:
                    row, image = await self._prepare(entry)
                except UnreadableImage as e:
                    self.reject_unreadable(entry, str(e))
                    continue
                while not (entry.failed or self.ledger.is_settled(entry)):
                    await self._ask(entry, row, image)

    async def _prepare(self, entry: LedgerEntry) -> tuple[QuestionRow, Picture | None]:
        """Read a row and encode its image. Raises UnreadableImage, or Stopped once the run stops."""
        if self._stop.is_set():
            raise Stopped
        loop, kind = asyncio.get_running_loop(), self.question.kinds[entry.task]
        row, sample = await loop.run_in_executor(self._reader, self.rows.get, entry.number)
        if not kind.image:
            return row, None
        pixels = kind.endpoint.max_pixels
        return row, await loop.run_in_executor(self._encoders, picture, sample.image, pixels, row.sample_id)

    async def _ask(self, entry: LedgerEntry, row: QuestionRow, image: Picture | None) -> None:
        """Ask once about a row; record the answer or failure. Raises Stopped or a run-ending error."""
        request = self.question.request(row, len(entry.answers))
        key = {"sample_id": row.sample_id, "attempt": request.attempt}
        endpoint = self._endpoints[request.kind.endpoint.url, request.kind.endpoint.api_key_env]
        bound = tokens_bound(request, image)

        async def attempt(send: Send) -> None:
            """Make one try. Its tokens are reserved before and accounted for after it."""
            most = int(bound * self._bound_factor) + request.kind.max_tokens
            await self._reserve(most)
            try:
                await self.journal.append({**key, "asking": most})  # a kill must not hide what is being spent
                answer = await send()
                await self.journal.append(journal_line(entry, request.attempt, answer))
                self.ledger.take(entry, answer, self.question.read(row, answer))
                prompt_tokens = answer.prompt_tokens + answer.completion_tokens - request.kind.max_tokens
                self._bound_factor = max(self._bound_factor, prompt_tokens / bound)
            except RequestFailed as e:
                if e.lost:
                    self.ledger.lost_tokens += most
                    await self.journal.append({**key, "lost": most})
                raise
            finally:
                await self._release(most)

        try:
            await endpoint.ask(request, image, attempt)
        except RequestFailed as e:
            await self.journal.append({**key, "lost": 0, "failed": str(e)})
            reason = Reason("no-answer", f"all tries failed, the last: {e}")
            if e.refused:
                reason = Reason("endpoint-refused", f"the endpoint refused it: {e}")
            self.ledger.fail(entry, reason)
        except (UserError, RunError) as e:
            await self.journal.append({**key, "lost": 0, "failed": str(e)})
            raise
        except Stopped:
            await self.journal.append({**key, "lost": 0})
            raise

    async def _reserve(self, tokens: int) -> None:
        """Reserve tokens, waiting for requests in flight to release theirs.

        Raises Stopped if they do not fit into the budget and nothing is in flight, and at every call after that.
        """
        async with self._released:
            while not self.budget_spent and self.ledger.tokens + self._reserved + tokens > self.budget:
                if self._reserved:
                    await self._released.wait()
                else:
                    self.budget_spent = True
                    self._released.notify_all()
            if self.budget_spent:
                raise Stopped
            self._reserved += tokens

    async def _release(self, tokens: int) -> None:
        async with self._released:
            self._reserved -= tokens
            self._released.notify_all()
