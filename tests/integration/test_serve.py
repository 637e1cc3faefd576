"""The real `tatar-dist serve` as a process, asked as clients and a browser ask it.

All tests share one start, but for those of what ends a server: they come last.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from browser import Browser
from conftest import png
from PIL import Image
from rationale_process import server_environment
from scoring_process import SERVED, TOKENS, scored

from tatar_dist.prompts.answer import parse

ROOT = Path(__file__).parents[2]
KEY = "a-key-of-the-tests"
SHOTS = ROOT / "build" / "serve"
LIMIT = f"rollout.max_new_tokens={TOKENS}"


class Server:
    """`tatar-dist serve` in a session of its own, so that a signal to its group is what Ctrl-C in a terminal is."""

    def __init__(self, model: str, directory: Path) -> None:
        self.log = directory / "serve.log"
        words = ["--model", model, "--port", "0", "--api-key-env", "TATAR_KEY", LIMIT]
        with open(self.log, "w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tatar_dist", "serve", *words],
                cwd=ROOT,
                env={**server_environment(), "TATAR_KEY": KEY},
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it is ready."""
        end, found = time.monotonic() + 900, None
        while not (found := re.search(r"^ready: (\S+)$", self.log.read_text(), re.MULTILINE)):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.2)
        self.url = found.group(1)
        self.client = httpx.Client(base_url=self.url, timeout=300, headers={"authorization": f"Bearer {KEY}"})

    def processes(self) -> list[psutil.Process]:
        """Its own and all that it started and that still live."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                pass
        return found

    def engine(self) -> psutil.Process | None:
        """The process of vLLM's engine."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # some are short-lived, as a compiler's
                if any("EngineCore" in word for word in process.cmdline()):
                    return process
        return None

    def left(self, seconds: float = 60) -> list[psutil.Process]:
        """What of it lives after so long."""
        end = time.monotonic() + seconds
        while (found := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        return found


@contextmanager
def serving(model: str, directory: Path) -> Iterator[Server]:
    started = Server(model, directory)
    try:
        yield started
    finally:
        for process in started.processes():
            process.kill()
        started.process.wait(30)


@pytest.fixture(scope="module")
def server(model_parsing: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(model_parsing, tmp_path_factory.mktemp("serve")) as started:
        started.wait()
        yield started
        started.client.close()


def tatar_dist(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tatar_dist", *words]
    return subprocess.run(command, cwd=ROOT, env=server_environment(), capture_output=True, text=True, timeout=900)


def encoded(image: Image.Image, kind: str, orientation: int | None = None) -> bytes:
    out, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(out, kind, exif=exif)
    return out.getvalue()


def picture_part(data: bytes) -> dict:
    """Of a chat message."""
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def bomb() -> bytes:
    """A small PNG whose header promises 400 megapixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def test_the_models_are_the_tasks_and_the_directory_but_not_where_it_lies(server, model_parsing):
    found = server.client.get("/v1/models")
    name = Path(model_parsing).name
    assert [m["id"] for m in found.json()["data"]] == [name, "iqa", "iaa"]
    page = httpx.get(f"{server.url}/", timeout=60).text
    assert name in page
    for text in (found.text, page):
        assert str(Path(model_parsing).parent) not in text


def test_a_picture_gets_both_scores_and_their_spread(server):
    picture = encoded(Image.open(io.BytesIO(png(3))), "JPEG")
    found = server.client.post("/score", files={"image": ("a.jpg", picture)}, data={"n": 4}).json()
    assert found.keys() == {"iqa", "iaa"}
    for answer in found.values():
        assert 0 <= answer["score"] <= 100 and "plain view" in answer["rationale"]
        assert answer["n"] == 4 == len(answer["samples"])
        scores = [s["score"] for s in answer["samples"] if s["score"] is not None]
        assert answer["parsed"] == len(scores) >= 2
        assert answer["mean"] == pytest.approx(sum(scores) / len(scores)) and answer["sd"] > 0


def test_the_chat_model_iqa_is_the_same_judge(server):
    body = {"model": "iqa", "messages": [{"role": "user", "content": [picture_part(png(3))]}]}
    chat = server.client.post("/v1/chat/completions", json=body).json()
    scored = server.client.post("/score?task=iqa", content=png(3)).json()
    assert scored.keys() == {"iqa"} and scored["iqa"]["samples"] == []
    assert parse(chat["choices"][0]["message"]["content"]).value == scored["iqa"]["score"]
    assert chat["usage"]["prompt_tokens"] > 30  # our wording, though the request had none


def test_score_says_what_the_command_says(server, model_parsing, tmp_path_factory):
    """Two engines, two ways to put the question."""
    command = {line["task"]: line for line in map(json.loads, scored(tmp_path_factory, model_parsing).alone)}
    found = server.client.post("/score", content=png(SERVED)).json()
    assert command.keys() == found.keys() == {"iqa", "iaa"}
    for task, answer in found.items():
        body = {"model": task, "messages": [{"role": "user", "content": [picture_part(png(SERVED))]}]}
        chat = server.client.post("/v1/chat/completions", json=body).json()
        assert chat["choices"][0]["message"]["content"] == command[task]["completion"]
        assert (answer["score"], answer["rationale"]) == (command[task]["score"], command[task]["rationale"])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/invocations", "/tokenize", "/v1/responses"])
def test_no_route_fetches_a_picture(server, model_parsing, path):
    with socket.create_server(("127.0.0.1", 0)) as inside:
        url = f"http://127.0.0.1:{inside.getsockname()[1]}/a.png"
        part = {"type": "image_url", "image_url": {"url": url}}
        body = {"model": Path(model_parsing).name, "max_tokens": 2}
        if path == "/v1/responses":
            body["input"] = [{"role": "user", "content": [{"type": "input_image", "image_url": url, "detail": "auto"}]}]
        else:
            body["messages"] = [{"role": "user", "content": [part]}]
        response = server.client.post(path, json=body)
        assert response.status_code == 400 and "allowed domains" in response.text, response.text
        inside.setblocking(False)
        with pytest.raises(BlockingIOError):
            inside.accept()


def test_other_chat_requests_reach_vllm_as_they_are(server, model_parsing):
    body = {"model": Path(model_parsing).name, "messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "n": 2}
    found = server.client.post("/v1/chat/completions", json=body).json()
    assert len(found["choices"]) == 2 and found["usage"]["prompt_tokens"] < 30


def test_a_turned_picture_is_scored_upright(server):
    upright = Image.open(io.BytesIO(png(4)))
    turned = upright.transpose(Image.Transpose.ROTATE_90)  # EXIF 6: turn by 90 degrees clockwise to see it upright
    found = [
        server.client.post("/score?task=iaa", content=data).json()["iaa"]
        for data in (encoded(upright, "PNG"), encoded(turned, "PNG", orientation=6))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"garbage", "cannot decode image"), (bomb(), "decompression bomb"), (png(1)[:200], "cannot decode image")],
)
def test_what_is_no_picture_is_refused_in_one_line(server, data, expected):
    response = server.client.post("/score", content=data)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert expected in message and "\n" not in message


def test_without_the_key_there_is_a_page_and_nothing_else(server):
    assert httpx.get(f"{server.url}/", timeout=60).status_code == 200
    for path in ("/score", "/v1/chat/completions", "/invocations"):
        assert httpx.post(server.url + path, content=png(1), timeout=60).status_code == 401


def test_a_caller_who_leaves_does_no_harm(server):
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/score", content=png(5), params={"n": 60}, timeout=httpx.Timeout(300, read=0.03))
    assert server.client.get("/health").status_code == 200
    assert "Traceback" not in server.log.read_text()


def test_a_second_server_says_that_the_port_is_taken(server, model_parsing):
    port = server.url.rpartition(":")[2]
    done = tatar_dist("serve", "--model", model_parsing, "--port", port)
    assert done.returncode == 2
    assert done.stderr == f"tatar-dist: port {port} on 127.0.0.1: in use; choose another with --port\n"


def test_what_vllm_refuses_is_said_in_one_line(model_parsing):
    done = tatar_dist("serve", "--model", model_parsing, "--port", "0", "rollout.max_model_len=9000")
    assert done.returncode == 2
    loading, said = done.stderr.splitlines()
    assert loading.startswith("loading ") and said.startswith("tatar-dist: ") and "max_model_len" in said


@pytest.mark.browser
def test_the_page_scores_what_is_dropped_on_it(server, tmp_path):
    good, other, text = tmp_path / "good.png", tmp_path / "other.jpg", tmp_path / "notes.txt"
    good.write_bytes(png(6))
    other.write_bytes(encoded(Image.open(io.BytesIO(png(7))), "JPEG"))
    text.write_text("no picture")
    with Browser(tmp_path / "profile") as page:
        page.look(1200, 900)
        page.open(f"{server.url}/")
        page.value("document.getElementById('key').focus()")
        page.call("Input.insertText", text=KEY)
        page.value("document.getElementById('n').value = 3")
        page.drop(200, 400, good)
        page.until("document.getElementById('said').textContent.startsWith('Scored in')")
        for task in ("iqa", "iaa"):
            assert re.fullmatch(r"\d+\.\d", page.text(f"#{task} .score"))
            assert "plain view" in page.text(f"#{task} .said")
            assert page.value(f"document.querySelectorAll('#{task} .dot.full').length") == 1
            assert "± " in page.text(f"#{task} .spread") or "without a score" in page.text(f"#{task} .spread")
        page.choose("#file", other)
        page.until("document.querySelectorAll('#cards li').length === 2")
        assert page.value("document.getElementById('picture').naturalWidth") == 112
        assert page.complaints == []

        page.value("document.getElementById('file').focus()")
        assert page.value("document.activeElement.id") == "file"  # Enter and Space open the dialogue there
        page.value("document.querySelector('#cards li:last-child button').focus()")
        page.press_enter()
        page.until("document.getElementById('name').textContent === 'good.png'")
        for name, width, height, dark in (
            ("light", 1200, 900, False), ("dark", 1200, 900, True), ("phone", 390, 844, False),
        ):  # fmt: skip
            page.look(width, height, dark)
            assert page.value("document.documentElement.scrollWidth <= innerWidth")
            page.screenshot(SHOTS / f"{name}.png")

        page.choose("#file", text)
        page.until("document.getElementById('said').className === 'bad'")
        assert page.text("#said").startswith("This is no image that can be read")
        page.value("document.getElementById('key').value = 'wrong'")
        page.choose("#file", good)
        page.until("document.getElementById('said').textContent.includes('API key is missing or wrong')")


def test_ctrl_c_ends_it_cleanly(server):
    assert len(server.processes()) > 1  # the engine is a process of its own
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.process.wait(300) == 0
    assert server.left() == []
    said = server.log.read_text()
    assert said.endswith("stopped\n"), said
    assert "Traceback" not in said and "Task was destroyed" not in said, said


def test_sigterm_while_the_model_is_loaded_ends_the_engine_too(model_parsing, tmp_path):
    with serving(model_parsing, tmp_path) as loading:
        end = time.monotonic() + 900
        while loading.engine() is None:
            assert loading.process.poll() is None and time.monotonic() < end, loading.log.read_text()
            time.sleep(0.05)
        loading.process.terminate()
        assert loading.process.wait(300) == 130
        assert loading.left() == []
        said = loading.log.read_text()
        assert "ready: " not in said and "Traceback" not in said
        assert said.endswith("tatar-dist: interrupted\n"), said


def test_a_dead_engine_is_no_clean_end(model_parsing, tmp_path):
    with serving(model_parsing, tmp_path) as server:
        server.wait()
        engine = server.engine()
        assert engine is not None
        engine.kill()
        assert server.process.wait(300) == 1
        assert server.left() == []
        said = server.log.read_text()
        assert "stopped" not in said
        assert said.endswith(
            f"tatar-dist: the engine of {server.url} died, so the server has ended; start it again\n"
        ), said
