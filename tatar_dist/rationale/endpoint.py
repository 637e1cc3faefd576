"""Client for an OpenAI-compatible endpoint, with rate limits, retries and redaction.

The library, one `openai.AsyncOpenAI`, sends one try. Retries are made here, because a lost try is booked on the token
budget before the next, and a 429 pauses all slots for its Retry-After. Errors such as missing access end the run. The
key comes from the environment variable in the settings and is sent in one header; `OPENAI_*` variables have no effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from aiolimiter import AsyncLimiter

from tatar_dist import __version__
from tatar_dist.config.rationale import LimitsConfig
from tatar_dist.errors import RunError, UserError
from tatar_dist.rationale.questions import Answer, Kind, Request
from tatar_dist.rationale.replies import NoAccess, RequestFailed, raise_for, read_answer
from tatar_dist.rationale.rows import Picture

MAX_REPLY = 4 << 20  # bytes; a longer reply is garbage
CONNECT_S = 10.0
WINDOW_S = 2.0  # of a rate limit: bursts of two seconds' worth, then evenly
POLL_S = 0.05
SAY_EVERY_S = 15.0  # an endpoint that asks for pauses is quoted no more often
RETRY_AFTER_MAX = 900.0  # a Retry-After beyond this is taken as this
READ_BACK = "x-stainless-raw-response"  # the only header of the library that stays: it reads it from the request

# sends a request once, and returns what it was answered
Send = Callable[[], Awaitable[Answer]]
Attempt = Callable[[Send], Awaitable[None]]


class Stopped(Exception):
    """The run is being stopped, or its budget is spent; no further request is sent."""


def tokens_bound(request: Request, picture: Picture | None) -> int:
    """Bound the prompt's tokens: at most one per byte, 64 for the chat template, the picture's."""
    return len(request.system.encode()) + len(request.user.encode()) + 64 + (picture.tokens if picture else 0)


def body_of(request: Request, picture: Picture | None) -> dict[str, Any]:
    """Return the body of a chat completion."""
    content: Any = request.user
    if picture is not None:
        content = [{"type": "image_url", "image_url": {"url": picture.url}}, {"type": "text", "text": request.user}]
    body: dict[str, Any] = {
        "model": request.kind.endpoint.model,
        "messages": [{"role": "system", "content": request.system}, {"role": "user", "content": content}],
        "temperature": request.kind.sampling.temperature,
        "top_p": request.kind.sampling.top_p,
        "max_tokens": request.kind.max_tokens,
        "seed": request.seed,
    }
    if request.kind.schema is not None and request.kind.endpoint.structured:
        schema = {"name": "marks", "strict": True, "schema": request.kind.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def key_of(kind: Kind) -> str | None:
    """Return the API key in the environment. Raises UserError if unset or no valid header value."""
    name = kind.endpoint.api_key_env
    if not name:
        return None
    key = os.environ.get(name, "").strip()
    if not (key and key.isascii() and key.isprintable() and " " not in key):
        problem = "holds characters that no key has" if key else "is not set"
        raise UserError(f"{kind.section}.api_key_env={name}: this environment variable {problem}")
    return key


def limiter(per_minute: float) -> AsyncLimiter | None:
    """Return a limiter, None for 0. Burst and steady rate stay in `per_minute` for any minute."""
    if not per_minute:
        return None
    per_window = per_minute * WINDOW_S / (60 + WINDOW_S)
    return AsyncLimiter(per_window, WINDOW_S) if per_window >= 1 else AsyncLimiter(1, 60 / per_minute)


class Endpoint:
    """Client for the address and key of `kind`. Call `close` when done.

    Args:
        say: receives messages for the user.
        stop: once set, whoever waits or would send a request raises Stopped.
    """

    def __init__(self, kind: Kind, limits: LimitsConfig, say: Callable[[str], None], stop: asyncio.Event) -> None:
        self.limits, self.say, self._stop = limits, say, stop
        self._url = kind.endpoint.url
        self._name = f"{kind.section}.url={self._url}"
        self._timeout_s = kind.endpoint.timeout_s
        self._key = key_of(kind)
        self._client = self._open()
        self._answered = False
        self._asking = self._undecided = 0  # calls of `ask`; those of them that wait for what a 403 or 404 means
        self._failures = 0  # given up since the last answer
        self._resume_at = 0.0  # monotonic; before it nobody asks
        self._pauses = 0  # 429s since the last answer, without a Retry-After: each pause is longer
        self._said_at = -math.inf
        self._requests, self._tokens = limiter(limits.requests_per_minute), limiter(limits.tokens_per_minute)

    def _open(self) -> Any:
        """Return an `openai.AsyncOpenAI` that sends to our address with our key alone."""
        from openai import DEFAULT_CONNECTION_LIMITS, AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

        json_type = "application/json"
        headers = {"user-agent": f"tatar-dist/{__version__}", "accept": json_type, "content-type": json_type}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"

        async def set_headers(request: Any) -> None:
            """Replace the library's headers (of OPENAI_* variables and of this machine) with ours."""
            kept = {READ_BACK: request.headers[READ_BACK]} if READ_BACK in request.headers else {}
            for name in set(request.headers):
                del request.headers[name]
            body = {"host": address.netloc, "content-length": str(len(request.content))}
            request.headers.update(headers | body | kept)

        address = urlsplit(self._url)
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
            timeout=Timeout(self._timeout_s, connect=min(CONNECT_S, self._timeout_s), pool=None),
            max_retries=0,
            http_client=http_client,
        )

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, request: Request, picture: Picture | None, attempt: Attempt) -> None:
        """Have a request answered. `attempt` is called with what sends it, once for every try.

        Raises:
            RequestFailed: all tries failed, or the endpoint refuses this request. Stopped: see the class.
            UserError: no access, no such model, a wrong address. RunError: too many failures in a row.
        """
        self._asking += 1
        try:
            await self._with_retries(request, picture, attempt)
        except NoAccess as e:
            if not await self._others_answered():
                raise
            raise RequestFailed(str(e), refused=True) from None
        except RequestFailed as e:
            if not (e.refused and self._answered):  # else it is about this sample, and others are answered
                self._failures += 1
            if self._failures >= self.limits.failures_in_a_row:
                raise RunError(
                    f"{self._name}: {self.limits.failures_in_a_row} requests in a row got no answer, the last: {e}; "
                    "what was answered is kept, the same command goes on from there"
                ) from None
            raise
        finally:
            self._asking -= 1
        self._answered = True
        self._failures = self._pauses = 0

    async def _others_answered(self) -> bool:
        """Return whether this endpoint has answered any request; wait while others may be answered."""
        self._undecided += 1
        try:
            while not self._answered and self._undecided < self._asking:
                await self._sleep(POLL_S)
        finally:
            self._undecided -= 1
        return self._answered

    async def _with_retries(self, request: Request, picture: Picture | None, attempt: Attempt) -> None:
        """Try until an answer, an error that no retry cures, or the last retry (raises its failure)."""
        began, failures, limits = time.monotonic(), 0, self.limits
        while True:
            try:
                return await attempt(lambda: self._once(request, picture))
            except RequestFailed as e:
                if e.limited:  # all slots pause together; spread them a little afterwards
                    self._pause(e)
                    delay = random.uniform(0, limits.backoff_s)
                else:
                    failures += 1
                    longest = min(limits.backoff_max_s, limits.backoff_s * 2 ** (failures - 1))
                    delay = max(random.uniform(longest / 2, longest), min(e.retry_after or 0.0, RETRY_AFTER_MAX))
                if e.refused or failures > limits.retries or time.monotonic() - began > limits.give_up_s:
                    raise
            await self._sleep(delay)

    def _pause(self, error: RequestFailed) -> None:
        """Pause all requests for the error's Retry-After, else for a time that doubles each pause."""
        now, seconds = time.monotonic(), error.retry_after
        if seconds is None:
            if now < self._resume_at:
                return  # asked before the pause that another slot began: the same event
            seconds = min(self.limits.backoff_max_s, self.limits.backoff_s * 2**self._pauses)
            self._pauses = min(self._pauses + 1, 20)
        self._resume_at = max(self._resume_at, now + min(seconds, RETRY_AFTER_MAX))
        if now - self._said_at >= SAY_EVERY_S:
            self._said_at = now
            left = self._resume_at - now
            self.say(f"{self._url} asks us to slow down: nothing is asked for {left:.0f} s ({error})")

    async def _sleep(self, seconds: float) -> None:
        """Sleep, not at all if `seconds` is negative. Raises Stopped as soon as the run is stopped."""
        with contextlib.suppress(TimeoutError):
            if seconds > 0:
                await asyncio.wait_for(self._stop.wait(), seconds)
        if self._stop.is_set():
            raise Stopped

    async def _turn(self, bound: int) -> None:
        """Wait for the shared pause, then the rate limits: an earlier turn would add to the burst."""
        while True:
            await self._sleep(self._resume_at - time.monotonic())
            await self._acquire(self._tokens, bound)
            await self._acquire(self._requests, 1)
            if time.monotonic() >= self._resume_at:
                return

    async def _acquire(self, limit: AsyncLimiter | None, amount: float) -> None:
        """Acquire `amount` from the limiter, in parts if it exceeds one burst."""
        while limit is not None and amount > 0:
            part = min(amount, limit.max_rate)
            while not limit.has_capacity(part):
                await self._sleep(POLL_S)
            await limit.acquire(part)
            amount -= part

    async def _once(self, request: Request, picture: Picture | None) -> Answer:
        """Make one HTTP request within the endpoint's `timeout_s`, when its turn has come."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        bound = tokens_bound(request, picture)
        await self._turn(bound + request.kind.max_tokens)
        body = body_of(request, picture)
        try:
            async with asyncio.timeout(self._timeout_s):  # the library's own timeouts start anew with every byte
                reply = await self._client.chat.completions.with_raw_response.create(**body)
        except APIStatusError as e:
            raise_for(e.status_code, e.response.headers, e.response.content, request, self._key)
        except (APIConnectionError, TimeoutError) as e:
            cause = type(e.__cause__).__name__  # by name: the HTTP library below openai depends on its version
            if cause in ("ConnectError", "ConnectTimeout"):
                raise RequestFailed(f"cannot connect: {e.__cause__ or cause}") from None
            problem = f"the connection broke: {e.__cause__ or cause}"
            if isinstance(e, APITimeoutError | TimeoutError):
                problem = f"no whole answer within {self._timeout_s:g} s"
            raise RequestFailed(problem, lost=True) from None
        if len(reply.content) > MAX_REPLY:  # read whole by then: this bounds what is parsed and kept, not the memory
            raise RequestFailed(f"the reply is longer than {MAX_REPLY >> 20} MiB", lost=True)
        return read_answer(reply.content, bound, request.kind.max_tokens, self._key)
