"""Engines on GPUs: sleep gives memory back and costs no answer, two GPUs answer as one, bfloat16 stays near."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from pathlib import Path

import pytest
import ray

from tatar_dist.cluster.selfcheck import verify
from tatar_dist.plan.plan import push_way
from tatar_dist.sync import weight_push


def used_bytes() -> int:
    """Memory in use on the first GPU by all processes."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return int(subprocess.run(query, check=True, capture_output=True, text=True).stdout) << 20


def test_sleep_frees_memory_and_the_engine_says_the_same_afterwards(model_untied, make_config, make_rig):
    config = make_config(model_untied, "rollout.push=cuda_ipc", "cluster.placement=colocated")
    with make_rig(config) as rig:
        before, awake = rig.greedy(), used_bytes()
        ray.get(rig.engine.sleep.remote(), timeout=60)
        assert used_bytes() < awake - (1 << 30)  # the KV cache alone is larger
        failed = (
            weight_push(config, push_way(config)).push(rig.learners, {0: rig.engine}, 1).failed
        )  # with the initial weights
        assert failed == {}
        rig.pushed(1)
        assert rig.greedy() == before


@pytest.mark.gpus(3)
def test_two_gpus_answer_greedily_as_one(model_untied, make_config, make_rig):
    answers = []
    for tp in (1, 2):
        with make_rig(make_config(model_untied, f"rollout.tensor_parallel={tp}")) as rig:
            rig.learn()
            rig.pool.push(partial(weight_push(rig.config, push_way(rig.config)).push, rig.learners), 1)
            answers.append(rig.greedy())
    assert answers[0] == answers[1]


@pytest.mark.gpus(2)
def test_bfloat16_engine_and_learner_agree_within_the_default_limit(model_untied, make_config, make_rig):
    config = make_config(model_untied, "model.dtype=bfloat16", "grpo.logprob_gap_limit=0.05")
    with make_rig(config) as rig:
        gap = verify(rig.pool, rig.learners, rig.prompts, config)
        assert 0 < gap["sync/logprob_gap"] < 0.05


@pytest.mark.gpus(2)
@pytest.mark.parametrize("push", ["object_store", "nccl"])
def test_two_steps_of_grpo(push, model_untied, make_config):
    from tatar_dist import grpo as controller

    config = make_config(model_untied, f"rollout.push={push}", "grpo.max_steps=2", "grpo.logprob_gap_limit=0.001")
    controller.run(config)
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all(json.loads(line)["sync/logprob_gap"] < 0.001 for line in lines)
