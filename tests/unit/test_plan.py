"""A plan says what would run, from the configuration alone; the global batch never changes with the hardware."""

from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tatar_dist.config import load_config
from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import UserError
from tatar_dist.plan import fewer_learners, ray_commands, resolve, split_of, split_rows

CONFIGS = Path(__file__).parents[2] / "configs"


def plan(stage, *words):
    name = {"evaluate": "eval"}.get(stage, stage)
    return resolve(load_config([str(CONFIGS / f"{name}.yaml")], list(words)), stage)


@pytest.mark.parametrize(
    ("nodes", "learners", "micro", "accumulation"),
    [(1, 8, 8, 2), (4, 32, 4, 1), (16, 128, 1, 1)],  # one node is the published 8 x 8 x 2
)
def test_sft_recipe_keeps_its_batch_of_128_on_any_number_of_nodes(nodes, learners, micro, accumulation):
    p = plan("sft", f"cluster.nodes={nodes}")
    assert (p.learners, p.engines, p.gpus_used) == (learners, 0, nodes * 8)
    assert (p.split.rows, p.split.micro_batch, p.split.accumulation) == (128, micro, accumulation)


@pytest.mark.parametrize(
    ("nodes", "learners", "engines", "micro", "accumulation"),
    [(1, 4, 4, 8, 4), (4, 16, 16, 8, 1), (16, 64, 16, 2, 1)],  # a step of 16 prompts feeds 16 engines at most
)
def test_grpo_recipe_shares_gpus_between_learners_and_engines(nodes, learners, engines, micro, accumulation):
    p = plan("grpo", f"cluster.nodes={nodes}")
    assert (p.learners, p.engines) == (learners, engines)
    assert (p.split.rows, p.split.micro_batch, p.split.accumulation) == (128, micro, accumulation)
    assert p.processes == {"controller": 1, "learners": learners, "engines": engines, "reward": 1}


def test_idle_gpus_are_said():
    assert "48 of 128 GPUs stay idle" in plan("grpo", "cluster.nodes=16").notes[0]
    assert plan("grpo", "cluster.nodes=16", "grpo.prompts_per_step=64").notes == ()


def test_tensor_parallel_engines_count_all_their_gpus_and_processes():
    p = plan("grpo", "rollout.tensor_parallel=2")
    assert (p.learners, p.engines, p.gpus_used) == (4, 2, 8)
    assert p.processes["engines"] == 4


def test_evaluation_gives_every_gpu_to_engines():
    p = plan("evaluate", "cluster.nodes=4", "rollout.tensor_parallel=2")
    assert (p.learners, p.engines, p.split) == (0, 16, None)


def test_cpu_demo_needs_no_gpus():
    p = resolve(load_config([str(CONFIGS / "demo.yaml")], ["output=x"]), "grpo")
    assert (p.learners, p.engines, p.gpus_used, p.steps) == (2, 1, 0, 120)
    assert p.split.ranks * p.split.accumulation * p.split.micro_batch == 64


def test_batch_that_does_not_divide_names_the_nearest_ranks():
    with pytest.raises(UserError, match=r"sft.global_batch=128.*3 learners.*cluster.learners=2 or 4"):
        plan("sft", "cluster.learners=3")
    with pytest.raises(UserError, match=r"cluster.learners=128$"):
        plan("sft", "cluster.learners=200", "cluster.nodes=32")


def test_too_few_gpus_says_how_many_are_needed_and_there():
    with pytest.raises(UserError, match=r"needs 12 GPUs \(8 for learners \+ 4 for engines\), there are 8"):
        plan("grpo", "cluster.learners=8", "rollout.engines=4")
    with pytest.raises(UserError, match="sft needs 16 GPUs .*there are 8"):
        plan("sft", "cluster.learners=16")


def test_engine_larger_than_a_node_is_refused():
    with pytest.raises(UserError, match="rollout.tensor_parallel=16"):
        plan("grpo", "cluster.nodes=4", "rollout.tensor_parallel=16")


