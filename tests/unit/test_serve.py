"""What stands before vLLM's server, on a small real ASGI app: requests read, refused, rewritten or passed on."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import httpx
import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tatar_dist import cli
from tatar_dist.data.images import decode_image
from tatar_dist.prompts.answer import Prompts
from tatar_dist.rollout.options import CPU_ENGINE_ENV
from tatar_dist.scoring.directory import model_config
from tatar_dist.serve import chat, middleware, requests, server
from tatar_dist.serve.chat import Scoring
from tatar_dist.serve.middleware import Front

TINY = Path("tatar_dist/assets/tiny-qwen2_5-vl")
PROMPTS = Prompts.load("configs/prompts.yaml")
SCORING = Scoring("the-model", PROMPTS, (7, 8), 40)
KEY = {"authorization": "Bearer right"}
NESTED = b'{"model": "iqa", "image": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def png(width: int = 40, height: int = 20, orientation: int | None = None) -> bytes:
    """Red on the left, blue on the right, before its EXIF orientation."""
    image, out = Image.new("RGB", (width, height), "red"), io.BytesIO()
    image.paste("blue", (width // 2, 0, width, height))
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(out, "PNG", exif=exif)
    return out.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


async def echo(request: Request) -> JSONResponse:
    """Says what arrived; asks for the key on /v1 only, as vLLM does."""
    if request.url.path.startswith("/v1") and request.headers.get("authorization") != "Bearer right":
        return JSONResponse({"error": "Unauthorized"}, 401)
    return JSONResponse({"path": request.url.path, "body": (await request.body()).decode()})


def client(api_key: list[str] | None = None) -> httpx.AsyncClient:
    app = Starlette(routes=[Route("/{rest:path}", echo, methods=["GET", "POST", "DELETE"])])
    app.state.args = Namespace(scoring=SCORING, shown="<the model>", api_key=api_key)
    app.add_middleware(Front)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost")


def ask(method: str, path: str, api_key: list[str] | None = None, **options) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client(api_key) as c:
            return await c.request(method, path, **options)

    return asyncio.run(run())


def read(**options) -> tuple[bytes, requests.Options]:
    """What `/score` reads from a request that httpx builds."""
    built = httpx.Request("POST", "http://localhost/score", **options)
    body = built.read()

    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [(k.lower(), v) for k, v in built.headers.raw]
    scope = {"type": "http", "method": "POST", "path": "/score", "headers": headers, "query_string": built.url.query}
    return asyncio.run(requests.read(Request(scope, receive)))


def said(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text
    message = response.json()["error"]["message"]
    assert "\n" not in message
    return message


def test_the_three_ways_to_send_a_picture_are_the_same_request():
    options = {"task": "iaa", "n": "4", "temperature": "0.5"}
    expected = (png(), requests.Options(task="iaa", n=4, temperature=0.5))
    assert read(content=png(), params=options) == expected
    assert read(files={"image": ("a.png", png())}, data=options) == expected
    for image in (base64.b64encode(png()).decode(), data_url(png())):
        assert read(json={"image": image, "task": "iaa", "n": 4, "temperature": 0.5}) == expected
    picture, options = read(content=png())
    assert picture == png() and options.tasks == ("iqa", "iaa") and (options.n, options.temperature) == (0, 1.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"params": {"task": "quality"}}, "task='quality': must be one of iqa, iaa, both"),
        ({"params": {"n": "many"}}, "n='many': must be a whole number"),
        ({"params": {"n": "1.5"}}, "n='1.5': must be a whole number"),
        ({"params": {"n": "65"}}, "n='65': must be at most 64"),
        ({"params": {"n": "inf"}}, "n='inf': must be a whole number"),
        ({"params": {"temperature": "0"}}, "temperature='0': must be above 0"),
        ({"params": {"seed": "1"}}, "unknown key 'seed' (known: task, n, temperature)"),
        ({"params": {"task": "a\nb" + "c" * 999}}, "task='a\\nbccc"),
        ({"json": {"image": data_url(png()), "n": 10**400}}, "n=1000"),
        ({"json": {"image": data_url(png()), "temperature": None}}, "temperature=None: must be a number"),
        ({"content": NESTED, "headers": {"content-type": "application/json"}}, "nested too deeply"),
        ({"content": b""}, "no picture"),
        ({"files": {"image": ("x.png", b"")}}, "no picture"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, "not valid JSON"),
        ({"json": {"picture": "x"}}, "expected a JSON object with `image`"),
        ({"json": {"image": "not base64!"}}, "not valid base64"),
        ({"json": {"image": "data:image/png,abc"}}, "a data URL without"),
        ({"json": {"image": data_url(png()), "n": True}}, "n: must be a number, is True"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, "not a form that can be read"),
        ({"content": b"no image at all"}, "image: cannot decode image"),
        ({"content": png(4100, 20)}, "longer than 200 times"),
    ],
)
def test_a_request_to_score_that_makes_no_sense_is_refused_in_one_line(options, expected):
    body = {} if {"json", "files"} & set(options) else {"content": png()}
    assert expected in said(ask("POST", "/score", **(body | options)))


def test_a_request_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(requests, "MAX_BYTES", 1 << 20)
    big = bytes((1 << 20) + 1)
    assert "larger than 1 MiB" in said(ask("POST", "/score", content=big), 413)

    async def chunks():
        yield big

    assert "larger than 1 MiB" in said(ask("POST", "/score", content=chunks()), 413)
    assert "larger than 1 MiB" in said(ask("POST", "/v1/chat/completions", content=big), 413)

    async def receive():
        raise AssertionError("a body that is declared too large was read")

    headers = [(b"content-length", b"%d" % len(big))]
    with pytest.raises(requests.RequestRefused, match="larger than 1 MiB"):
        asyncio.run(requests.read(Request({"type": "http", "headers": headers, "query_string": b""}, receive)))


@pytest.mark.parametrize("signalled", [True, False])
def test_only_an_engine_that_nobody_stopped_has_died(signalled):
    args = Namespace(died=None, shown="x", address="http://127.0.0.1:1", serving=False)
    engine = SimpleNamespace(errored=True, shutdown=lambda: None)  # Ctrl-C may reach its process before ours
    models = SimpleNamespace(base_model_paths=[])
    app = SimpleNamespace(state=SimpleNamespace(args=args, engine_client=engine, openai_serving_models=models))

    async def send(message):
        pass

    sent = middleware._announcing({"type": "lifespan", "app": app}, send)
    asyncio.run(sent({"type": "lifespan.startup.complete"}))
    if signalled:
        engine.shutdown()
    asyncio.run(sent({"type": "lifespan.shutdown.complete"}))
    engine.shutdown()
    assert (args.serving, args.died) == (True, not signalled)


def test_a_key_guards_all_but_the_page_and_health():
    for path in ("/score", "/invocations", "/tokenize", "/v1/models"):
        said(ask("POST", path, ["right"], content=png()), 401)
        said(ask("POST", path, ["right"], content=png(), headers={"authorization": "Bearer wrong"}), 401)
    assert ask("POST", "/invocations", ["right"], headers=KEY).status_code == 200
    assert ask("GET", "/health", ["right"]).status_code == 200
    assert 'name="key"' in ask("GET", "/", ["right"]).text
    assert 'name="key"' not in ask("GET", "/").text


def test_the_page_loads_nothing_from_elsewhere_and_escapes_the_models_name():
    response = ask("GET", "/")
    assert "&lt;the model&gt;" in response.text and "<the model>" not in response.text
    policy = response.headers["content-security-policy"]
    nonce = policy.partition("script-src 'nonce-")[2].partition("'")[0]
    assert f'<script nonce="{nonce}">' in response.text and f'<style nonce="{nonce}">' in response.text
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "://" not in response.text and 'style="' not in response.text
    assert nonce not in ask("GET", "/").text
    assert "POST a picture" in said(ask("GET", "/score"), 405)


def test_other_requests_pass_unchanged():
    chat_path, odd = "/v1/chat/completions", '{"model":  "the-model", "messages": []}'
    for body in (odd, "no JSON", "[]", '{"model": ["iqa"]}'):
        assert ask("POST", chat_path, content=body, headers=KEY).json() == {"path": chat_path, "body": body}
    assert ask("GET", "/version").json() == {"path": "/version", "body": ""}
    assert ask("POST", "/").json()["path"] == "/"


def preset(task: str, **body) -> dict:
    given = {"model": task, "messages": [{"role": "user", "content": []}], **body}
    return json.loads(ask("POST", "/v1/chat/completions", json=given, headers=KEY).json()["body"])


def with_picture(data: bytes) -> list[dict]:
    picture = {"type": "image_url", "image_url": {"url": data_url(data)}}
    return [
        {"role": "system", "content": "Be nice."},
        {"role": "user", "content": [{"type": "text", "text": "Well?"}, picture]},
    ]


@pytest.mark.parametrize("task", ["iqa", "iaa"])
def test_a_chat_request_to_a_task_gets_our_wording_around_its_upright_picture(task):
    found = preset(task, messages=with_picture(png(orientation=6)), stream=True, logit_bias={"3": 5, "7": 9})
    system, user = found["messages"]
    assert system == PROMPTS.messages(task)[0]
    assert [p["type"] for p in user["content"]] == ["image_url", "text"]
    assert user["content"][1]["text"] == PROMPTS.user[task]
    upright = decode_image(requests.from_base64(user["content"][0]["image_url"]["url"]), "test")
    assert upright.size == (20, 40) and upright.getpixel((10, 2)) == (255, 0, 0)
    assert found["logit_bias"] == {"3": 5, "7": -100.0, "8": -100.0}
    assert found["temperature"] == 0.0 and found["max_completion_tokens"] == 40 and found["stream"] is True


def test_a_chat_request_to_a_task_keeps_its_own_sampling():
    found = preset("iqa", messages=with_picture(png()), n=3, max_tokens=9)
    assert found["temperature"] == 1.0 and found["max_tokens"] == 9 and "max_completion_tokens" not in found
    assert preset("iqa", messages=with_picture(png()), n=3, temperature=0.3)["temperature"] == 0.3


def test_null_is_no_sampling_of_its_own():
    found = preset("iqa", messages=with_picture(png()), temperature=None, n=None, logit_bias=None, max_tokens=None)
    assert found["temperature"] == 0.0 and found["max_completion_tokens"] == 40
    assert found["logit_bias"] == {"7": -100.0, "8": -100.0}


def test_a_chat_request_that_makes_no_sense_is_refused_in_one_line(monkeypatch):
    path, body = "/v1/chat/completions", {"model": "iqa", "messages": with_picture(png())}
    for bias in ([1], "7", 3, True):
        assert "logit_bias: must be an object" in said(
            ask("POST", path, json={**body, "logit_bias": bias}, headers=KEY)
        )
    assert "nested too deeply" in said(ask("POST", path, content=NESTED, headers=KEY))

    def decode(*args):
        raise AssertionError("a picture of a request that is refused was decoded")

    monkeypatch.setattr(chat, "picture_url", decode)
    several = [*body["messages"], *with_picture(png())]
    assert "2 pictures in the messages; it judges one" in said(
        ask("POST", path, json={**body, "messages": several}, headers=KEY)
    )


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://example.com/a.png", "this server fetches no URLs"),
        ("file:///etc/passwd", "this server fetches no URLs"),
        (None, "this server fetches no URLs"),
        ("data:image/png;base64,AAAA", "cannot decode image"),
    ],
)
def test_a_chat_request_to_a_task_with_a_picture_that_cannot_be_read_is_refused(url, expected):
    body = {"model": "iqa", "messages": [{"role": "user", "content": [{"image_url": {"url": url}}]}]}
    assert expected in said(ask("POST", "/v1/chat/completions", json=body, headers=KEY))
    body["messages"][0]["content"] = "How good?"
    assert "no picture in the messages" in said(ask("POST", "/v1/chat/completions", json=body, headers=KEY))


def choice(text: str, finish: str = "stop") -> dict:
    return {"message": {"content": text}, "finish_reason": finish}


def test_the_summary_counts_what_did_not_parse():
    greedy = chat.answer(choice("<think> soft edges </think><answer>130</answer>"))
    assert greedy == {"score": 100.0, "rationale": "soft edges", "reason": None, "truncated": False}
    texts = ["<answer>40</answer>", "<answer>50</answer>", "<answer>four</answer>"]
    sampled = [*(chat.answer(choice(t)) for t in texts), chat.answer(choice("<think>and so", "length"))]
    found = chat.summary(greedy, sampled)
    assert (found["mean"], found["n"], found["parsed"], found["truncated"]) == (45.0, 4, 2, 1)
    assert found["sd"] == pytest.approx(50**0.5)
    assert found["samples"][3]["reason"] == "cut off at the longest answer allowed, no <answer>"
    empty = chat.summary(sampled[2], [])
    assert (empty["score"], empty["mean"], empty["sd"], empty["n"]) == (None, None, None, 0)


def fails(capsys, *words: str) -> str:
    assert cli.main(["serve", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("tatar-dist: "), lines
    return lines[0]


def test_what_cannot_be_served_is_said_before_anything_is_loaded(capsys, tmp_path, monkeypatch):
    model = ["--model", str(tmp_path), "--port", "0"]
    assert "no such model directory" in fails(capsys, "--model", str(tmp_path / "none"), "--port", "0")
    assert "no config.json" in fails(capsys, *model)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "model_type is 'llama'; known families are qwen2_5_vl, qwen3_vl" in fails(capsys, *model)
    with server._bound("127.0.0.1", 0) as loading:  # nobody accepts yet: its model is being loaded
        port = str(loading.getsockname()[1])
        assert f"port {port} on 127.0.0.1: in use" in fails(capsys, "--model", str(tmp_path), "--port", port)
    assert "add --open" in fails(capsys, *model, "--host", "0.0.0.0")
    assert "model_type" in fails(capsys, *model, "--host", "0.0.0.0", "--open")
    assert "no such address" in fails(capsys, *model, "--host", "no.such.host.invalid")
    assert "not set, or empty" in fails(capsys, *model, "--api-key-env", "TATAR_TEST_KEY")
    monkeypatch.setenv("TATAR_TEST_KEY", "a b")
    assert "without spaces" in fails(capsys, *model, "--api-key-env", "TATAR_TEST_KEY")
    monkeypatch.setenv("TATAR_TEST_KEY", "ab")
    assert "model_type" in fails(capsys, *model, "--host", "0.0.0.0", "--api-key-env", "TATAR_TEST_KEY")


def test_a_damaged_tokenizer_is_named_in_one_line(capsys, tmp_path):
    damaged = shutil.copytree(TINY, tmp_path / "model")
    for text, said in (("{", "tokenizer.json: not valid JSON: "), ('{"model": {}}', "or processor cannot be read: ")):
        (damaged / "tokenizer.json").write_text(text)
        with patch.dict(os.environ):
            assert said in fails(capsys, "--model", str(damaged), "--port", "0")


def test_the_environment_is_that_of_an_engine_and_neither_redirects_nor_half_a_lock():
    config = model_config(TINY)
    found = server.environment(config, gpu=False)
    assert found["GLOO_SOCKET_IFNAME"] == "lo" and found["TOKENIZERS_PARALLELISM"] == "false"
    assert found.items() >= CPU_ENGINE_ENV.items() and "VLLM_TARGET_DEVICE" not in server.environment(config, gpu=True)
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"  # the engine is a process of its own
    given = {"VLLM_API_KEY": "half", "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "1", "VLLM_LOGGING_LEVEL": "DEBUG"}
    with patch.dict(os.environ, given):
        server._set_environment(found)
        assert "VLLM_API_KEY" not in os.environ and os.environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
        assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG" and os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_model_is_called_by_its_run_or_its_directory(tmp_path, monkeypatch):
    model = tmp_path / "demo" / "checkpoints" / "step_000010" / "model"
    model.mkdir(parents=True)
    (model.parents[1] / "latest").symlink_to("step_000010")
    assert server.shown_name(model.parents[1] / "latest" / "model") == "demo"
    assert server.shown_name(tmp_path / "scorer") == "scorer"
    assert server.shown_name(tmp_path / "iqa") == "iqa-model"  # iqa is the task
    monkeypatch.chdir(tmp_path / "demo")
    assert server.shown_name(Path(".")) == "demo"
