"""Parse HTTP requests to `/score` into a picture's bytes and scoring options.

There are three ways to send a picture, with the same options (`task`, `n`, `temperature`):

    curl --data-binary @a.jpg 'http://127.0.0.1:8000/score?task=iqa&n=8'           its bytes; options in the query
    curl -F image=@a.jpg -F n=8 http://127.0.0.1:8000/score                        a form, as browsers send it
    {"image": "<base64 or data URL>", "n": 8}                                      JSON

Invalid requests raise `RequestRefused`. Needs neither vLLM nor a model, only Starlette, which comes with vLLM.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from tatar_dist.types import TASKS, Task

MAX_BYTES = 128 << 20  # of a request: the encoded picture, in base64 at worst
MAX_SAMPLES = 64
MAX_TEMPERATURE = 2.0  # what OpenAI's API allows
OPTIONS = ("task", "n", "temperature")
NESTED = "the JSON is nested too deeply"


class RequestRefused(Exception):
    """Refused request. The message is one line for the sender; `status` is the HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ScoreRequest:
    """One encoded picture and its scoring options. `n`: number of sampled answers beside the greedy one, may be 0."""

    image: bytes
    tasks: tuple[Task, ...]
    n: int
    temperature: float


async def body_of(receive: Receive) -> bytes:
    """Read the whole body of a request.

    Raises RequestRefused (413) beyond `MAX_BYTES` and ClientDisconnect if the client has disconnected.
    """
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > MAX_BYTES:
            raise RequestRefused(f"the request is larger than {MAX_BYTES >> 20} MiB", 413)
    return b"".join(parts)


async def read(request: Request) -> ScoreRequest:
    """Parse a request. Raises RequestRefused: no picture, a malformed body, an unknown or out-of-range option."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > MAX_BYTES:
        raise RequestRefused(f"the request is larger than {MAX_BYTES >> 20} MiB", 413)
    body = await body_of(request.receive)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    options: dict[str, Any] = dict(request.query_params)
    if kind == "multipart/form-data":
        image, fields = await _form(request, body)
    elif kind == "application/json":
        image, fields = _json(body)
    else:
        image, fields = body, {}
    options |= fields
    for key in options:
        if key not in OPTIONS:
            raise RequestRefused(f"{_brief(key)}: no such option; there are {', '.join(OPTIONS)}")
    if not image:
        raise RequestRefused(
            "no picture: send its bytes, a form with the field `image`, or JSON with `image` in base64"
        )
    return ScoreRequest(image, *_checked(options))


async def _form(request: Request, body: bytes) -> tuple[bytes, dict[str, Any]]:
    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, replay).form(max_files=1, max_fields=len(OPTIONS)) as form:
            fields: dict[str, Any] = dict(form)
            image = fields.pop("image", b"")
            found = await image.read() if isinstance(image, UploadFile) else b""
            if isinstance(image, UploadFile) and not found:
                raise RequestRefused("image: the file is empty")
            return found, {k: "a file" if isinstance(v, UploadFile) else v for k, v in fields.items()}
    except HTTPException as e:
        raise RequestRefused(f"not a form that can be read: {e.detail}") from None


def _json(body: bytes) -> tuple[bytes, dict[str, Any]]:
    try:
        fields = json.loads(body)
    except ValueError as e:
        raise RequestRefused(f"not valid JSON: {e}") from None
    except RecursionError:
        raise RequestRefused(NESTED) from None
    if not isinstance(fields, dict) or not isinstance(fields.get("image"), str):
        raise RequestRefused("expected a JSON object with `image`, a picture in base64")
    return from_base64(fields.pop("image")), fields


def from_base64(text: str) -> bytes:
    """Decode a base64 text or a `data:…;base64,` URL. Raises RequestRefused."""
    head, comma, rest = text.partition(",") if text.startswith("data:") else ("", "", text)
    if head and not (comma and head.endswith(";base64")):
        raise RequestRefused("image: a data URL without `;base64,`")
    try:
        return base64.b64decode("".join(rest.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestRefused("image: not valid base64") from None


def _checked(options: Mapping[str, Any]) -> tuple[tuple[Task, ...], int, float]:
    task = options.get("task", "both")
    if task not in (*TASKS, "both"):
        raise RequestRefused(f"task={_brief(task)}: must be one of {', '.join(TASKS)}, both")
    n, temperature = _number(options, "n", 0), _number(options, "temperature", 1.0)
    if not (n == int(n) and 0 <= n <= MAX_SAMPLES):
        raise RequestRefused(f"n={n:g}: must be a whole number from 0 to {MAX_SAMPLES}")
    if not 0 < temperature <= MAX_TEMPERATURE:
        raise RequestRefused(
            f"temperature={temperature:g}: must be above 0, up to {MAX_TEMPERATURE:g} (the score is greedy anyway)"
        )
    return TASKS if task == "both" else (task,), int(n), temperature


def _number(options: Mapping[str, Any], key: str, default: float) -> float:
    given = options.get(key, default)
    try:
        found = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):  # a whole number may be larger than any float
        found = math.nan
    if not math.isfinite(found):
        raise RequestRefused(f"{key}={_brief(given)}: must be a number")
    return found


def _brief(given: Any) -> str:
    """Shorten a value from the request to 40 characters of one line, for messages."""
    return " ".join(str(given).split())[:40]
