"""Ask the nodes of the cluster, each in a Ray task that needs no free CPU or GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tatar_dist.run.gpus import Machine, read_here

ANSWER_S = 60
LOST = (ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError, ray.exceptions.TaskUnschedulableError)


def tasks_on_nodes(function: Callable[..., Any]) -> list[tuple[dict[str, Any], Any]]:
    """Return (entry of `ray.nodes()`, remote `function` that runs there) of living nodes."""
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    living = [n for n in ray.nodes() if n["Alive"]]
    return [(n, task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], False))) for n in living]


def read_nodes() -> list[Machine]:
    """Read the GPUs that Ray has on every node, except of one that is lost or late (ANSWER_S)."""
    has = [(int(n["Resources"].get("GPU", 0)), task) for n, task in tasks_on_nodes(read_here)]
    asked = [task.remote(count) for count, task in has if count]
    machines = []
    for answer in ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)[0] if asked else ():
        with suppress(*LOST):
            machines.append(ray.get(answer))
    return machines
