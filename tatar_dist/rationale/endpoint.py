"""Client for an OpenAI-compatible endpoint: one `openai.AsyncOpenAI`, with rate limits, retries and redaction.

`Endpoint.ask` sends a `Request` with its picture and returns an `Answer`. The library sends one try; retries are made
here, because a lost try is booked against the token budget before the next, and a 429 pauses all slots together for its
Retry-After. Requests and tokens per minute stay within the settings. Errors such as missing access end the run. The key
comes from the environment variable that the settings name and is sent in one header; `OPENAI_*` variables have no
effect.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from aiolimiter import AsyncLimiter

from tatar_dist import __version__
from tatar_dist.config.rationale import LimitsConfig
from tatar_dist.errors import RunError, UserError
from tatar_dist.rationale.questions import Answer, Request, Target
from tatar_dist.rationale.replies import NoAccess, NoSchema, ReplyRefused, TryAgain, raise_for, read_answer
from tatar_dist.rationale.rows import Picture

MAX_REPLY = 4 << 20  # bytes; a longer reply is garbage
CONNECT_S = 10.0
WINDOW_S = 2.0  # of a rate limit: bursts of two seconds' worth, then evenly
POLL_S = 0.05
SAY_EVERY_S = 15.0  # an endpoint that asks for pauses is quoted no more often
RETRY_AFTER_MAX = 900.0  # a Retry-After beyond this is taken as this
READ_BACK = "x-stainless-raw-response"  # the only header of the library that stays: it reads it from the request


class NoAnswer(Exception):
    """All tries of one sample's request failed. The message describes the last failure."""


class Stopped(Exception):
    """The run is being stopped; no further request is sent."""


def tokens_bound(request: Request, picture: Picture | None) -> int:
    """Upper bound of the prompt's tokens: a byte is at most a token; 64 for the chat template; the picture's."""
    return len(request.system.encode()) + len(request.user.encode()) + 64 + (picture.tokens if picture else 0)


