"""Rationale construction against vLLM's own OpenAI server, a tiny model behind it, with kill -9 on the way."""

import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import PIXELS
from openai_server import Call, OpenAIServer, Reply
from rationale_model import SMALLER, manifest, taught_model, wording_file
from rationale_process import answers, build_and_kill, results, server_environment

from tatar_dist.config.load import load_config
from tatar_dist.data.manifest import read_manifest
from tatar_dist.rationale import run as running
from tatar_dist.rationale.questions import read_marks
from tatar_dist.rollout.engine import group_seed

ROWS = 20  # a task
READY_S = 900


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def vllm_server(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `vllm serve` with the taught model, on loopback."""
    model, port = taught_model(tmp_path_factory), free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny", "--dtype", "float32"]
    command += ["--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "4096", "--enforce-eager"]
    command += ["--generation-config", "vllm", "--limit-mm-per-prompt", '{"image": 1, "video": 0}']
    command += ["--mm-processor-kwargs", json.dumps({"min_pixels": PIXELS**2, "max_pixels": PIXELS**2})]
    command += ["--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}']
    log = directory / "server.log"
    with open(log, "w") as said:
        process = subprocess.Popen(command, env=server_environment(), stdout=said, stderr=said, start_new_session=True)
    try:
        end = time.monotonic() + READY_S
        while True:
            assert process.poll() is None, f"the server ended: {log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"not ready after {READY_S} s: {log.read_text()[-3000:]}"
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2, trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


@pytest.fixture
def recorded(vllm_server: str) -> Iterator[OpenAIServer]:
    """A proxy before the server that notes every request."""

    async def forward(call: Call) -> Reply:
        async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
            got = await client.post(f"{vllm_server}/chat/completions", json=call.body)
        return Reply(got.status_code, got.content)

    with OpenAIServer(forward) as proxy:
        yield proxy


def words_for(directory: Path, url: str) -> list[str]:
    words = [f"rationale.{who}.{k}" for who in ("teacher", "judge") for k in (f"url={url}", "model=tiny")]
    return [*words, *SMALLER, f"rationale.prompts={wording_file(directory)}", "rationale.limits.concurrency=4"]


def run(name: str, source: Path, output: Path, words: list[str]) -> dict:
    return running.run(name, source, load_config([], [*words, f"output={output}"], unused=("model.path",)))


def test_a_build_killed_twice_ends_in_the_file_of_an_undisturbed_one_and_no_durable_answer_is_asked_again(
    directory, recorded
):
    source, killed = manifest(directory / "rows.parquet", ROWS), directory / "killed.parquet"
    words, rng = words_for(directory, recorded.url), random.Random(1)
    journal = directory / "killed.journal.jsonl"
    durable: set[int] = set()
    for _ in range(2):
        asked = len(recorded.log)
        build_and_kill(source, killed, words, after=rng.randint(3, 12))
        assert not durable & {e["seed"] for e in recorded.log[asked:]}
        durable = {group_seed(0, attempt, sample_id) for sample_id, attempt in answers(journal)}
    asked = len(recorded.log)
    found = run("build", source, killed, words)
    assert durable and not durable & {e["seed"] for e in recorded.log[asked:]}
    run("build", source, directory / "whole.parquet", words)
    assert results(killed) == results(directory / "whole.parquet")
    assert found["tasks"]["iqa"]["accepted"] and found["tasks"]["iaa"]["accepted"]
    assert "number" in {**found["tasks"]["iqa"]["reasons"], **found["tasks"]["iaa"]["reasons"]}


def test_the_judge_behind_the_server_gives_marks_by_the_schema(directory, recorded):
    words, built = words_for(directory, recorded.url), directory / "whole.parquet"
    if not built.exists():
        run("build", manifest(directory / "rows.parquet", ROWS), built, words)
    before = len(recorded.calls)
    found = run("judge", built, directory / "kept.parquet", words)
    assert found["accepted"] == len(read_manifest(built)) > ROWS
    assert all(c.body["response_format"]["type"] == "json_schema" for c in recorded.calls[before:])
    kept = read_manifest(directory / "kept.parquet")
    for i in range(len(kept)):
        row = kept.row(i)
        assert read_marks(json.dumps(row["meta"]["judge"]["marks"]), row["task"]) == row["meta"]["judge"]["marks"]
