"""What was never run on its hardware is said, and only that."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tatar_dist.commands import doctor
from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config
from tatar_dist.plan.proven import COVERAGE, LEGEND, NEVER, unproven, warnings_for


@pytest.fixture(autouse=True)
def no_records(tmp_path, monkeypatch):
    """Whoever runs the tests may have records of gpu-check."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def config(gpus=0, placement="disaggregated", push="object_store", tp=1):
    c = Config()
    return replace(
        c,
        cluster=replace(c.cluster, gpus_per_node=gpus, placement=placement),
        rollout=replace(c.rollout, push=push, tensor_parallel=tp),
    )


def test_a_cpu_run_takes_only_proven_paths():
    assert warnings_for(config(), "grpo") == []


def test_every_unproven_path_that_is_taken_is_named():
    names = {p.key for p in unproven(config(8, "colocated", "cuda_ipc", 2))}
    assert names == {
        "cluster.gpus_per_node>0",
        "rollout.push=cuda_ipc",
        "cluster.placement=colocated",
        "rollout.tensor_parallel>1",
    }
    auto = {p.key for p in unproven(config(8, "colocated", "auto", 2))}
    assert auto == names and unproven(config(push="auto")) == []


@pytest.mark.parametrize(
    "word",
    ["cluster.zero_hpz_partition_size=2", "cluster.offload_optimizer=true", "rollout.quantization=fp8"],
)
def test_what_never_ran_on_a_gpu_is_named_there_alone(word):
    words = ["output=x", "model.path=m", "grpo.logprob_gap_limit=0.15", word]
    for gpus in (8, 0):
        keys = [p.key.replace(">1", "=2") for p in unproven(load_config([], [*words, f"cluster.gpus_per_node={gpus}"]))]
        assert (word in keys) == (gpus > 0)


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        ("sft", ["cluster.gpus_per_node>0"]),
        ("evaluate", ["cluster.gpus_per_node>0", "rollout.tensor_parallel>1"]),
        ("grpo", ["cluster.gpus_per_node>0", "rollout.push=nccl", "rollout.tensor_parallel>1"]),
    ],
)
def test_a_stage_warns_of_what_it_takes_and_promises_a_check_only_where_there_is_one(stage, keys):
    warnings = warnings_for(config(8, push="nccl", tp=2), stage)
    assert [w.split("(")[1].split(")")[0] for w in warnings] == keys
    assert all(("checks itself" in w) == (stage == "grpo") for w in warnings)


def test_doctor_asks_to_look_at_what_was_never_run_and_is_content_all_the_same():
    checks = list(doctor._paths())
    assert {c.name for c in checks if not c.ok} == {p.name for p in COVERAGE if p.status == NEVER} != set()
    assert all("gpu-check" in c.hint for c in checks) and doctor.as_json(checks)["ok"]
    assert doctor.as_table(checks, everything=True).caption == LEGEND
