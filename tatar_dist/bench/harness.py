"""Time calls in turns and commands as whole processes; build the result of every bench.

A command is timed by a small parent process, `python harness.py WORD...`: the kernel counts what a forked child
shares with its parent into the child's peak memory, so a bench full of data must not be the parent.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(*works: Callable[[], Any], rounds: int) -> list[list[float]]:
    """Return the seconds of each callable, run A B A B ..., after one round that does not count."""
    seconds = [[seconds_of(work) for work in works] for _ in range(rounds + 1)]
    return [list(side) for side in zip(*seconds[1:], strict=True)]


def two_cores(bench: str) -> list[int]:
    """Return two cores of this process. Raises UserError where there are fewer."""
    from tatar_dist.errors import UserError  # not in the small parent

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise UserError(f"bench {bench}: needs 2 cores, this process may use {len(cores)}")
    return cores[:2]


def ratio(baseline: list[float], ours: list[float]) -> dict[str, float]:
    """Return min, median and max of baseline / ours, round by round."""
    ratios = [b / o for b, o in zip(baseline, ours, strict=True)]
    return {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}


def result(
    name: str,
    baseline: str,
    spread: dict[str, float],
    target: float,
    limit: str,
    others_met: bool = True,
    **details: Any,
) -> dict[str, Any]:
    """Build the JSON object of a bench, which `table.show` prints.

    Args:
        spread: Min, median and max of the ratio. `met`, the bench's exit status, is whether the median reaches `target`
            and the bench's other targets are reached (`others_met`).
        limit: The bound of the ratio and what sets it.
        details: Anything else. A dict or list of records becomes a table; keys with `seconds`, `mib` or `bytes` in
            their name get units.
    """
    from tatar_dist.run.proofs import versions  # not in the small parent

    return {
        "name": name,
        "baseline": baseline,
        "ratio": {k: round(v, 3) for k, v in spread.items()},
        "target": target,
        "met": spread["median"] >= target and others_met,
        "limit": limit,
        **details,
        "versions": {"python": platform.python_version(), **versions()},
        "machine": _machine(),
    }


def _machine() -> dict[str, Any]:
    """Return the CPU, the cores this process may use, the GPUs, and the current load."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    cpu = model[1] if model else platform.processor() or platform.machine()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "gpus": gpus, "load": round(os.getloadavg()[0], 2)}


def timed(words: Sequence[str]) -> tuple[dict[str, float], str]:
    """Time `python WORDS`, start-up included, on this process's cores, one thread per library.

    Returns {"seconds", "peak_mib"} and the output. Raises RuntimeError when the command fails.
    """
    root = Path(__file__).parents[2]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    parent = [sys.executable, "-P", __file__, *words]
    measured = json.loads(subprocess.run(parent, env=env, stdout=subprocess.PIPE, check=True).stdout)
    output, status = measured.pop("output"), measured.pop("status")
    if status:
        raise RuntimeError(f"python {' '.join(words)} exited with status {status}: {output}")
    return measured, output


def _measure(words: list[str]) -> dict[str, float | str]:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # this process has no other child
    return {"seconds": seconds, "peak_mib": peak, "status": done.returncode, "output": done.stdout}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1:])))
