"""Time a command as a whole process: seconds and peak memory, start of Python included.

The kernel counts what a forked child shares with its parent into the child's peak, so a benchmark full of data must not
be the parent: `python bench/process.py CORES WORD...` is a small parent, which prints what it measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def timed(words: Sequence[str], cores: int | None = None) -> tuple[dict[str, float], str]:
    """Run `python WORDS` with one thread a library; on the first `cores` cores, or on all.

    Return {"seconds", "peak_mib"} and what it printed. Raise RuntimeError when it ends with another status than 0.
    """
    root = Path(__file__).parents[2]
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    between = [sys.executable, __file__, str(cores or 0), *words]
    found = json.loads(subprocess.run(between, env={**os.environ, **one}, stdout=subprocess.PIPE, check=True).stdout)
    said = found.pop("said")
    if status := found.pop("status"):
        raise RuntimeError(f"{' '.join(words)} ended with {status}: {said}")
    return found, said


def _measure(cores: int, words: list[str]) -> dict[str, float | str]:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: cores or None])
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        said = child.stdout.read().decode() if child.stdout else ""
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
    unit = 1024 if sys.platform == "linux" else 1
    peak = usage.ru_maxrss * unit / 2**20
    return {"seconds": seconds, "peak_mib": peak, "status": child.returncode, "said": said}


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]), sys.argv[2:])))
