"""Weights arrive in engines on GPUs, by each way, and a skipped push is noticed by the same check."""

from __future__ import annotations

import pytest
import ray

from tatar_dist.cluster.selfcheck import verify
from tatar_dist.learner.actor import WeightsOutOfSync
from tatar_dist.plan.plan import push_way
from tatar_dist.sync import weight_push

FAST = ("grpo.optim.lr=0.003", "grpo.optim.schedule=constant", "grpo.logprob_gap_limit=0.001")


def moved_and_pushed(rig, transport, version):
    rig.learn()
    with pytest.raises(WeightsOutOfSync):
        verify(rig.pool, rig.learners, rig.prompts, rig.config)  # the control: not pushed yet
    pushed = transport.push(rig.learners, {0: rig.engine}, version)
    assert pushed.failed == {} and pushed.sent > 0
    rig.pushed(version)
    assert verify(rig.pool, rig.learners, rig.prompts, rig.config)["sync/logprob_gap"] < 1e-3
    transport.push(rig.learners, {0: rig.engine}, version)  # an engine on the learner's GPU slept during the check
    rig.pushed(version)


@pytest.mark.gpus(2)
@pytest.mark.parametrize("model", ["model_untied", "model_tied"])
def test_nccl_push_twice(model, request, make_config, make_rig):
    config = make_config(request.getfixturevalue(model), "rollout.push=nccl", *FAST)
    with make_rig(config) as rig:
        transport = weight_push(config, push_way(config))
        for version in (1, 2):
            moved_and_pushed(rig, transport, version)


@pytest.mark.gpus(2)
def test_nccl_push_to_a_dead_engine_ends_at_the_deadline_and_names_it(model_untied, make_config, make_rig):
    config = make_config(model_untied, "rollout.push=nccl", "rollout.push_timeout_s=20", *FAST)
    with make_rig(config) as rig:
        transport = weight_push(config, push_way(config))
        moved_and_pushed(rig, transport, 1)
        ray.kill(rig.engine)
        failed = transport.push(rig.learners, {0: rig.engine}, 2).failed
        assert list(failed) == [0] and "died" in failed[0].lower()


def test_cuda_ipc_push_on_one_gpu(model_untied, make_config, make_rig):
    config = make_config(model_untied, "rollout.push=cuda_ipc", "cluster.placement=colocated", *FAST)
    with make_rig(config) as rig:
        transport = weight_push(config, push_way(config))
        for version in (1, 2):
            moved_and_pushed(rig, transport, version)
