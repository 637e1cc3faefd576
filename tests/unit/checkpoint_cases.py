"""A run's checkpoints with files of random bytes: written as in a run (run/files.py), in no time."""

from __future__ import annotations

import os
import random
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tatar_dist.config.schema import CheckpointConfig
from tatar_dist.run.checkpoints import Checkpoints
from tatar_dist.run.events import Events
from tatar_dist.run.files import Files, write_files

SIZES = {"deepspeed/rank_0.pt": 40_000, "deepspeed/rank_1.pt": 70_000, "model/model.safetensors": 30_000}
SAME = {"stage": "grpo"}


def content(tag: str, name: str) -> bytes:
    return random.Random(tag + name).randbytes(SIZES[name])


def plain_job(tag: str, name: str):
    return lambda path: path.write_bytes(content(tag, name))


class Learners:
    """Two ranks that write the files of `tag` in a thread; `gate` holds that thread back."""

    actors = (0, 1)

    def __init__(self, tag: str = "weights", gate: threading.Event | None = None, job=plain_job) -> None:
        self.tag, self.gate, self.job = tag, gate, job

    def save(self, directory: Path) -> Future[Files]:
        pool = ThreadPoolExecutor(1)
        future = pool.submit(self._after_the_gate, directory)
        pool.shutdown(wait=self.gate is None)
        return future

    def _after_the_gate(self, directory: Path) -> Files:
        assert self.gate is None or self.gate.wait(60)
        return self.write(directory)

    def write(self, directory: Path) -> Files:
        return write_files(directory, [(name, self.job(self.tag, name)) for name in SIZES])


def checkpoints(run: Path, **settings) -> Checkpoints:
    return Checkpoints(run, CheckpointConfig(**settings), Events(run))


def save(store: Checkpoints, step: int, state: dict | None = None, learners=None, metrics: dict | None = None) -> Path:
    store.save(step, {"same": SAME, **(state or {})}, learners or Learners(), metrics or {})
    store.finish()
    return store.root / f"step_{step:06d}"


def names(run: Path) -> list[str]:
    """Everything under checkpoints/, hidden names too."""
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def tag_of(directory: Path) -> str:
    """Which save the files come from; fails on a mix."""
    (tag,) = [t for t in ("old", "new", "weights") if all((directory / n).read_bytes() == content(t, n) for n in SIZES)]
    return tag


def damage(file: Path, position: int) -> None:
    """Flip one bit; the modification time stays, as with a bad disk."""
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=times)
