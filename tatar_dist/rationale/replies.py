"""Interpret an endpoint's HTTP reply: answer, retry, refusal of one request, or end of the run.

`read_answer` and `raise_for` take status, headers and body, and return an `Answer` or raise the exception for the case.
They do no I/O; endpoint.py sends and waits. Some servers echo the API key. It is removed from the excerpt of a body in
an error message, and an answer that holds a key of `KEY_CHARS` characters or more is requested again.
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
from typing import Any, NoReturn
from urllib.parse import quote, quote_plus

from tatar_dist.errors import UserError
from tatar_dist.rationale.questions import Answer, Request

EXCERPT_CHARS = 200  # of an endpoint's message in an error
KEY_CHARS = 16  # a shorter key may stand in a text by chance
SANE = 16  # usage beyond so many times our own bound is no count of tokens
SCHEMA_WORDS = ("response_format", "response format", "json_schema", "guided", "structured", "grammar")


class TryAgain(Exception):
    """This try gave no answer, but another may. `limited`: the endpoint asked to slow down (429).

    `lost`: the endpoint may have generated tokens for it nevertheless.
    """

    def __init__(self, says: str, retry_after: float | None = None, limited: bool = False, lost: bool = False) -> None:
        super().__init__(says)
        self.retry_after, self.limited, self.lost = retry_after, limited, lost


class ReplyRefused(Exception):
    """The endpoint refuses this one request; a retry would not help."""


class NoAccess(UserError):
    """403 or 404: the endpoint refuses all requests, or only this one if it answers others."""


class NoSchema(Exception):
    """The endpoint may not support JSON schemas in response_format. `otherwise`: the error to raise if it does."""

    def __init__(self, says: str, otherwise: Exception) -> None:
        super().__init__(says)
        self.otherwise = otherwise


def redact(text: str, key: str | None) -> str:
    """Replace the key in a text, in plain, JSON, HTML or URL quoting."""
    if not key:
        return text
    forms = {key, json.dumps(key)[1:-1], key.replace("/", "\\/"), html.escape(key), quote(key), quote(key, safe="")}
    forms |= {quote_plus(key), html.escape(key, quote=False)}
    # the hexadecimal digits of %2F come in either case
    parts = (
        re.sub("%[0-9A-F]{2}", lambda m: f"(?i:{m[0]})", re.escape(f)) for f in sorted(forms, key=len, reverse=True)
    )
    return re.sub("|".join(parts), "[key]", text)


def excerpt(body: bytes, key: str | None) -> str:
    """Error text of a reply in one line: the message of an error object, or the beginning of the body."""
    text = body.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, RecursionError, AttributeError):  # no JSON, or no object
        content = json.loads(text)
        error = content.get("error", content)
        message = error.get("message") if isinstance(error, dict) else error
        text = message if isinstance(message, str) else text
    return " ".join(redact(text, key).split())[:EXCERPT_CHARS] or "no further words"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait from the Retry-After header, a number or an HTTP date; None if missing or unusable."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError, TypeError):  # a date, but none that the clock can hold
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _count(value: Any, bound: int) -> int:
    """The endpoint's token count, or our own bound if that is missing or implausible."""
    return value if type(value) is int and 0 <= value <= SANE * bound else bound


def read_answer(body: bytes, prompt_bound: int, max_tokens: int, key: str | None) -> Answer:
    """Parse the body of a 200 reply. Missing token counts are replaced by upper bounds.

    Raises TryAgain if the body is not a complete chat completion, or the text repeats the key.
    """
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        content, finish = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, RecursionError):
        raise TryAgain("the reply is not JSON, or cut off", lost=True) from None
    except (KeyError, IndexError, TypeError, AttributeError):
        raise TryAgain("the reply holds no choices[0].message", lost=True) from None
    if content is None:
        content = ""  # a teacher that spent all its tokens on reasoning_content
    if not isinstance(content, str):
        raise TryAgain("the message's content is not text", lost=True)
    if not isinstance(finish, str):
        raise TryAgain("the reply holds no finish_reason", lost=True)
    usage = reply.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    text, finish = (t.encode("utf-8", "replace").decode() for t in (content, finish))  # lone surrogates are unwritable
    if key and len(key) >= KEY_CHARS and any(redact(t, key) != t for t in (text, finish)):
        raise TryAgain("the answer repeats the key", lost=True)
    return Answer(
        text=text,
        finish=finish[:40],
        prompt_tokens=_count(usage.get("prompt_tokens"), prompt_bound),
        completion_tokens=_count(usage.get("completion_tokens"), max(max_tokens, len(text.encode()))),
    )


def raise_for(status: int, headers: Mapping[str, str], body: bytes, request: Request, key: str | None) -> NoReturn:
    """Raise the exception for a status other than 200.

    Raises:
        UserError: later requests would fail too: no access, wrong address or model, no quota, a redirect. The subclass
            NoAccess (403, 404) is raised if this may concern one sample only.
        TryAgain: 429, 408, 409, 425, 5xx. ReplyRefused: any other status.
        NoSchema: a request with a schema may have been refused, or have failed, because of the schema.
    """
    message, target = excerpt(body, key), request.target
    where = f"{target.key}={target.url}"
    if status in (401, 403):
        todo = f"check the key in the environment variable {target.api_key_env}"
        if not target.api_key_env:
            section = target.key.removesuffix(".url")
            todo = f"no key was sent, name the environment variable that holds it as {section}.api_key_env"
        error_type = UserError if status == 401 else NoAccess
        raise error_type(f"{where}: the endpoint refuses access ({status}): {todo} ({message})")
    if status == 404:
        raise NoAccess(
            f"{where}: nothing there, or no model {target.model!r} (404): check the address (it ends like /v1) and the "
            f"model's name ({message})"
        )
    if 300 <= status < 400:
        raise UserError(f"{where}: redirects elsewhere ({status}): give the final address")
    if status == 402:
        raise UserError(f"{where}: the endpoint wants payment (402): {message}")
    if status == 429:
        if b"insufficient_quota" in body:
            raise UserError(f"{where}: the quota is used up (429): {message}")
        raise TryAgain(f"429: {message}", retry_after(headers), limited=True)
    again = status in (408, 409, 425) or status >= 500
    error = TryAgain(f"{status}: {message}", retry_after(headers)) if again else ReplyRefused(f"{status}: {message}")
    by_schema = status in (400, 422, 501) or (status == 500 and any(word in message.lower() for word in SCHEMA_WORDS))
    if request.schema is not None and by_schema:
        raise NoSchema(message, error)
    raise error