def body_of(request: Request, picture: Picture | None) -> dict[str, Any]:
    """Return the body of a chat completion."""
    content: Any = request.user
    if picture is not None:
        content = [{"type": "image_url", "image_url": {"url": picture.url}}, {"type": "text", "text": request.user}]
    body: dict[str, Any] = {
        "model": request.target.model,
        "messages": [{"role": "system", "content": request.system}, {"role": "user", "content": content}],
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": request.max_tokens,
        "seed": request.seed,
    }
    if request.schema is not None:
        schema = {"name": "marks", "strict": True, "schema": request.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def key_of(target: Target) -> str | None:
    """The API key from the environment. Raises UserError if the variable is unset or not a valid header value."""
    if not target.api_key_env:
        return None
    key = os.environ.get(target.api_key_env, "").strip()
    section = target.key.removesuffix(".url")
    if not key:
        raise UserError(f"{section}.api_key_env={target.api_key_env}: this environment variable is not set")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{section}.api_key_env={target.api_key_env}: the variable holds characters that no key has")
    return key


def limiter(per_minute: float) -> AsyncLimiter | None:
    """Rate limiter, or None for 0. A burst plus the steady rate after it stay within `per_minute` in any minute."""
    if not per_minute:
        return None
    per_window = per_minute * WINDOW_S / (60 + WINDOW_S)
    return AsyncLimiter(per_window, WINDOW_S) if per_window >= 1 else AsyncLimiter(1, 60 / per_minute)


async def acquire(limit: AsyncLimiter | None, amount: float) -> None:
    """Acquire `amount` from the limiter, in parts if it exceeds one burst."""
    while limit is not None and amount > 0:
        part = min(amount, limit.max_rate)
        await limit.acquire(part)
        amount -= part


class Endpoint:
    """Client for one address and key. `say` receives messages for the user. Call `close` when done."""

    def __init__(self, target: Target, limits: LimitsConfig, say: Callable[[str], None]) -> None:
        self.limits, self.say = limits, say
        self._key = key_of(target)
        self.retries = self.sending = 0  # `sending`: requests that are out right now
        self.stopped = False
        self._client = self._open(target)
        self._structured = target.structured
        self._schema_known = False  # an answer by schema has come
        self._answered = False
        self._asking = self._undecided = 0  # calls of `ask`; those of them that wait for what a 403 or 404 means
        self._failures = 0  # given up since the last answer
        self._resume_at = 0.0  # monotonic; before it nobody asks
        self._pauses = 0  # 429s since the last answer, without a Retry-After: each pause is longer
        self._said_at = -math.inf
        self._requests, self._tokens = limiter(limits.requests_per_minute), limiter(limits.tokens_per_minute)

    def _open(self, target: Target) -> Any:
        """Return an `openai.AsyncOpenAI` that sends to the target's address with our key alone."""
        from openai import DEFAULT_CONNECTION_LIMITS, AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

        json_type = "application/json"
        headers = {"user-agent": f"tatar-dist/{__version__}", "accept": json_type, "content-type": json_type}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"

        async def set_headers(request: Any) -> None:
            """Replace the headers, which the library makes of OPENAI_* variables and of this machine, by ours."""
            kept = {READ_BACK: request.headers[READ_BACK]} if READ_BACK in request.headers else {}
            for name in set(request.headers):
                del request.headers[name]
            body = {"host": address.netloc, "content-length": str(len(request.content))}
            request.headers.update(headers | body | kept)

        address = urlsplit(target.url)
        host = address.hostname or ""
        # a connection for every slot, kept open; the library's own limits are 1,000 and 100 kept
        slots = self.limits.concurrency
        pool = type(DEFAULT_CONNECTION_LIMITS)(max_connections=slots, max_keepalive_connections=slots)
        http_client = DefaultAsyncHttpxClient(
            limits=pool,
            follow_redirects=False,
            trust_env=not (host in ("localhost", "::1") or host.startswith("127.")),  # no proxy to this machine
            event_hooks={"request": [set_headers]},
        )
        return AsyncOpenAI(
            api_key=self._key or "none",
            base_url=f"{address.scheme}://{address.netloc}{address.path}",
            default_query=dict(parse_qsl(address.query, keep_blank_values=True)),
            timeout=Timeout(target.timeout_s, connect=min(CONNECT_S, target.timeout_s), pool=None),
            max_retries=0,
            http_client=http_client,
        )

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, request: Request, picture: Picture | None, on_lost: Callable[[], Awaitable[None]]) -> Answer:
        """Send a request and return its answer. `on_lost` is awaited after a failed try that may have cost tokens.

        Raises:
            NoAnswer: all tries failed. ReplyRefused: the endpoint refuses this request.
            UserError: no access, no such model, a wrong address. RunError: too many failures in a row.
        """
        self._asking += 1
        try:
            answer = await self._with_retries(request, picture, on_lost)
        except NoAccess as e:
            if not await self._others_answered():
                raise
            raise ReplyRefused(str(e)) from None
        except ReplyRefused as e:
            if not self._answered:  # else it is about this sample, and others are answered
                self._failed(request, e)
            raise
        except TryAgain as e:
            self._failed(request, e)
            raise NoAnswer(str(e)) from None
        finally:
            self._asking -= 1
        self._answered = True
        self._failures = self._pauses = 0
        return answer

    def _failed(self, request: Request, error: Exception) -> None:
        """Count a request without an answer. Raises RunError after `failures_in_a_row` of them."""
        self._failures += 1
        if self._failures >= self.limits.failures_in_a_row:
            raise RunError(
                f"{request.target.key}={request.target.url}: {self.limits.failures_in_a_row} requests in a row got no "
                f"answer, the last: {error}; what was answered is kept, the same command goes on from there"
            ) from None

    async def _others_answered(self) -> bool:
        """Whether this endpoint has answered any request; waits while other requests may still be answered."""
        self._undecided += 1
        try:
            while not self._answered and self._undecided < self._asking and not self.stopped:
                await asyncio.sleep(POLL_S)
        finally:
            self._undecided -= 1
        return self._answered

    async def _with_retries(
        self, request: Request, picture: Picture | None, on_lost: Callable[[], Awaitable[None]]
    ) -> Answer:
        """Try until an answer, an error that no retry cures, or the end of the retries (raises the last TryAgain)."""
        began, failures = time.monotonic(), 0
        while True:
            try:
                return await self._once(request, picture)
            except TryAgain as e:
                if e.limited:
                    self._pause(request, e)
                else:
                    failures += 1
                if e.lost:
                    await on_lost()
                if failures > self.limits.retries or time.monotonic() - began > self.limits.give_up_s:
                    raise
                delay = self._delay(e, failures)
            self.retries += 1
            await asyncio.sleep(delay)

    def _delay(self, error: TryAgain, failures: int) -> float:
        """Seconds before the next try: exponential backoff with jitter, at least the error's Retry-After."""
        limits = self.limits
        if error.limited:  # all slots pause together (_pause); spread them a little afterwards
            return random.uniform(0, limits.backoff_s)
        longest = min(limits.backoff_max_s, limits.backoff_s * 2 ** (failures - 1))
        return max(random.uniform(longest / 2, longest), min(error.retry_after or 0.0, RETRY_AFTER_MAX))

    def _pause(self, request: Request, error: TryAgain) -> None:
        """Pause all requests for the error's Retry-After, or without one for a time that doubles at each pause."""
        now, seconds = time.monotonic(), error.retry_after
        if now < self._resume_at and seconds is None:
            return  # asked before the pause that another slot began: the same event
        if seconds is None:
            seconds = min(self.limits.backoff_max_s, self.limits.backoff_s * 2**self._pauses)
            self._pauses = min(self._pauses + 1, 20)
        self._resume_at = max(self._resume_at, now + min(seconds, RETRY_AFTER_MAX))
        if now - self._said_at >= SAY_EVERY_S:
            self._said_at = now
            left = self._resume_at - now
            self.say(f"{request.target.url} asks us to slow down: nothing is asked for {left:.0f} s ({error})")

    async def _turn(self, bound: int) -> None:
        """Wait for the shared pause, then for the rate limits. A turn taken before a pause would add to the burst.

        Raises Stopped when the run is being stopped, also if cancelled while waiting. Nothing was sent or spent then.
        """
        try:
            while True:
                while (left := self._resume_at - time.monotonic()) > 0:
                    await asyncio.sleep(left)
                await acquire(self._tokens, bound)
                await acquire(self._requests, 1)
                if self.stopped:
                    raise Stopped
                if time.monotonic() >= self._resume_at:
                    return
        except asyncio.CancelledError:
            if self.stopped:
                raise Stopped from None
            raise

    async def _once(self, request: Request, picture: Picture | None) -> Answer:
        """Send the request; after `NoSchema` send it without the schema, which later requests then leave out."""
        plain = replace(request, schema=None)
        if request.schema is None or not self._structured:
            return await self._send(plain, picture)
        try:
            answer = await self._send(request, picture)
        except NoSchema as e:
            if self._schema_known:
                raise e.otherwise from None
            answer = await self._send(plain, picture)
            if self._structured:
                self._structured = False
                self.say(f"{request.target.url} takes no JSON schema ({e}): asking for plain JSON from here on")
            return answer
        self._schema_known = True
        return answer

    async def _send(self, request: Request, picture: Picture | None) -> Answer:
        bound = tokens_bound(request, picture)
        await self._turn(bound + request.max_tokens)
        reply = await self._post(request, body_of(request, picture))
        return read_answer(reply, bound, request.max_tokens, self._key)

    async def _post(self, request: Request, body: dict[str, Any]) -> bytes:
        """Make one request within `timeout_s`. Returns the body of a 200 reply; of others, see `raise_for`."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        seconds = request.target.timeout_s
        self.sending += 1
        try:
            async with asyncio.timeout(seconds):  # the library's own timeouts start anew with every byte
                reply = await self._client.chat.completions.with_raw_response.create(**body)
        except APIStatusError as e:
            raise_for(e.status_code, e.response.headers, e.response.content, request, self._key)
        except APIConnectionError as e:
            cause = type(e.__cause__).__name__  # by name: the HTTP library below openai depends on its version
            problem = str(e.__cause__) or cause
            if cause in ("ConnectError", "ConnectTimeout"):
                raise TryAgain(f"cannot connect: {problem}") from None
            if isinstance(e, APITimeoutError):
                raise TryAgain(f"no whole answer within {seconds:g} s", lost=True) from None
            raise TryAgain(f"the connection broke: {problem}", lost=True) from None
        except TimeoutError:
            raise TryAgain(f"no whole answer within {seconds:g} s", lost=True) from None
        finally:
            self.sending -= 1
        if len(reply.content) > MAX_REPLY:  # read whole by then: this bounds what is parsed and kept, not the memory
            raise TryAgain(f"the reply is longer than {MAX_REPLY >> 20} MiB", lost=True)
        return bytes(reply.content)
