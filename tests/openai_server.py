"""Serve an OpenAI-compatible chat API on loopback, with a latency and a log of requests.

Tests hand in functions that answer badly. The server knows no images and no language.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

FAST = (
    "The photograph is mostly clean, but slight noise shows in the dark areas around the main subject of the scene. "
    "Its edges look a little soft towards the corners, while exposure and contrast remain pleasant to the eye."
)
SLOW = (
    "The visual elements come first, with muted colours and a few strong lines that lead the eye gently inward. "
    "The composition places its subject slightly off the centre, so the structure keeps a quiet balance throughout. "
    "Taken as a whole the parts hold together, and nothing in the frame pulls the picture apart for long. "
    "The technical execution is careful, with fitting exposure and sharp focus wherever the story needs it most. "
    "The theme speaks plainly of an ordinary day, and its message reaches whoever looks without much explanation. "
    "There is a calm mood in it, and the viewer leaves with a mild feeling of warmth and rest. "
    "Its originality is modest, since the idea is familiar, though the creative use of light makes it fresh again. "
    "Overall it is a likeable picture whose beauty lies in restraint rather than in any single striking effect."
)
MARKS = {
    "visual_fidelity": {"visual_fidelity": 4, "score_consistency": 5},
    "groundedness": {"groundedness": 4, "cohesion": 4},
}


@dataclass(frozen=True)
class Call:
    """One request as the server saw it."""

    body: dict[str, Any]
    headers: dict[str, str]
    number: int  # from 0, in order of arrival


@dataclass(frozen=True)
class Reply:
    """What goes back. `body`: a dict becomes JSON. `cut`: bytes, then the connection is closed. `delay`: extra."""

    status: int = 200
    body: dict[str, Any] | bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    delay: float = 0.0


def completion(text: str | None, finish: str = "stop", usage: tuple[int, int] | None = None) -> dict[str, Any]:
    """Return the body of a chat completion. `usage`: (prompt tokens, completion tokens)."""
    prompt, made = usage or (100, len((text or "").split()))
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish},
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made},
    }


def user_text(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else next(p["text"] for p in content if p["type"] == "text")


def good_answer(call: Call) -> Reply:
    """Return a text or marks that pass the checks, whichever the request asks for."""
    asked = user_text(call.body)
    for name, marks in MARKS.items():
        if name in asked:
            return Reply(body=completion(json.dumps(marks)))
    return Reply(body=completion(SLOW if "narrative" in asked else FAST))


Answering = Callable[[Call], Reply | Awaitable[Reply]]


class OpenAIServer:
    """Serve on loopback from a thread of its own. Context manager; `url` ends in /v1.

    `log`: dicts with number, seed, arrived, sent (seconds, monotonic; `sent` None while it is out) and status.
    """

    def __init__(self, answer: Answering = good_answer, latency: float = 0.0) -> None:
        self.answer, self.latency = answer, latency
        self.log: list[dict[str, Any]] = []
        self.calls: list[Call] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._tasks: set[asyncio.Task[Any]] = set()

    def __enter__(self) -> OpenAIServer:
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _start(self) -> int:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=1 << 16)
        return int(self._server.sockets[0].getsockname()[1])

    async def _stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while await self._request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone; its request stays in the log without an end
        finally:
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request on an open connection. False when the connection is to be closed."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *rest = head.split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in rest if line)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        if not first.startswith("POST /v1/chat/completions"):
            return await self._send(writer, Reply(404, {"error": {"message": "no such path"}}))
        arrived = time.monotonic()
        body = json.loads(raw)
        call = Call(body, headers, len(self.log))
        entry = {"number": call.number, "seed": body.get("seed"), "arrived": arrived, "sent": None, "status": None}
        self.log.append(entry)
        self.calls.append(call)
        answer = self.answer(call)
        reply = await answer if inspect.isawaitable(answer) else answer
        await asyncio.sleep(max(0.0, self.latency - (time.monotonic() - arrived)) + reply.delay)
        try:
            return await self._send(writer, reply)
        finally:
            entry |= {"sent": time.monotonic(), "status": reply.status}

    async def _send(self, writer: asyncio.StreamWriter, reply: Reply) -> bool:
        data = json.dumps(reply.body).encode() if isinstance(reply.body, dict) else reply.body
        headers = {"content-type": "application/json", "content-length": str(len(data)), **reply.headers}
        lines = [f"HTTP/1.1 {reply.status} OK", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
        writer.write("\r\n".join(lines).encode() + data[: reply.cut])
        await writer.drain()
        return reply.cut is None
