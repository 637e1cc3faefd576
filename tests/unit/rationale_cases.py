"""What the tests of rationale construction share: small manifests, configs, texts that pass."""

import asyncio
import io
import json
import time
from pathlib import Path

import numpy as np
from openai_server import FAST, SLOW, good_answer
from PIL import Image

from tatar_dist.config.load import load_config
from tatar_dist.data.manifest import read_manifest
from tatar_dist.data.writing import write_manifest
from tatar_dist.rationale import run as running
from tatar_dist.rationale.endpoint import Endpoint
from tatar_dist.types import EIGHT

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "configs" / "rationale_prompts.yaml"
NOTES = {name: f"The {name} were noted in a few plain words." for name in EIGHT}


def build_config(*words, output="unused.parquet"):
    return load_config([], [f"output={output}", f"rationale.prompts={PROMPTS}", *words], unused=("model.path",))


def png(seed, size=(24, 16)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def rows(n, task="iqa", rationale=False):
    for i in range(n):
        text = (FAST if task == "iqa" else SLOW) if rationale else None
        yield {
            "sample_id": f"{task}-{i:03d}",
            "dataset": f"set-{task}",
            "task": task,
            "image_bytes": png(i),
            "score": float(20 + i * 37 % 60) + 0.25,
            "split": "train",
            "rationale": text,
            "attributes": NOTES if task == "iaa" else None,
        }


def manifest(path, n_iqa=6, n_iaa=0, rationale=False):
    write_manifest(path, [*rows(n_iqa, "iqa", rationale), *rows(n_iaa, "iaa", rationale)])
    return path


def endpoint_words(url, **limits):
    """Words that name a teacher and a judge at `url`, with waits short enough for a test."""
    quick = {"backoff_s": 0.02, "backoff_max_s": 0.05, "retries": 3, "concurrency": 4, **limits}
    words = [f"rationale.{who}.{key}" for who in ("teacher", "judge") for key in (f"url={url}", f"model={who}-model")]
    return [*words, *(f"rationale.limits.{key}={value}" for key, value in quick.items())]


def build(tmp_path, server_or_url, *words, name="build", source=None, **limits):
    url = getattr(server_or_url, "url", server_or_url)
    source = source or manifest(tmp_path / "m.parquet")
    config = build_config(*endpoint_words(url, **limits), *words, output=tmp_path / "r.parquet")
    return running.run(name, source, config)


def written(tmp_path):
    found = read_manifest(tmp_path / "r.parquet")
    return [found.row(i) for i in range(len(found))]


def rejected(tmp_path):
    return [json.loads(line) for line in (tmp_path / "r.rejected.jsonl").read_text().splitlines()]


def first_then_good(*replies):
    """Answers the first calls with `replies`, all later ones well."""
    queue = list(replies)

    def answer(call):
        return queue.pop(0) if queue else good_answer(call)

    return answer


async def when(condition, reply):
    """For an answer that is held back until something has happened, however long that takes on a busy machine."""
    while not condition():
        await asyncio.sleep(0.005)
    return reply


def turns(monkeypatch):
    """The times at which requests begin to wait for their turn and get it, as the client itself sees them: on a busy
    machine a server sees them late and in bunches."""
    waits, gets, turn = [], [], Endpoint._turn

    async def watched(endpoint, bound):
        waits.append(time.monotonic())
        await turn(endpoint, bound)
        gets.append(time.monotonic())

    monkeypatch.setattr(Endpoint, "_turn", watched)
    return waits, gets


def by_sample(bad, which="iqa-002"):
    """Answers one sample with `bad(call)`, the others well; the sample is known by its score in the prompt."""
    score = 20 + int(which[-3:]) * 37 % 60 + 0.25

    def answer(call):
        return bad(call) if f"{score:.1f}" in json.dumps(call.body["messages"]) else good_answer(call)

    return answer
