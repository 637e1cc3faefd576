"""Measure how busy `rationale build` keeps an endpoint: `tatar-dist bench rationale`.

The ratio is the busy share of the endpoint's slot-time while rows are left, from the endpoint's own log, for 64 slots
and answers that take half a second; images, journal and fsync included. The server is a process of its own
(openai_server.py).
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tatar_dist.assets import CONFIGS
from tatar_dist.bench.harness import result

SLOTS, LATENCY, ROUNDS = 64, 0.5, 24
SIZE = (512, 384)  # KonIQ-10k's smaller release
WANTED = 0.9


def jpeg(seed: int) -> bytes:
    """Return a picture of about 45 kB, as photographs of this size have."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (SIZE[1] // 6, SIZE[0] // 6, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize(SIZE, Image.Resampling.BICUBIC).save(out, "JPEG", quality=88)
    return out.getvalue()


def rows(n: int, pictures: list[bytes]) -> Iterator[dict[str, Any]]:
    for i in range(n):
        score = 5.0 + i * 37 % 90
        image = pictures[i % len(pictures)]
        row = {"dataset": "bench", "task": "iqa", "image_bytes": image, "score": score, "split": "train"}
        yield {"sample_id": f"row-{i:06d}", **row}


@contextlib.contextmanager
def server(latency: float, slots: int) -> Iterator[str]:
    """Start a server process and yield its address."""
    words = [sys.executable, "-m", "tatar_dist.bench.openai_server", "--latency", str(latency), "--slots", str(slots)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()
            process.wait(10)


def busy_share(log: list[dict[str, Any]], slots: int) -> float:
    """Return the busy share of the slots, from the first request to the arrival of the last."""
    first, last = min(e["arrived"] for e in log), max(e["arrived"] for e in log)
    busy = sum(min(e["sent"], last) - min(e["arrived"], last) for e in log)
    return busy / (slots * (last - first))


def run(slots: int = SLOTS, latency: float = LATENCY, rounds: int = ROUNDS) -> dict[str, Any]:
    """Measure one build against a server process."""
    import httpx

    from tatar_dist.config.load import load_config
    from tatar_dist.rationale import run as running

    prompts = CONFIGS / "rationale_prompts.yaml"
    pictures = [jpeg(seed) for seed in range(64)]
    with tempfile.TemporaryDirectory() as directory, server(latency, slots) as url:
        from tatar_dist.data.writing import write_manifest

        source = Path(directory) / "rows.parquet"
        n = write_manifest(source, rows(slots * rounds, pictures))
        words = [f"output={directory}/written.parquet", f"rationale.prompts={prompts}"]
        words += [f"rationale.teacher.url={url}", "rationale.teacher.model=fixed"]
        config = load_config([], [*words, f"rationale.limits.concurrency={slots}"], unused=("model.path",))
        before = resource.getrusage(resource.RUSAGE_SELF)
        with contextlib.redirect_stderr(io.StringIO()):
            found = running.run("build", source, config)
        after = resource.getrusage(resource.RUSAGE_SELF)
        log = httpx.get(url.removesuffix("/v1") + "/log", trust_env=False).json()["log"]
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert found["accepted"] == len(log) == n, "every row is asked once and kept"
    arrived = [e["arrived"] for e in log]
    busy, span = busy_share(log, slots), max(arrived) - min(arrived)
    return result(
        "rationale",
        "an endpoint that is always busy",
        {"min": busy, "median": busy, "max": busy},
        WANTED,
        f"1: {slots / latency:.0f} requests a second",
        slots=slots,
        latency_seconds=latency,
        requests=n,
        image_bytes=sum(map(len, pictures)) / len(pictures),
        busy=busy,
        requests_per_second=(n - 1) / span,
        idle_seconds_per_request=(1 - busy) * slots * span / n,
        client_cpu_seconds_per_request=spent / n,
    )
