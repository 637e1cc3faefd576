"""ASGI middleware in front of vLLM's app.

`/` is a page, `/score` scores a picture, and chat requests to `iqa` and `iaa` get our prompts. Other requests pass
unchanged. vLLM imports `Front` by its path (`--middleware`) and passes it only the app; other settings are read from
the server's arguments, `app.state.args` (see `_args`). `/score` calls vLLM's own `/v1/chat/completions` in this process
with the caller's key, so that the same callers are allowed.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Any

import httpx
from jinja2 import Environment, PackageLoader
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tatar_dist.serve import chat, requests
from tatar_dist.serve.requests import Options, RequestRefused
from tatar_dist.types import TASKS, Task

CHAT = "/v1/chat/completions"
OPEN = ("/", "/health")  # without a key: the page, which asks for it, and the health check of load balancers
# A large picture takes 4 GB while it is decoded, so they wait for each other.
DECODING = 2
PAGES = Environment(loader=PackageLoader("tatar_dist.serve", "."), autoescape=True, trim_blocks=True)
POLICY = (
    "default-src 'none'; img-src blob: data:; connect-src 'self'; script-src 'nonce-{nonce}'; "
    "style-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Front:
    """Outermost ASGI middleware of vLLM's app."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._decoding = asyncio.Semaphore(DECODING)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, _announcing(scope, send) if scope["type"] == "lifespan" else send)
            return
        try:
            await self._http(scope, receive, send)
        except RequestRefused as e:
            await _error(e)(scope, receive, send)
        except ClientDisconnect:
            pass  # nobody waits for a reply

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if path == "/" and method in ("GET", "HEAD"):
            await _page(scope)(scope, receive, send)
            return
        # vLLM's key guards /v1 only; /invocations answers chat requests, too
        if path not in OPEN and _args(scope).api_key and method != "OPTIONS":
            _check_key(scope)
        if path == "/score":
            if method != "POST":
                raise RequestRefused("/score: POST a picture to it", 405)
            picture, options = await requests.read(Request(scope, receive))
            async with self._decoding:
                url = await asyncio.to_thread(chat.picture_url, picture)
            answers = [self._task(scope, receive, task, url, options) for task in options.tasks]
            reply = JSONResponse(dict(zip(options.tasks, await asyncio.gather(*answers), strict=True)))
            await reply(scope, receive, send)
        elif path == CHAT and method == "POST":
            await self._chat(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _ask(self, scope: Scope, waiting: Receive, body: dict[str, Any]) -> httpx.Response:
        """Send a chat request to vLLM's app for `scope`'s caller; `waiting` tells it if they leave."""

        async def app(inner: Scope, receive: Receive, send: Send) -> None:
            receive = requests.replayed(await requests.body_of(receive), waiting)
            await self.app({**inner, "app": scope["app"]}, receive, send)

        key = Request(scope).headers.get("authorization")
        transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(CHAT, json=body, headers={"authorization": key} if key else {})

    async def _task(self, scope: Scope, receive: Receive, task: Task, url: str, options: Options) -> dict[str, Any]:
        """Get the greedy answer, then the sampled ones, which reuse picture and prompt from caches."""

        async def answers(n: int, temperature: float) -> list[dict[str, Any]]:
            body = chat.request_body(_args(scope).scoring, task, url, n, temperature)
            response = await self._ask(scope, receive, body)
            if response.status_code != 200:
                raise RequestRefused(f"vLLM refused: {_message(response)}", response.status_code)
            completion = response.json()
            if completion is None:  # vLLM's reply after the caller has disconnected
                raise ClientDisconnect
            return [chat.answer(c) for c in sorted(completion["choices"], key=lambda c: c["index"])]

        (greedy,) = await answers(1, 0.0)
        return chat.summary(greedy, await answers(options.n, options.temperature) if options.n else [])

    async def _chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a chat request on, with our prompt if its model is a task."""
        raw = await requests.body_of(receive)
        try:
            body = requests.parsed(raw)
        except ValueError:
            body = None  # vLLM says what is wrong with it
        task = body.get("model") if isinstance(body, dict) else None
        if isinstance(task, str) and task in TASKS:
            async with self._decoding:
                request = await asyncio.to_thread(chat.preset, _args(scope).scoring, task, body)
            raw = json.dumps(request).encode()
            headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", str(len(raw)).encode())]}
        await self.app(scope, requests.replayed(raw, receive), send)


def _args(scope: Scope) -> Any:
    """Return vLLM's server arguments and ours: `scoring`, `shown`, `address`, `serving`, `died`."""
    return scope["app"].state.args


def _check_key(scope: Scope) -> None:
    """Raise RequestRefused (401) unless the request has a key of the server, in vLLM's format."""
    scheme, _, key = Request(scope).headers.get("authorization", "").partition(" ")
    known = [secrets.compare_digest(key.encode(), right.encode()) for right in _args(scope).api_key]
    if scheme.lower() != "bearer" or not any(known):
        raise RequestRefused("the API key is missing or wrong: send it as `Authorization: Bearer KEY`", 401)


def _error(refused: RequestRefused) -> JSONResponse:
    """Return an error response in OpenAI's format, which clients can parse."""
    kinds = {401: "authentication_error", 413: "request_too_large"}
    kind = kinds.get(refused.status, "invalid_request_error" if refused.status < 500 else "server_error")
    return JSONResponse({"error": {"message": str(refused), "type": kind, "code": refused.status}}, refused.status)


def _message(response: httpx.Response) -> str:
    try:
        return " ".join(response.json()["error"]["message"].split())
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {response.status_code}"


def _announcing(scope: Scope, send: Send) -> Send:
    """Wrap the lifespan's `send`: print the address once the app is up, note the engine's end.

    vLLM stops the engine before the lifespan ends at a signal, after it where the engine has died, which sets `died`.
    """
    state = scope["app"].state  # vLLM deletes the attribute at the end

    async def sent(message: Message) -> None:
        args, engine = state.args, state.engine_client
        if message["type"] == "lifespan.shutdown.complete" and args.died is None:
            args.died = True
        await send(message)
        if message["type"] != "lifespan.startup.complete":
            return
        stop = engine.shutdown

        def shutdown(*words: Any, **options: Any) -> None:
            args.died = bool(args.died)  # Ctrl-C may end the engine's process first: that is no death
            stop(*words, **options)

        engine.shutdown = shutdown
        for served in state.openai_serving_models.base_model_paths:  # /v1/models shows it as `root`
            served.model_path = args.shown
        args.serving = True
        print(f"ready: {args.address}", flush=True)

    return sent


def _page(scope: Scope) -> Response:
    args, nonce = _args(scope), secrets.token_urlsafe(16)
    page = PAGES.get_template("page.html.j2").render(
        nonce=nonce,
        model=args.shown,
        key=bool(args.api_key),
        max_bytes=requests.MAX_BYTES,
        max_samples=requests.MAX_SAMPLES,
        max_temperature=requests.MAX_TEMPERATURE,
    )
    headers = {
        "content-security-policy": POLICY.format(nonce=nonce),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }
    return HTMLResponse(page, headers=headers)