def test_steps_come_from_the_manifests_where_they_exist(tmp_path):
    """The larger task, at its half of a batch, seen `epochs` times: ceil(90 / 8) = 12 steps an epoch."""
    manifest = tmp_path / "train.parquet"
    rows = [("iqa", "train")] * 90 + [("iaa", "train")] * 20 + [("iaa", "test")] * 200
    same = {"dataset": "d", "score": 50.0, "image": "x"}
    write_manifest(
        manifest,
        ({"sample_id": str(i), "task": t, "split": s} | same | {"dataset": t} for i, (t, s) in enumerate(rows)),
    )
    p = plan("grpo", "data.train=[train.parquet]", f"data.root={tmp_path}")
    assert (p.samples, p.steps) == ({"iqa": 90, "iaa": 20}, 36)
    assert plan("grpo", f"data.train=[{manifest}]", "grpo.max_steps=5").steps == 5
    assert plan("grpo", f"data.train=[{manifest},{tmp_path}/none.parquet]").steps is None


def test_several_nodes_show_the_lines_that_start_ray():
    token, head, others, stage = ray_commands(plan("sft", "cluster.nodes=4"), "tatar-dist sft")
    assert "source launch/ray_security.sh" in token
    assert "ray start --head" in head and "other 3 nodes" in others and "cluster.address=" in stage
    assert ray_commands(plan("sft"), "tatar-dist sft") == ["tatar-dist sft"]


@given(rows=st.integers(1, 512), ranks=st.integers(1, 600), most=st.integers(1, 64))
def test_a_split_is_exact_and_never_exceeds_the_micro_batch(rows, ranks, most):
    if rows % ranks:
        with pytest.raises(UserError) as e:
            split_rows(rows, ranks, most)
        named = str(e.value).rsplit("=", 1)[1].split(" or ")
        assert all(rows % int(n) == 0 for n in named)
        return
    s = split_rows(rows, ranks, most)
    assert s.ranks * s.micro_batch * s.accumulation == rows
    assert s.micro_batch <= most
    assert not any(s.rows_per_rank % m == 0 for m in range(s.micro_batch + 1, min(most, s.rows_per_rank) + 1))


@settings(deadline=None)
@given(
    nodes=st.integers(1, 40),
    gpus=st.integers(1, 8),
    tp=st.sampled_from([1, 2, 4]),
    stage=st.sampled_from(["sft", "grpo"]),
)
def test_automatic_counts_always_fit_and_divide(nodes, gpus, tp, stage):
    assume(tp <= gpus and nodes * gpus >= 1 + tp)
    p = plan(stage, f"cluster.nodes={nodes}", f"cluster.gpus_per_node={gpus}", f"rollout.tensor_parallel={tp}")
    assert p.learners >= 1 and p.gpus_used <= p.gpus
    assert p.split.ranks * p.split.accumulation * p.split.micro_batch == 128


def test_colocated_engines_share_the_learners_gpus():
    words = ["cluster.placement=colocated", "cluster.gpus_per_node=8", "cluster.learners=0", "rollout.engines=0"]
    shared = plan("grpo", *words)
    assert (shared.learners, shared.engines, shared.gpus_used) == (8, 8, 8) and shared.colocated
    apart = plan("grpo", *words[1:])
    assert (apart.learners, apart.engines, apart.gpus_used) == (4, 4, 8) and not apart.colocated
    assert not plan("sft", words[0]).colocated
    for more in (["rollout.tensor_parallel=2"], ["cluster.learners=4", "rollout.engines=5"]):
        with pytest.raises(UserError, match="cluster.placement=colocated puts one engine on a learner's GPU"):
            plan("grpo", *words, *more)


def test_the_numbers_of_learners_that_a_run_may_go_on_with_divide_its_batch():
    c = load_config([str(CONFIGS / "grpo.yaml")], ["grpo.prompts_per_step=6", "grpo.group_size=4"])
    assert fewer_learners(c, "grpo", 8) == [6, 4, 3, 2, 1]
    assert fewer_learners(c, "grpo", 1) == []
    assert split_of(c, "grpo", 3).rows_per_rank == 8
