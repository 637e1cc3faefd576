"""What was never run on its hardware is said, and only that."""

from __future__ import annotations

from dataclasses import replace

from tatar_dist.config import Config
from tatar_dist.proven import HERE, NEVER, ONE_GPU, PATHS, unproven, warnings_for


def config(gpus=0, placement="disaggregated", push="object_store", tp=1):
    c = Config()
    return replace(
        c,
        cluster=replace(c.cluster, gpus_per_node=gpus, placement=placement),
        rollout=replace(c.rollout, push=push, tensor_parallel=tp),
    )


def test_a_cpu_run_takes_only_proven_paths():
    assert warnings_for(config()) == []


def test_every_unproven_path_that_is_taken_is_named():
    names = {p.key for p in unproven(config(8, "colocated", "cuda_ipc", 2))}
    assert names == {
        "cluster.gpus_per_node>0",
        "rollout.push=cuda_ipc",
        "cluster.placement=colocated",
        "rollout.tensor_parallel>1",
    }
    assert [w.split(" (")[0] for w in warnings_for(config(8, push="nccl"))] == [
        "learners over NCCL, engines on GPUs",
        "weight push through NCCL",
    ]


def test_every_path_has_one_of_the_three_statuses():
    assert {p.status for p in PATHS} <= {HERE, ONE_GPU, NEVER}
