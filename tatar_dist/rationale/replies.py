"""Interpret HTTP replies (no I/O): answer, retry, refusal of one request, or end of the run.

Some servers echo the API key. It is removed from the excerpt of a body in an error message, and an answer that holds a
key of `KEY_CHARS` characters or more is requested again.
"""

from __future__ import annotations

import contextlib
import email.utils
import html
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn
from urllib.parse import quote, quote_plus

from annotated_types import MinLen
from pydantic import TypeAdapter, ValidationError

from tatar_dist.errors import UserError
from tatar_dist.rationale.questions import Answer, Request

EXCERPT_CHARS = 200  # of an endpoint's message in an error
KEY_CHARS = 16  # a shorter key may stand in a text by chance
SANE = 16  # usage beyond so many times our own bound is no count of tokens


@dataclass(eq=False)
class RequestFailed(Exception):
    """A try that got no answer."""

    message: str
    refused: bool = False  # by the endpoint: another try would not help
    limited: bool = False  # the endpoint asks to slow down (429)
    lost: bool = False  # it may have generated tokens nevertheless
    retry_after: float | None = None  # seconds that the endpoint asks to wait

    def __str__(self) -> str:
        return self.message


class NoAccess(UserError):
    """403 or 404: the endpoint refuses all requests, or only this one if it answers others."""


@dataclass(frozen=True)
class _Message:
    content: str | None = None  # None: a teacher that spent all its tokens on reasoning_content


@dataclass(frozen=True)
class _Choice:
    message: _Message
    finish_reason: str


@dataclass(frozen=True)
class _Completion:
    choices: Annotated[list[_Choice], MinLen(1)]
    usage: Any = None


def redact(text: str, key: str | None) -> str:
    """Replace the key in a text, in plain, JSON, HTML or URL quoting."""
    if not key:
        return text
    forms = {key, json.dumps(key)[1:-1], key.replace("/", "\\/"), html.escape(key), html.escape(key, quote=False)}
    forms |= {quote(key), quote(key, safe=""), quote_plus(key)}
    longest_first = [re.escape(form) for form in sorted(forms, key=len, reverse=True)]
    pattern = re.sub("%[0-9A-F]{2}", lambda m: f"(?i:{m[0]})", "|".join(longest_first))  # %2F in either case
    return re.sub(pattern, "[key]", text)


def excerpt(body: bytes, key: str | None) -> str:
    """Return a reply's error in one line: an error object's message, or the start of the body."""
    text = body.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError, AttributeError):  # no JSON, or no object
        content = json.loads(text)
        error = content.get("error", content)
        message = error.get("message") if isinstance(error, dict) else error
        text = message if isinstance(message, str) else text
    return " ".join(redact(text, key).split())[:EXCERPT_CHARS] or "no further words"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of Retry-After, a number or an HTTP date; None if missing or unusable."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError, TypeError):  # a date, but none that the clock can hold
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def read_answer(body: bytes, prompt_bound: int, max_tokens: int, key: str | None) -> Answer:
    """Parse the body of a 200 reply; upper bounds replace missing or implausible token counts.

    Raises RequestFailed if the body is not a whole chat completion, or the text repeats the key.
    """
    try:
        reply = TypeAdapter(_Completion).validate_json(body)
    except ValidationError as e:
        raise RequestFailed(f"the reply is no whole chat completion ({e.errors()[0]['msg']})", lost=True) from None
    choice, usage = reply.choices[0], reply.usage if isinstance(reply.usage, dict) else {}
    text, finish = choice.message.content or "", choice.finish_reason
    if key and len(key) >= KEY_CHARS and any(redact(t, key) != t for t in (text, finish)):
        raise RequestFailed("the answer repeats the key", lost=True)

    def count(name: str, bound: int) -> int:
        value = usage.get(name)
        return value if type(value) is int and 0 <= value <= SANE * bound else bound

    completion_tokens = count("completion_tokens", max(max_tokens, len(text.encode())))
    return Answer(text, finish[:40], count("prompt_tokens", prompt_bound), completion_tokens)


def raise_for(status: int, headers: Mapping[str, str], body: bytes, request: Request, key: str | None) -> NoReturn:
    """Raise the exception for a status other than 200.

    Raises:
        UserError: later requests would fail too: no access, wrong address or model, no quota, a redirect. The subclass
            NoAccess (403, 404) is raised if this may concern one sample only.
        RequestFailed: to be tried again after 429, 408, 409, 425, 5xx; refused with any other status.
    """
    message, section, endpoint = excerpt(body, key), request.kind.section, request.kind.endpoint
    key_problem = f"check the key in the environment variable {endpoint.api_key_env}"
    if not endpoint.api_key_env:
        key_problem = f"no key was sent, name the environment variable that holds it as {section}.api_key_env"
    problem = {
        401: f"the endpoint refuses access: {key_problem}",
        402: "the endpoint wants payment",
        403: f"the endpoint refuses access: {key_problem}",
        404: f"nothing there, or no model {endpoint.model!r}: check address (it ends like /v1) and model name",
        429: "the quota is used up" if b"insufficient_quota" in body else None,
    }.get(status, "redirects elsewhere: give the final address" if 300 <= status < 400 else None)
    if problem:
        error_type = NoAccess if status in (403, 404) else UserError
        raise error_type(f"{section}.url={endpoint.url}: {problem} ({status}: {message})")
    if request.kind.schema and endpoint.structured and status in (400, 422, 500, 501):
        message += f" (if it knows no JSON schema, set {section}.structured=false)"
    raise RequestFailed(
        f"{status}: {message}",
        refused=not (status in (408, 409, 425, 429) or status >= 500),
        limited=status == 429,
        retry_after=retry_after(headers),
    )
