"""A checkpoint's files: written by learners; with node-local storage fetched and sent back.

Learners write in their concurrency group `io`, beside training; so a thread of the controller waits for them. Files
travel in chunks through Ray's object store.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

import ray

from tatar_dist.errors import LearnersFailed, RunError, UserError
from tatar_dist.faults.waiting import TICK_S, first_line
from tatar_dist.run.files import Files, Job, seal, write_files

CHUNK = 64 << 20  # bytes
IO = "io"  # the concurrency group of learner calls that run beside training


class RankFiles:
    """A rank's checkpoint files, private on its node if need be. `snapshot`: of next `write`."""

    def __init__(self) -> None:
        self.snapshot: list[Job] = []

    @cached_property
    def received(self) -> Path:
        """Return the private directory, made at first use."""
        return Path(tempfile.mkdtemp(prefix="tatar_checkpoint_"))

    def write(self, directory: str | None) -> Files:
        """Write the last snapshot to `directory` (None: the private one, anew); return the files.

        Raises:
            OSError: ENOSPC when the disk is full, FileNotFoundError when there is no such directory here.
        """
        jobs, self.snapshot = self.snapshot, []
        if directory is None:
            self.discard()
        return write_files(Path(directory) if directory else self.received, jobs)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return a part of a file that `write` put on this node."""
        with open(self.received / name, "rb") as f:
            f.seek(offset)
            return f.read(size)

    def receive(self, name: str, offset: int, data: bytes) -> None:
        """Write a part of a checkpoint's file that is to be loaded; parts come in order."""
        path = self.received / name
        path.parent.mkdir(exist_ok=True)
        with open(path, "r+b" if offset else "wb") as f:
            f.seek(offset)
            f.write(data)

    def discard(self) -> None:
        """Delete the private directory."""
        if "received" in vars(self):
            shutil.rmtree(self.received, ignore_errors=True)
            del self.received


class Writing(Future[Files]):
    """The result of `work(given_up)` in a thread of its own; `cancel` ends it within moments."""

    def __init__(self, work: Callable[[threading.Event], Files]) -> None:
        super().__init__()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[threading.Event], Files]) -> None:
        try:
            self.set_result(work(self._given_up))
        except BaseException as e:
            self.set_exception(e)

    def cancel(self) -> bool:
        self._given_up.set()
        self._thread.join()
        return True


def write(actors: Sequence[Any], directory: Path, local: bool, timeout: float, given_up: threading.Event) -> Files:
    """Let all ranks write their files of the last snapshot below `directory`, and wait for them.

    Raises:
        OSError: a file could not be written. LearnersFailed: a rank died, or needs longer than `timeout`.
    """
    refs = [_in_io(a, "write", None if local else str(directory)) for a in actors]
    deadline = time.monotonic() + timeout
    while late := [r for r in range(len(refs)) if not ray.wait([refs[r]], timeout=0)[0]]:
        if given_up.is_set() or time.monotonic() > deadline:
            raise LearnersFailed(f"learner rank(s) {late} did not write their checkpoint within {timeout:g} s")
        ray.wait([refs[r] for r in late], num_returns=len(late), timeout=TICK_S)
    files: Files = {}
    for rank, (actor, ref) in enumerate(zip(actors, refs, strict=True)):
        written: Files = _get(ref, rank, timeout)
        if local:
            for name, facts in written.items():
                _fetch(actor, rank, name, facts, directory, timeout, given_up)
            _get(_in_io(actor, "discard"), rank, timeout)
        files |= written
    return files


def send(actors: Sequence[Any], directory: Path, saved_ranks: int, timeout: float) -> None:
    """Bring each rank what it loads of a checkpoint: its own shards, or all to cut them anew."""
    for path in sorted((directory / "deepspeed").iterdir()):
        name, same = path.relative_to(directory).as_posix(), saved_ranks == len(actors)
        takers = [r for r in range(len(actors)) if not same or f"zero_pp_rank_{r}_" in name]
        with open(path, "rb") as f:
            for offset in range(0, path.stat().st_size, CHUNK):
                chunk = ray.put(f.read(CHUNK))
                refs = {r: actors[r].files.remote("receive", name, offset, chunk) for r in takers}
                for rank, ref in refs.items():
                    _get(ref, rank, timeout)


def _fetch(
    actor: Any, rank: int, name: str, facts: dict[str, Any], directory: Path, timeout: float, given_up: threading.Event
) -> None:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as f:
        while f.tell() < facts["bytes"] and not given_up.is_set():
            f.write(_get(_in_io(actor, "read", name, f.tell(), CHUNK), rank, timeout))
    if seal(path) != facts:
        raise LearnersFailed(f"{name} of learner rank {rank} did not arrive as it was written")


def _in_io(actor: Any, part: str, *arguments: Any) -> Any:
    return actor.files.options(concurrency_group=IO).remote(part, *arguments)


def _get(ref: Any, rank: int, timeout: float) -> Any:
    try:
        return ray.get(ref, timeout=timeout)
    except ray.exceptions.RayError as e:
        cause = getattr(e, "cause", None)
        if isinstance(cause, OSError | UserError | RunError):
            raise cause from e
        raise LearnersFailed(f"checkpoint files of learner rank {rank}: {first_line(e)}") from e
