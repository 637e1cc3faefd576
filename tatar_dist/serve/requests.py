"""Parse HTTP requests to `/score` into a picture's bytes and scoring options.

There are three ways to send a picture, with the same options (`task`, `n`, `temperature`):

    curl --data-binary @a.jpg 'http://127.0.0.1:8000/score?task=iqa&n=8'           its bytes; options in the query
    curl -F image=@a.jpg -F n=8 http://127.0.0.1:8000/score                        a form, as browsers send it
    {"image": "<base64 or data URL>", "n": 8}                                      JSON

Invalid requests raise `RequestRefused`. Needs neither vLLM nor a model, only pydantic and Starlette, which come with
vLLM.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from tatar_dist.types import TASKS, Task

MAX_BYTES = 128 << 20  # of a request: the encoded picture, in base64 at worst
MAX_SAMPLES = 64
MAX_TEMPERATURE = 2.0  # what OpenAI's API allows


class RequestRefused(Exception):
    """Refused request. The message is one line for the sender; `status` is the HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Options(BaseModel):
    """Scoring options. `n`: number of sampled answers beside the greedy one, may be 0."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)
    task: Literal["iqa", "iaa", "both"] = "both"
    n: int = Field(0, ge=0, le=MAX_SAMPLES)
    temperature: float = Field(1.0, gt=0, le=MAX_TEMPERATURE)

    @field_validator("n", "temperature", mode="before")
    @classmethod
    def _no_bool(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise PydanticCustomError("bool", "should be a number")
        return value

    @property
    def tasks(self) -> tuple[Task, ...]:
        return TASKS if self.task == "both" else (self.task,)


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


async def read(request: Request) -> tuple[bytes, Options]:
    """Read an encoded picture and its options.

    Raises RequestRefused: no picture, a malformed body, an unknown or out-of-range option.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > MAX_BYTES:
        raise RequestRefused(f"the request is larger than {MAX_BYTES >> 20} MiB", 413)
    body = await body_of(request.receive)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    fields: dict[str, Any] = {}
    if kind == "multipart/form-data":
        body, fields = await _form(request, body)
    elif kind == "application/json":
        body, fields = _json(body)
    try:
        options = Options.model_validate({**request.query_params, **fields})
    except ValidationError as e:
        raise RequestRefused(_problem(e)) from None
    if not body:
        raise RequestRefused(
            "no picture: send its bytes, a form with the field `image`, or JSON with `image` in base64"
        )
    return body, options


async def _form(request: Request, body: bytes) -> tuple[bytes, dict[str, Any]]:
    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, replay).form(max_files=1, max_fields=len(Options.model_fields)) as form:
            fields: dict[str, Any] = dict(form)
            image = fields.pop("image", b"")
            data = await image.read() if isinstance(image, UploadFile) else b""
            if isinstance(image, UploadFile) and not data:
                raise RequestRefused("image: the file is empty")
            return data, {k: "a file" if isinstance(v, UploadFile) else v for k, v in fields.items()}
    except HTTPException as e:
        raise RequestRefused(f"not a form that can be read: {e.detail}") from None


def parsed(body: bytes) -> Any:
    """Parse JSON. Raises ValueError if it is invalid and RequestRefused if it is nested too deeply."""
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


def _problem(error: ValidationError) -> str:
    """Format the first problem with the options as one line."""
    problem = error.errors(include_url=False)[0]
    key = _brief(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        return f"{key}: no such option; there are {', '.join(Options.model_fields)}"
    return f"{key}={_brief(problem['input'])}: {problem['msg'].lower().removeprefix('input ')}"


def _brief(given: Any) -> str:
    """Shorten a value from the request to 40 characters of one line, for messages."""
    return " ".join(str(given).split())[:40]
