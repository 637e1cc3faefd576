"""Parse HTTP requests to `/score` into a picture's bytes and scoring options.

There are three ways to send a picture, with the same options (`task`, `n`, `temperature`):

    curl --data-binary @a.jpg 'http://127.0.0.1:8000/score?task=iqa&n=8'           its bytes; options in the query
    curl -F image=@a.jpg -F n=8 http://127.0.0.1:8000/score                        a form, as browsers send it
    {"image": "<base64 or data URL>", "n": 8}                                      JSON

Invalid requests raise `RequestRefused`. Needs neither vLLM nor a model.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated, Any, Literal

from annotated_types import Le
from pydantic import ValidationError
from pydantic.dataclasses import dataclass
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from tatar_dist.config.validate import STRICT_KEYS, AboveZero, AtLeastZero, fault, first
from tatar_dist.types import TASKS, Task

MAX_BYTES = 128 << 20  # of a request: the encoded picture, in base64 at worst
MAX_SAMPLES = 64
MAX_TEMPERATURE = 2.0  # what OpenAI's API allows


class RequestRefused(Exception):
    """Refused request. The message is one line for the sender; `status` is the HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, config=STRICT_KEYS)
class Options:
    """Scoring options. `n`: number of sampled answers beside the greedy one, may be 0."""

    task: Literal["iqa", "iaa", "both"] = "both"
    n: Annotated[AtLeastZero, Le(MAX_SAMPLES)] = 0
    temperature: Annotated[AboveZero, Le(MAX_TEMPERATURE)] = 1.0

    @property
    def tasks(self) -> tuple[Task, ...]:
        return TASKS if self.task == "both" else (self.task,)


async def body_of(receive: Receive) -> bytes:
    """Read a body. Raises RequestRefused (413) above `MAX_BYTES`, ClientDisconnect if cut short."""
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


def replayed(body: bytes, receive: Receive) -> Receive:
    """Make a `receive` that returns an already read body first."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def read(request: Request) -> tuple[bytes, Options]:
    """Read an encoded picture and its options. Raises RequestRefused."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > MAX_BYTES:  # before it is read
        raise RequestRefused(f"the request is larger than {MAX_BYTES >> 20} MiB", 413)
    body = await body_of(request.receive)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    fields: dict[str, Any] = {}
    if kind == "multipart/form-data":
        body, fields = await _form(request, body)
    elif kind == "application/json":
        body, fields = _json(body)
    try:
        options = Options(**{**request.query_params, **fields})
    except ValidationError as e:
        raise RequestRefused(fault(first(e), Options)) from None
    if not body:
        raise RequestRefused("no picture: send its bytes, a form with the file `image`, or JSON with `image` in base64")
    return body, options


async def _form(request: Request, body: bytes) -> tuple[bytes, dict[str, Any]]:
    try:
        form = Request(request.scope, replayed(body, request.receive)).form(max_files=1, max_fields=3)
        async with form as fields:
            image = fields.get("image")
            data = await image.read() if isinstance(image, UploadFile) else b""
            return data, {key: value for key, value in fields.items() if key != "image"}
    except HTTPException as e:
        raise RequestRefused(f"not a form that can be read: {e.detail}") from None


def parsed(body: bytes) -> Any:
    """Parse JSON. Raises ValueError if it is invalid, RequestRefused if it is nested too deeply."""
    try:
        return json.loads(body)
    except RecursionError:
        raise RequestRefused("the JSON is nested too deeply") from None


def _json(body: bytes) -> tuple[bytes, dict[str, Any]]:
    try:
        fields = parsed(body)
    except ValueError as e:
        raise RequestRefused(f"not valid JSON: {e}") from None
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
