"""Serve an OpenAI-compatible API on loopback with fixed latency, slots and a log.

The log has for every request when it came and when its answer was sent. The benchmark runs the server as a process of
its own; tests run it in a thread and hand in functions that answer badly. It knows no images and no language.

    python -m tatar_dist.bench.openai_server --latency 0.5     prints its address, then serves until stdin closes;
                                                               GET /log answers with the log as JSON
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import json
import sys
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
    """The body of a chat completion. `usage`: (prompt tokens, completion tokens)."""
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
    """A text or marks that pass: which is seen from what is asked."""
    asked = user_text(call.body)
    for name, marks in MARKS.items():
        if name in asked:
            return Reply(body=completion(json.dumps(marks)))
    return Reply(body=completion(SLOW if "narrative" in asked else FAST))


Answering = Callable[[Call], Reply | Awaitable[Reply]]


class OpenAIServer:
    """Serves on loopback from a thread of its own. Context manager; `url` ends in /v1.

    `log`: dicts with number, seed, arrived, sent (seconds, monotonic; `sent` None while it is out) and status.
    """

    def __init__(self, answer: Answering = good_answer, latency: float = 0.0, slots: int = 1 << 20) -> None:
        self.answer, self.latency, self.slots = answer, latency, slots
        self.log: list[dict[str, Any]] = []
        self.calls: list[Call] = []
        self.keep_calls = True
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
        self._free = asyncio.Semaphore(self.slots)
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
        if first.startswith("GET /log"):
            return await self._send(writer, Reply(body={"log": self.log}))
        if not first.startswith("POST /v1/chat/completions"):
            return await self._send(writer, Reply(404, {"error": {"message": "no such path"}}))
        arrived = time.monotonic()
        body = json.loads(raw)
        call = Call(body, headers, len(self.log))
        entry = {"number": call.number, "seed": body.get("seed"), "arrived": arrived, "sent": None, "status": None}
        self.log.append(entry)
        if self.keep_calls:
            self.calls.append(call)
        async with self._free:
            found = self.answer(call)
            reply = await found if inspect.isawaitable(found) else found
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--slots", type=int, default=1 << 20)
    args = parser.parse_args()
    with OpenAIServer(latency=args.latency, slots=args.slots) as server:
        server.keep_calls = False  # bodies with images would pile up
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
