"""Client for an OpenAI-compatible endpoint, with rate limits, retries and timeouts.

`Endpoint.ask` sends a `Request` with its picture and returns an `Answer`. Failed tries are repeated with exponential
backoff and jitter. A 429 pauses all slots together for its Retry-After. Requests and tokens per minute stay within the
settings. Errors such as missing access end the run. The key comes from the environment and is sent in one header.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import httpx
from aiolimiter import AsyncLimiter
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from tatar_dist import __version__
from tatar_dist.config.rationale import LimitsConfig
from tatar_dist.errors import RunError, UserError
from tatar_dist.rationale.pictures import Picture
from tatar_dist.rationale.questions import Answer, Request, Target
from tatar_dist.rationale.replies import NoAccess, NoSchema, ReplyRefused, TryAgain, raise_for, read_answer

MAX_REPLY = 4 << 20  # bytes; a longer reply is garbage
CONNECT_S = 10.0
WINDOW_S = 2.0  # of a rate limit: bursts of two seconds' worth, then evenly
POLL_S = 0.05
SAY_EVERY_S = 15.0  # an endpoint that asks for pauses is quoted no more often
RETRY_AFTER_MAX = 900.0  # a Retry-After beyond this is taken as this


class NoAnswer(Exception):
    """All tries of one sample's request failed. The message describes the last failure."""


class Stopped(Exception):
    """The run is being stopped; no further request is sent."""


def tokens_bound(request: Request, picture: Picture | None) -> int:
    """Upper bound of the prompt's tokens: a byte is at most a token; 64 for the chat template; the picture's."""
    return len(request.system.encode()) + len(request.user.encode()) + 64 + (picture.tokens if picture else 0)


def body_of(request: Request, picture: Picture | None) -> bytes:
    """The JSON body of a chat completion."""
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
        "stream": False,
    }
    if request.schema is not None:
        schema = {"name": "marks", "strict": True, "schema": request.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return json.dumps(body).encode()


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


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host == "localhost" or host == "::1" or host.startswith("127.")


class Endpoint:
    """Client for one address and key. `say` receives messages for the user. Call `close` when done."""

    def __init__(self, target: Target, limits: LimitsConfig, say: Callable[[str], None]) -> None:
        self.limits, self.say = limits, say
        self._key = key_of(target)
        self.retries = self.sending = 0  # `sending`: requests that are out right now
        self.stopped = False
        self._structured = target.structured
        self._schema_known = False  # an answer by schema has come
        self._answered = False
        self._asking = self._undecided = 0  # calls of `ask`; those of them that wait for what a 403 or 404 means
        self._failures = 0  # given up since the last answer
        self._resume_at = 0.0  # monotonic; before it nobody asks
        self._pauses = 0  # 429s since the last answer, without a Retry-After: each pause is longer
        self._said_at = -math.inf
        self._requests, self._tokens = limiter(limits.requests_per_minute), limiter(limits.tokens_per_minute)
        base = urlsplit(target.url)
        query = f"?{base.query}" if base.query else ""
        self._url = f"{base.scheme}://{base.netloc}{base.path.rstrip('/')}/chat/completions{query}"
        headers = {"content-type": "application/json", "user-agent": f"tatar-dist/{__version__}"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        # A client a slot: httpx looks through all connections of a client at every request, which with 64 of them
        # costs more than sending an image.
        self._options: dict[str, Any] = {
            "headers": headers,
            "timeout": httpx.Timeout(target.timeout_s, connect=min(CONNECT_S, target.timeout_s), pool=None),
            "limits": httpx.Limits(max_connections=1, max_keepalive_connections=1),
            "follow_redirects": False,
            "trust_env": not _is_loopback(target.url),  # a proxy has no business between us and this machine
            "verify": httpx.create_ssl_context(),
        }
        self._clients: list[httpx.AsyncClient] = []
        self._idle: list[httpx.AsyncClient] = []

    @contextlib.contextmanager
    def _client(self) -> Iterator[httpx.AsyncClient]:
        """Borrow an HTTP client for exclusive use, reusing its open connection."""
        if not self._idle:
            self._clients.append(httpx.AsyncClient(**self._options))
            self._idle.append(self._clients[-1])
        client = self._idle.pop()
        try:
            yield client
        finally:
            self._idle.append(client)

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()

    async def ask(
        self, request: Request, picture: Picture | None, on_lost: Callable[[], Awaitable[None]] | None = None
    ) -> Answer:
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
        self, request: Request, picture: Picture | None, on_lost: Callable[[], Awaitable[None]] | None
    ) -> Answer:
        limits, began, counted = self.limits, time.monotonic(), 0

        def give_up(state: RetryCallState) -> bool:
            return counted > limits.retries or time.monotonic() - began > limits.give_up_s

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            assert isinstance(error, TryAgain)
            if error.limited:  # all pause together (_pause); a little apart afterwards
                return random.uniform(0, limits.backoff_s)
            longest = min(limits.backoff_max_s, limits.backoff_s * 2 ** (counted - 1))
            return max(random.uniform(longest / 2, longest), min(error.retry_after or 0.0, RETRY_AFTER_MAX))

        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(TryAgain), stop=give_up, wait=wait, reraise=True
        ):
            with attempt:
                if attempt.retry_state.attempt_number > 1:
                    self.retries += 1
                try:
                    return await self._once(request, picture)
                except TryAgain as e:
                    counted += not e.limited
                    if e.limited:
                        self._pause(request, e)
                    if e.lost and on_lost is not None:
                        await on_lost()
                    raise
        raise AssertionError("AsyncRetrying ends by return or by raising")

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
        status, headers, reply = await self._post(request, body_of(request, picture))
        if status != 200:
            raise_for(status, headers, reply, request, self._key)
        return read_answer(reply, bound, request.max_tokens, self._key)

    async def _post(self, request: Request, body: bytes) -> tuple[int, httpx.Headers, bytes]:
        """Make one POST request within `timeout_s` and return (status, headers, body)."""
        seconds, sent = request.target.timeout_s, False
        self.sending += 1
        try:
            async with asyncio.timeout(seconds):  # httpx's own timeouts start anew with every byte
                with self._client() as client:
                    async with client.stream("POST", self._url, content=body) as response:
                        sent = True
                        parts, size = [], 0
                        async for part in response.aiter_bytes():
                            parts.append(part)
                            size += len(part)
                            if size > MAX_REPLY:
                                raise TryAgain(f"the reply is longer than {MAX_REPLY >> 20} MiB", lost=True)
                        return response.status_code, response.headers, b"".join(parts)
        except (httpx.ConnectError, httpx.ConnectTimeout) as e:
            raise TryAgain(f"cannot connect: {str(e) or type(e).__name__}") from None
        except (TimeoutError, httpx.TimeoutException):
            raise TryAgain(f"no whole answer within {seconds:g} s", lost=True) from None
        except httpx.TransportError as e:
            raise TryAgain(f"the connection broke: {str(e) or type(e).__name__}", lost=True) from None
        except httpx.HTTPError as e:  # a reply that cannot be decoded, for example
            raise TryAgain(f"the reply cannot be read: {type(e).__name__}", lost=sent) from None
        except httpx.InvalidURL:
            raise UserError(f"{request.target.key}: not a valid address") from None
        finally:
            self.sending -= 1
