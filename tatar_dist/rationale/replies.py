"""What an endpoint's HTTP reply means: an answer, a reason to try again, a refusal of one sample, the end of the run.

In: status, headers and body. Out: an `Answer`, or an exception that says which of the four it is. Pure; endpoint.py
sends and waits. Whatever of a body reaches an error or the journal has the key cut out of it: some servers echo it.
"""

from __future__ import annotations

import email.utils
import json
import math
import time
from collections.abc import Mapping
from typing import Any

from tatar_dist.errors import UserError
from tatar_dist.rationale.questions import Answer, Request

SAID = 200  # characters of an endpoint's own words in an error


class TryAgain(Exception):
    """This try gave no answer; another may. `limited`: the endpoint asked to slow down (429).

    `lost`: the endpoint may have made tokens for it all the same.
    """

    def __init__(self, says: str, retry_after: float | None = None, limited: bool = False, lost: bool = False) -> None:
        super().__init__(says)
        self.retry_after, self.limited, self.lost = retry_after, limited, lost


class Refused(Exception):
    """The endpoint refuses this one request, whatever the time."""


class NoSchema(Exception):
    """The endpoint does not know response_format with a JSON schema."""


def redact(text: str, key: str | None) -> str:
    """The text without the key, however the endpoint quoted it."""
    if not key:
        return text
    for form in {key, json.dumps(key)[1:-1], key.replace("/", "\\/")}:
        text = text.replace(form, "[key]")
    return text


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
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 40 else None


def read_answer(body: bytes, prompt_bound: int, key: str | None) -> Answer:
    """The answer in the body of a 200. Token counts that it lacks are replaced by upper bounds.

    Raises TryAgain for a body that is not a whole chat completion.
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
    prompt, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    text = redact(content.encode("utf-8", "replace").decode(), key)  # a lone surrogate cannot be written to a file
    return Answer(
        text=text,
        finish=redact(finish, key)[:40],
        prompt_tokens=prompt_bound if prompt is None else prompt,
        completion_tokens=len(text.encode()) if completion is None else completion,
    )


def _no_access(request: Request, status: int, said: str) -> UserError:
    target = request.target
    section = target.key.removesuffix(".url")
    if target.api_key_env:
        todo = f"check the key in the environment variable {target.api_key_env}"
    else:
        todo = f"no key was sent, name the environment variable that holds it as {section}.api_key_env"
    return UserError(f"{target.key}={target.url}: the endpoint refuses access ({status}): {todo} ({said})")


def raise_for(status: int, headers: Mapping[str, str], body: bytes, request: Request, key: str | None) -> None:
    """Raises what a status other than 200 means.

    Raises:
        UserError: no later request can do better: no access, wrong address or model, a redirect.
        TryAgain: 429, 408, 409, 425, 5xx.
        NoSchema: a 400 that speaks of the schema; Refused: any other 4xx.
    """
    said = excerpt(body, key)
    target = request.target
    if status in (401, 403):
        raise _no_access(request, status, said)
    if status == 404:
        raise UserError(
            f"{target.key}={target.url}: nothing there, or no model {target.model!r} (404): check the address (it ends "
            f"like /v1) and the model's name ({said})"
        )
    if 300 <= status < 400:
        raise UserError(f"{target.key}={target.url}: redirects elsewhere ({status}): give the final address")
    if status == 402:
        raise UserError(f"{target.key}={target.url}: the endpoint wants payment (402): {said}")
    if status == 429:
        raise TryAgain(f"429: {said}", retry_after(headers), limited=True)
    if status in (408, 409, 425) or status >= 500:
        raise TryAgain(f"{status}: {said}", retry_after(headers))
    about_schema = ("response_format", "json_schema", "guided", "structured", "grammar", "xgrammar")
    if request.schema is not None and any(word in said.lower() for word in about_schema):
        raise NoSchema(said)
    raise Refused(f"{status}: {said}")
