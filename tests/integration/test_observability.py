"""Stacks of actors that hang, on two real Ray nodes, and a run's metrics at a node's Prometheus endpoint."""

from __future__ import annotations

import os
import signal
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster as RayCluster

from tatar_dist.cluster.prometheus import Exporter
from tatar_dist.config.schema import WatchConfig
from tatar_dist.faults import stall
from tatar_dist.faults.stall import StallDetector, processes_of
from tatar_dist.run.events import Events, read_events
from tatar_dist.run.process import open_log, process_facts


class Engine:
    """Not an engine, but an actor that opens its log and hangs like one."""

    def __init__(self, run: str, name: str) -> None:
        open_log(run, name)

    def facts(self) -> dict[str, Any]:
        return process_facts()

    def hang_for_ever(self) -> None:
        os.write(2, b"libnative: hanging now\n")
        while True:
            pass


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[RayCluster]:
    """Two raylets; what asks for the resource `far` runs on the one that is not ours."""
    ray.shutdown()  # the one that modules share
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 80 << 20})
    cluster.far = cluster.add_node(num_cpus=2, resources={"far": 2}, object_store_memory=80 << 20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def wait_for(condition: Callable[[], object], what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


def the_stall(run) -> dict | None:
    return next((e for e in read_events(run) if e["event"] == "stall"), None)


def test_metrics_reach_the_exporter_of_the_node(two_nodes):
    exporter = Exporter("runs/x")
    exporter.step({"reward/total/iqa": 0.25, "reward/total/iaa": -1.5, "eval/koniq/srcc": 0.5, "time/step": 2.0})
    exporter.step({"reward/total/iqa": 0.75})
    exporter.engine(1, "dead")
    exporter.engine(1, "healthy")
    mine = ray.get_runtime_context().get_node_id()
    node = next(n for n in ray.nodes() if n["NodeID"] == mine)
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def samples() -> dict[tuple[str | None, ...], float]:
        from prometheus_client.parser import text_string_to_metric_families

        page = urllib.request.urlopen(url, timeout=10).read().decode()
        return {
            (s.name, *(s.labels.get(k) for k in ("task", "dataset", "engine", "state"))): s.value
            for family in text_string_to_metric_families(page)
            for s in family.samples
            if s.labels.get("run") == "runs/x"
        }

    nothing = (None,) * 4
    wait_for(lambda: samples().get(("ray_tatar_steps_total", *nothing)) == 2, "the second step")
    found = samples()
    assert found["ray_tatar_reward_total", "iqa", None, None, None] == 0.75
    assert found["ray_tatar_reward_total", "iaa", None, None, None] == -1.5
    assert found["ray_tatar_eval_srcc", None, "koniq", None, None] == 0.5
    assert found["ray_tatar_time_step", *nothing] == 2.0
    states = {k[4]: v for k, v in found.items() if k[0] == "ray_tatar_engine_state"}
    assert states["healthy"] == 1 and states["dead"] == 0


def test_a_stall_writes_down_what_actors_on_other_nodes_hang_in(two_nodes, tmp_path, monkeypatch):
    events = Events(tmp_path)
    events.log("run/start", stage="grpo", engines=3)
    places = [{"num_cpus": 1}, {"resources": {"far": 1}}, {"resources": {"far": 1}}]
    here = {"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}}  # the class is this file's
    remote = ray.remote(runtime_env=here)(Engine)
    engines = [remote.options(**p).remote(str(tmp_path), f"engine-{i}") for i, p in enumerate(places)]
    facts = ray.get([e.facts.remote() for e in engines], timeout=300)
    assert facts[0]["node"] != facts[1]["node"] == facts[2]["node"]
    for i, known in enumerate(facts):
        events.log("engine/ready", engine=i, **known)
    hanging = [engine.hang_for_ever.remote() for engine in engines]
    for i in range(3):
        out = tmp_path / "logs" / f"engine-{i}.out"
        wait_for(lambda out=out: "libnative: hanging now" in out.read_text(), "the hang")
    os.kill(facts[2]["pid"], signal.SIGSTOP)

    config = WatchConfig(stall_min_s=0.2, stall_action="restart")
    with StallDetector(tmp_path, config, 0.2, events, lambda: processes_of(tmp_path)):
        wait_for(lambda: the_stall(tmp_path), "the stall")
    found = the_stall(tmp_path)
    assert found["processes"] == ["controller", "engine-0", "engine-1", "engine-2"]
    assert found["silent"]["engine-2"] == "T (stopped)"
    for name in ("engine-0", "engine-1", "engine-2"):
        text = (tmp_path / found["stacks"] / f"{name}.txt").read_text()
        assert "hang_for_ever" in text
        assert (": T (stopped)" in text) == (name == "engine-2")

    # the other node is lost (the last test of this file): its processes are named, and nobody waits for them for ever
    monkeypatch.setattr(stall, "NODE_S", 5.0)
    two_nodes.remove_node(two_nodes.far, allow_graceful=False)
    start = time.monotonic()
    stacks = stall.stacks_of_run(processes_of(tmp_path))
    assert time.monotonic() - start < 60
    assert stacks["engine-0"].answered and "hang_for_ever" in stacks["engine-0"].text
    assert stacks["engine-1"].state == "unknown"
    assert f"node {facts[1]['node']} did not answer" in stacks["engine-1"].text
    assert len(hanging) == 3  # kept: a dropped reference would cancel nothing, but says they still hang
