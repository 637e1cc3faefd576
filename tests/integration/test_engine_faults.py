"""Engines that run out of memory, answer nonsense or hang: replaced, and the run goes on, or says why it cannot."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import psutil
import pytest
import ray

from tatar_dist import grpo as controller
from tatar_dist import trainer
from tatar_dist.cluster.ray_cluster import Cluster
from tatar_dist.prompts.source import PromptSource
from tatar_dist.rollout.engine import RolloutEngine, Sampling
from tatar_dist.rollout.pool import EngineFailed
from tatar_dist.run.directory import RunDirectory
from tatar_dist.run.events import read_events
from tatar_dist.sampling import make_sampler

pytestmark = pytest.mark.usefixtures("shared_ray")


class TroubledEngine(RolloutEngine):
    """Engine 0 runs out of memory in its first call of step 0, and answers nonsense in its first call of step 1;
    engine 1 runs out of memory in step 9."""

    def generate(self, prompts, sampling, version):
        first = Path(self.config.output) / f"first-call-of-step-{sampling.step}"
        if (self.index, sampling.step) not in ((0, 0), (0, 1), (1, 9)) or first.exists():
            return super().generate(prompts, sampling, version)
        first.touch()
        if sampling.step != 1:
            raise MemoryError("no room for the KV cache")
        groups = super().generate(prompts, sampling, version)
        bad = [dataclasses.replace(c, logprobs=(math.nan,) * len(c.token_ids)) for c in groups[0].completions]
        return [dataclasses.replace(groups[0], completions=tuple(bad)), *groups[1:]]


def test_engines_out_of_memory_or_answering_nonsense_are_replaced_and_too_few_end_the_run(model_untied, make_config):
    config = make_config(model_untied, "rollout.deterministic=true")
    with RunDirectory(config) as directory, Cluster(config, directory.events.log) as cluster:
        pool = cluster.engines(2, cls=TroubledEngine)
        pool.start(1)
        pool.started()
        prompts = PromptSource(config, directory).batch(make_sampler(config), 4, 0)
        asked = sorted(p.group_id for p in prompts)
        step, dead = 0, []
        while len(dead) < 2:  # step 2 and later until engine 0 has been back for the nonsense
            groups = pool.generate(prompts, Sampling(2, 1.0, 16, 0, step))
            assert [g.prompt.group_id for g in groups] == asked
            assert all(math.isfinite(p) for g in groups for c in g.completions for p in c.logprobs)
            dead = [e for e in read_events(directory.path) if e["event"] == "engine/dead"]
            back = any(e["event"] == "engine/restarting" for e in read_events(directory.path))
            step = 1 if back and pool.engines[0].health.state == "healthy" else 2
        assert [e["engine"] for e in dead] == [0, 0]
        assert "MemoryError: no room for the KV cache" in dead[0]["reason"]
        assert "log-probability that is none" in dead[1]["reason"]

        pool.config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, min_engines=2))
        pool.engines[1].health.max_restarts = 0
        with pytest.raises(EngineFailed, match="1 of 2 engines are left, rollout.min_engines=2; engine 1: MemoryError"):
            pool.generate(prompts, Sampling(2, 1.0, 16, 0, 9))
        assert [e.health.state == "gone" for e in pool.engines] == [False, True]


def test_learners_that_start_again_leave_room_for_the_engines_that_died_with_them(model_untied, make_config):
    half = ray.cluster_resources()["CPU"] / 2  # two learners would take all
    words = (f"cluster.learner_cpus={half}", "cluster.engine_cpus=1", "cluster.node_wait_s=1")
    with Cluster(make_config(model_untied, *words)) as cluster:
        here = {"node": ray.get_runtime_context().get_node_id()}
        dead = cluster.engines(2)
        assert dead.missing([here["node"]]) == 1
        (learner,) = cluster.learners(2, again=True).actors
        assert ray.get(learner.__ray_call__.remote(lambda _: os.nice(0))) == os.nice(0)  # Ray's own workers are nicer
        cluster.end_learners()
        engine = dead.engines[1]
        engine.health.ready(**here)  # one that lives has its place already
        engine.call, engine.actor = None, ray.remote(num_cpus=0)(RolloutEngine).remote(cluster.config, 1)
        process = psutil.Process(ray.get(engine.actor.__ray_call__.remote(lambda _: os.getpid())))
        assert dead.missing([here["node"]]) == 0 and dead.missing(["another node"]) == 1
        assert len(cluster.learners(2, again=True).actors) == 2
        ray.kill(engine.actor)  # returns before the process ends; the pool has not noticed
        process.wait(60)
        assert dead.missing([here["node"]]) == 1


def test_a_stalled_run_writes_all_stacks_and_restarts_what_hangs(model_untied, make_config):
    config = make_config(
        model_untied,
        "grpo.max_steps=3",
        "rollout.engines=1",
        "cluster.learners=1",
        "failpoints=['engine.generate:stop:step=1']",
        "watch.stall_action=restart",
        "watch.stall_min_s=5",
        "watch.stall_factor=3",  # of a step on this machine, however busy it is
    )
    controller.run(config)
    run = Path(config.output)
    events = read_events(run)
    assert events[-1]["event"] == "run/end"
    assert [e["step"] for e in events if e["event"] == "step/done"] == [0, 0, 1, 2]  # no checkpoint: from the start
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]
    (stall,) = [e for e in events if e["event"] == "stall"]
    assert (stall["step"], stall["phase"], stall["action"]) == (1, "generate", "restart")
    assert {"controller", "learner-0", "engine-0", "reward"} <= set(stall["processes"])
    for name in stall["processes"]:
        assert (run / stall["stacks"] / f"{name}.txt").stat().st_size > 100
    dead = next(e for e in events if e["event"] == "engine/dead")
    assert dead["time"] > stall["time"] and dead["reason"] == "was in a call when the run stalled or stopped"
    failed = next(e for e in events if e["event"] == "learners/failed")
    assert "no progress for" in failed["reason"]


def test_engines_beside_learners_are_up_before_these_take_memory_again(model_untied, make_config, monkeypatch):
    monkeypatch.setattr(trainer, "unproven", lambda _: True)  # as on GPUs: the run checks itself before it trains
    words = ["cluster.placement=colocated", "grpo.max_steps=2", "checkpoint.every=1"]
    config = make_config(model_untied, *words, "failpoints=['learner.backward:kill:step=1:rank=0']")
    controller.run(config)
    names = [e["event"] for e in read_events(Path(config.output))]
    again = names[names.index("learners/restarting") :]
    assert again[: again.index("learners/ready")].count("engine/ready") == 2
    assert names[-1] == "run/end" and names.count("engine/ready") == 4
    # the check's own pushes, moved and true, another after it because the engines slept, and one a step
    assert names[: names.index("step/done")].count("push/done") == 4 and names.count("push/checked") == 2
    assert "push/fallback" not in names
