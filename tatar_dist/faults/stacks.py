"""Read the Python stacks of processes on this machine with py-spy, which comes with Ray.

py-spy reads a process's memory from outside, so it also sees one that is stopped or whose interpreter lock is held by C
code; `--nonblocking`, because pausing a stopped process fails. No signal is sent to a process: its handler would walk
the frames of running threads, which now and then crashes a healthy process. py-spy must be permitted to trace
(`run.process.open_log` permits every process of the same user, see README.md; some containers need CAP_SYS_PTRACE);
where it is not, the text gives the process's state and py-spy's error. On other nodes this runs as a Ray task
(faults/stall.py).
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SPY_S = 10.0


@dataclass(frozen=True)
class Stacks:
    """State and stacks of one process.

    `state`: as in /proc/PID/status, for example "S (sleeping)", or "gone". `answered`: it is neither stopped nor gone,
    and its stacks could be read. `text`: what to write down.
    """

    state: str
    answered: bool
    text: str


def stacks_of(pids: Sequence[int]) -> list[Stacks]:
    """Read the stacks of all `pids` at the same time, in their order."""
    with ThreadPoolExecutor(max(1, len(pids))) as pool:
        return list(pool.map(_stacks, pids))


def _stacks(pid: int) -> Stacks:
    head = f"pid {pid} on {socket.gethostname()}: "
    try:
        state = re.search(r"^State:\s*(.*)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1]  # type: ignore[index]
    except OSError:
        return Stacks("gone", False, f"{head}gone\n")
    command = [str(Path(sys.executable).with_name("py-spy")), "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SPY_S)
        stacks, error = done.stdout, done.stderr if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as e:
        stacks, error = "", str(e)
    if error:
        stacks += f"py-spy cannot read it; it may need the permission to trace (CAP_SYS_PTRACE): {error.strip()}\n"
    return Stacks(state, not error and state[0] not in "TtZX", f"{head}{state}\n\n{stacks}")
