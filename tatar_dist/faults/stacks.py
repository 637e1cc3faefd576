"""Collect the Python stacks and states of processes on this machine, whatever they hang in.

A process that called `run.log.open_log` writes its stacks itself when asked. One that cannot (it is stopped, or C code
holds the interpreter's lock) is read from outside by py-spy, which comes with Ray. If both fail, the text names its
state from /proc. On other nodes this runs as a Ray task (faults/stall.py).
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tatar_dist.run.log import END, STACKS

ANSWER_S = 3.0  # it takes milliseconds; a process that swaps may need more
SPY_S = 10.0


@dataclass(frozen=True)
class Stacks:
    """`state`: as in /proc/PID/status, for example "S (sleeping)", or "gone". `text`: what to write down."""

    state: str
    answered: bool  # it wrote its stacks itself
    text: str


def stacks_of(pids: Sequence[int]) -> list[Stacks]:
    """One per process id, in order, asked at the same time."""
    with ThreadPoolExecutor(max(1, len(pids))) as pool:
        return list(pool.map(_stacks, pids))


def _stacks(pid: int) -> Stacks:
    status = _status(pid)
    state = status.get("State", "gone")
    head = f"pid {pid} on {socket.gethostname()}: {state}\n\n"
    if not status:
        return Stacks(state, False, head)
    own = None if state[0] in "TtZX" else _ask(pid)
    if own is not None:
        return Stacks(state, True, head + own)
    return Stacks(state, False, head + f"It did not write its stacks; seen from outside:\n{_spy(pid)}")


def _status(pid: int) -> dict[str, str]:
    """/proc/PID/status; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def _ask(pid: int) -> str | None:
    """What the process wrote when asked; None when it wrote nothing in time."""
    try:
        fds = Path(f"/proc/{pid}/fd")
        found = ((f, re.search(rf"{STACKS}(\d+)", os.readlink(f))) for f in fds.iterdir())
        memory, pipe = next(((f, match[1]) for f, match in found if match), (None, None))
        if memory is None:
            return None
        with open(memory, "rb") as file, open(fds / str(pipe), "wb", buffering=0) as question:
            file.seek(0, os.SEEK_END)
            question.write(b"?")
            return _read_answer(file.fileno())
    except OSError:  # it ended meanwhile, or belongs to another user
        return None


def _read_answer(fd: int) -> str | None:
    """Up to its end: one that is written slowly, on a busy machine, is not taken for a short one."""
    found, deadline = b"", time.monotonic() + ANSWER_S
    while not found.endswith(END) and time.monotonic() < deadline:
        time.sleep(0.02)
        found += os.read(fd, 1 << 20)
    return found.removesuffix(END).decode(errors="replace") or None


def _spy(pid: int) -> str:
    command = [str(Path(sys.executable).with_name("py-spy")), "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SPY_S)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"{e}\n"
    return done.stdout or done.stderr
