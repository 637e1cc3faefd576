"""What an endpoint's HTTP reply means: an answer, a reason to try again, a refusal of one sample, the end of the run.

In: status, headers and body. Out: an `Answer`, or an exception that says which of the four it is. Pure; endpoint.py
sends and waits. Some servers echo the key: it is cut out of what an error repeats of a body, and a text that holds it
is asked again.
"""

from __future__ import annotations

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

SAID = 200  # characters of an endpoint's own words in an error
KEY_CHARS = 16  # a shorter key may stand in a text by chance
SANE = 16  # usage beyond so many times our own bound is no count of tokens
SCHEMA_WORDS = ("response_format", "response format", "json_schema", "guided", "structured", "grammar")


class TryAgain(Exception):
    """This try gave no answer; another may. `limited`: the endpoint asked to slow down (429).

    `lost`: the endpoint may have made tokens for it all the same.
    """

    def __init__(self, says: str, retry_after: float | None = None, limited: bool = False, lost: bool = False) -> None:
        super().__init__(says)
        self.retry_after, self.limited, self.lost = retry_after, limited, lost


class ReplyRefused(Exception):
    """The endpoint refuses this one request, whatever the time."""


class NoAccess(UserError):
    """403 or 404: all requests are in vain, or this one alone where others are answered."""


class NoSchema(Exception):
    """The endpoint may not know response_format with a JSON schema. `otherwise`: what it means if it does know it."""

    def __init__(self, says: str, otherwise: Exception) -> None:
        super().__init__(says)
        self.otherwise = otherwise


def redact(text: str, key: str | None) -> str:
    """The text without the key, however the endpoint quoted it."""
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
    """The endpoint's own words in one line: the message of an error object, or the body's beginning."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        error = found.get("error", found)
        message = error.get("message") if isinstance(error, dict) else error
        text = message if isinstance(message, str) else text
    return " ".join(redact(text, key).split())[:SAID] or "no further words"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait by the Retry-After header, a number or an HTTP date; None without a usable one."""
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
    """Tokens as the endpoint counts them; our own bound where it does not, or where the count cannot be."""
    return value if type(value) is int and 0 <= value <= SANE * bound else bound


def read_answer(body: bytes, prompt_bound: int, max_tokens: int, key: str | None) -> Answer:
    """The answer in the body of a 200. Token counts that it lacks are replaced by upper bounds.

    Raises TryAgain for a body that is not a whole chat completion, or a text that repeats the key.
    """
    try:
        found = json.loads(body)
        choice = found["choices"][0]
        content, finish = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, RecursionError):
        raise TryAgain("the reply is not JSON, or cut off", lost=True) from None
    except (KeyError, IndexError, TypeError, AttributeError):
        raise TryAgain("the reply holds no choices[0].message", lost=True) from None
    if content is None:
        content = ""  # a teacher that spent all its tokens on reasoning_content
    if not isinstance(content, str):
        raise TryAgain("the message's content is no text", lost=True)
    if not isinstance(finish, str):
        raise TryAgain("the reply holds no finish_reason", lost=True)
    usage = found.get("usage")
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


def _no_access(request: Request, status: int, said: str) -> str:
    target = request.target
    section = target.key.removesuffix(".url")
    if target.api_key_env:
        todo = f"check the key in the environment variable {target.api_key_env}"
    else:
        todo = f"no key was sent, name the environment variable that holds it as {section}.api_key_env"
    return f"{target.key}={target.url}: the endpoint refuses access ({status}): {todo} ({said})"


def raise_for(status: int, headers: Mapping[str, str], body: bytes, request: Request, key: str | None) -> NoReturn:
    """Raises what a status other than 200 means.

    Raises:
        UserError: no later request can do better: no access, wrong address or model, no quota, a redirect. It is a
            NoAccess where that may be so for this sample alone.
        TryAgain: 429, 408, 409, 425, 5xx. ReplyRefused: any other 4xx.
        NoSchema: where a request with a schema may be refused, or fail, because of it.
    """
    said = excerpt(body, key)
    target = request.target
    if status == 401:
        raise UserError(_no_access(request, status, said))
    if status == 403:
        raise NoAccess(_no_access(request, status, said))
    if status == 404:
        raise NoAccess(
            f"{target.key}={target.url}: nothing there, or no model {target.model!r} (404): check the address (it ends "
            f"like /v1) and the model's name ({said})"
        )
    if 300 <= status < 400:
        raise UserError(f"{target.key}={target.url}: redirects elsewhere ({status}): give the final address")
    if status == 402:
        raise UserError(f"{target.key}={target.url}: the endpoint wants payment (402): {said}")
    if status == 429 and b"insufficient_quota" in body:
        raise UserError(f"{target.key}={target.url}: the quota is used up (429): {said}")
    if status == 429:
        raise TryAgain(f"429: {said}", retry_after(headers), limited=True)
    again = status in (408, 409, 425) or status >= 500
    error = TryAgain(f"{status}: {said}", retry_after(headers)) if again else ReplyRefused(f"{status}: {said}")
    of_schema = status in (400, 422, 501) or (status == 500 and any(word in said.lower() for word in SCHEMA_WORDS))
    if request.schema is not None and of_schema:
        raise NoSchema(said, error)
    raise error
