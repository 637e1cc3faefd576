"""Export a run's metrics to Prometheus, through the exporter that Ray runs on every node.

The lines of metrics.jsonl and the states of the engines become gauges with the tag `run`:

    reward/total/iqa     ray_tatar_reward_total{task="iqa"}         every metric is a gauge by its contract name;
    eval/koniq/srcc      ray_tatar_eval_srcc{dataset="koniq"}       task and data set become tags
    time/step            ray_tatar_time_step
                         ray_tatar_engine_state{engine="1", state="healthy"}     1 for the state it is in, 0 for others
                         ray_tatar_steps_total                                   steps this process finished

They are served at `http://NODE:PORT/metrics` of the controller's node, where PORT is its `MetricsExportPort` in
`ray.nodes()`. Ray updates them about every ten seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from tatar_dist.faults.health import State
from tatar_dist.types import TASKS


class Exporter:
    """The gauges of one run. Needs a connection to Ray."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._gauges: dict[str, Gauge] = {}
        self._steps = Counter("tatar_steps", "optimiser steps finished by this process", ("run",))
        self._engines = Gauge("tatar_engine_state", "1 = the state the engine is in", ("run", "engine", "state"))

    def step(self, metrics: Mapping[str, float]) -> None:
        """Export the metrics of a finished step, by their contract names."""
        self._steps.inc(tags={"run": self.run})
        for key, value in metrics.items():
            name, tags = prometheus_name(key)
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, key, ("run", *tags))
            self._gauges[name].set(value, {"run": self.run, **tags})

    def engine(self, index: int, state: str) -> None:
        """Export that engine `index` is in `state`."""
        for s in State:
            self._engines.set(float(s == state), {"run": self.run, "engine": str(index), "state": str(s)})


def prometheus_name(key: str) -> tuple[str, dict[str, str]]:
    """Convert a metric's contract name to Prometheus' name and tags; same parts give same tags.

    `reward/total/iqa` -> ("tatar_reward_total", {"task": "iqa"})
    """
    parts, tags = key.split("/"), {}
    if parts[-1] in TASKS:
        tags["task"] = parts.pop()
    elif parts[0] == "eval" and len(parts) == 3:
        tags["dataset"] = parts.pop(1)
    return re.sub(r"[^a-zA-Z0-9_]", "_", "_".join(["tatar", *parts])), tags
