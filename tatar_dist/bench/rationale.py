"""`tatar-dist bench rationale`: how busy `rationale build` keeps an endpoint, as the endpoint itself sees it.

In: nothing. Out: the share of the endpoint's slot-time that is busy while rows are left, for 64 slots and answers that
take half a second, images, journal and fsync included. The limit is 1: a slot that is asked again the moment its answer
is out. The server is a process of its own (openai_server.py). The rest is shown by where it goes: the
client's CPU, fsyncs, and the gap between an answer and the next question.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from tatar_dist.assets import CONFIGS

SLOTS, LATENCY, ROUNDS = 64, 0.5, 24
SIZE = (512, 384)  # KonIQ-10k's smaller release
WANTED = 0.9


def jpeg(seed: int) -> bytes:
    """A picture of about 45 kB, as photographs of this size are."""
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
    """The address of a server process."""
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
    """Busy share of `slots` slots from the first request to the arrival of the last; later, none is left to ask."""
    first, last = min(e["arrived"] for e in log), max(e["arrived"] for e in log)
    busy = sum(min(e["sent"], last) - min(e["arrived"], last) for e in log)
    return busy / (slots * (last - first))


def run(slots: int = SLOTS, latency: float = LATENCY, rounds: int = ROUNDS) -> dict[str, Any]:
    """One build against a server process; what `--json` prints."""
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
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            found = running.run("build", source, config)
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        log = httpx.get(url.removesuffix("/v1") + "/log", trust_env=False).json()["log"]
        journal = Path(directory) / "written.journal.jsonl"
        sync = _sync_seconds(Path(directory))
        size = journal.stat().st_size
    assert found["accepted"] == len(log) == n, "every row is asked once and kept"
    arrived = [e["arrived"] for e in log]
    busy = busy_share(log, slots)
    return {
        "slots": slots,
        "latency_seconds": latency,
        "requests": n,
        "image_bytes": sum(map(len, pictures)) / len(pictures),
        "busy": busy,
        "limit": 1.0,
        "wanted": WANTED,
        "requests_per_second": (n - 1) / (max(arrived) - min(arrived)),
        "seconds": seconds,
        "idle_seconds_per_request": (1 - busy) * slots * (max(arrived) - min(arrived)) / n,
        "client_cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "fsync_seconds": sync,
        "journal_bytes": size,
        "server_seconds_per_answer": sum(e["sent"] - e["arrived"] for e in log) / n,
    }


def _sync_seconds(directory: Path, repeats: int = 20) -> float:
    """Median seconds of appending a journal line and fdatasync on this disk."""
    times = []
    with open(directory / "sync", "ab", buffering=0) as f:
        for _ in range(repeats):
            start = time.perf_counter()
            f.write(b"x" * 500)
            os.fdatasync(f.fileno())
            times.append(time.perf_counter() - start)
    return float(np.median(times))


def print_table(found: dict[str, Any]) -> None:
    """The busy share beside its limit, and where the rest goes."""
    console = Console(highlight=False)
    rate, ideal = found["requests_per_second"], found["slots"] / found["latency_seconds"]
    console.print(
        f"rationale build against {found['slots']} slots of {found['latency_seconds']:g} s: busy "
        f"[bold]{100 * found['busy']:.1f} %[/bold] (limit 100 %, wanted {100 * found['wanted']:.0f} %), {rate:.0f} of "
        f"at most {ideal:.0f} requests a second",
        soft_wrap=True,
    )
    cpu = found["client_cpu_seconds"] / found["requests"]
    console.print(
        f"{found['requests']} requests with images of {found['image_bytes'] / 1e3:.0f} kB; a slot waits "
        f"{1e3 * found['idle_seconds_per_request']:.0f} ms for its next question: its answer's fsync "
        f"({1e3 * found['fsync_seconds']:.1f} ms on this disk now, after the one under way), and the CPU "
        f"({1e3 * cpu:.1f} ms a request, the server's beside it)",
        soft_wrap=True,
    )


if __name__ == "__main__":
    print(json.dumps(run()))
