"""A plan says what would run, from the configuration alone; the global batch never changes with the hardware."""

import functools
import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console

from tatar_dist.config.load import load_config
from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import UserError
from tatar_dist.plan.plan import Split, as_table, ray_commands, resolve

FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25000"))  # a thousandth of them, for what takes long
CONFIGS = Path(__file__).parents[2] / "configs"


def plan(stage, *words):
    name = {"evaluate": "eval"}.get(stage, stage)
    return resolve(load_config([str(CONFIGS / f"{name}.yaml")], list(words)), stage)


@pytest.mark.parametrize(("nodes", "learners"), [(1, 8), (4, 32), (16, 128), (40, 128)])
def test_sft_recipe_keeps_its_batch_of_128_on_any_number_of_nodes(nodes, learners):
    p = plan("sft", f"cluster.nodes={nodes}")
    assert (p.learners, p.engines, p.gpus_used) == (learners, 0, learners)
    assert p.split == Split(128, learners, 16384)


@pytest.mark.parametrize(
    ("nodes", "learners", "engines"),
    [(1, 4, 4), (4, 16, 16), (16, 64, 16)],  # a step of 16 prompts feeds 16 engines at most
)
def test_grpo_recipe_shares_gpus_between_learners_and_engines(nodes, learners, engines):
    p = plan("grpo", f"cluster.nodes={nodes}")
    assert (p.learners, p.engines) == (learners, engines)
    assert p.split == Split(128, learners, 16384)
    assert p.processes == {"controller": 1, "learners": learners, "engines": engines, "reward": 1}


def test_idle_gpus_are_said():
    assert "48 of 128 GPUs stay idle" in plan("grpo", "cluster.nodes=16").notes[0]
    assert plan("grpo", "cluster.nodes=16", "grpo.prompts_per_step=64").notes == ()


def test_a_clip_that_cannot_act_is_named():
    words = ["grpo.prompts_per_step=64", "grpo.objective=cispo", "grpo.clip_high=0.28"]
    (note,) = plan("grpo", "cluster.nodes=16", *words).notes
    assert note.startswith("no effect with grpo.inner_iterations=1")
    assert note.endswith(": grpo.objective=cispo, grpo.clip_high=0.28")
    assert plan("grpo", "cluster.nodes=16", *words, "grpo.inner_iterations=2").notes == ()


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
    assert (p.split.rows, p.split.ranks) == (64, 2)


def test_any_number_of_learners_up_to_the_rows_can_share_a_batch():
    assert plan("sft", "cluster.learners=3").split == Split(128, 3, 16384)
    with pytest.raises(UserError, match=r"sft.global_batch=128 .*200 learners: use cluster.learners=128 or fewer$"):
        plan("sft", "cluster.learners=200", "cluster.nodes=32")


def test_too_few_gpus_says_how_many_are_needed_and_there():
    with pytest.raises(UserError, match=r"needs 12 GPUs \(8 for learners \+ 4 for engines\), there are 8"):
        plan("grpo", "cluster.learners=8", "rollout.engines=4")
    with pytest.raises(UserError, match="sft needs 16 GPUs .*there are 8"):
        plan("sft", "cluster.learners=16")


def test_engine_larger_than_a_node_is_refused():
    with pytest.raises(UserError, match="rollout.tensor_parallel=16"):
        plan("grpo", "cluster.nodes=4", "rollout.tensor_parallel=16")


def test_engines_are_counted_by_node_beside_the_learners():
    words = ["cluster.nodes=2", "cluster.gpus_per_node=8", "rollout.tensor_parallel=3"]
    assert plan("evaluate", *words).engines == 4  # two on each node, though 16 GPUs are five times three
    with pytest.raises(UserError, match=r"tensor_parallel=3: an engine must fit a node, and 4 of 5 engines do: lower"):
        plan("evaluate", *words, "rollout.engines=5")
    six = ["cluster.nodes=2", "cluster.gpus_per_node=4", "cluster.learners=6", "rollout.tensor_parallel=2"]
    assert plan("grpo", *six).engines == 1
    with pytest.raises(UserError, match=r"0 of 1 engines do beside 6 learners \(cluster.learner_placement=spread\)"):
        plan("grpo", *six, "cluster.learner_placement=spread")


@pytest.mark.parametrize(
    ("stage", "words", "size", "line"),
    [
        ("sft", ["cluster.nodes=2"], 8, None),
        (
            "sft",
            ["cluster.nodes=2"],
            3,
            r"size=3 does not divide the learners of every node \(8, 8\): use a divisor of 8$",
        ),
        ("sft", ["cluster.nodes=2", "cluster.learners=12"], 8, r"\(8, 4\): use a divisor of 4$"),
        ("sft", ["cluster.nodes=2", "cluster.learners=12"], 4, None),
        (
            "sft",
            ["cluster.nodes=2", "cluster.learners=12", "cluster.learner_placement=spread"],
            4,
            r"\(6, 6\): .* of 6$",
        ),
        ("grpo", ["cluster.nodes=2"], 8, None),  # learners fill the first node
        ("sft", ["cluster.gpus_per_node=0", "cluster.learners=4", "cluster.nodes=2"], 2, None),
        ("sft", ["cluster.gpus_per_node=0", "cluster.learners=4", "cluster.nodes=2"], 3, r"\(4\): use a divisor of 4$"),
        ("evaluate", [], 3, None),  # no learners
    ],
)
def test_a_copy_of_the_weights_needs_as_many_ranks_on_every_node(stage, words, size, line):
    resolved = functools.partial(plan, stage, *words, f"cluster.zero_hpz_partition_size={size}")
    if line is None:
        assert resolved().learners % size == 0
    else:
        with pytest.raises(UserError, match=line):
            resolved()


def test_local_engines_of_a_rationale_run_are_as_many_as_the_gpus_hold():
    words = ["output=unused", "model.path=unused", "rollout.tensor_parallel=2"]
    assert resolve(load_config([str(CONFIGS / "rationale.yaml")], words), "evaluate").engines == 4


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
    assert not any("samples" in note for note in p.notes)
    only = plan("grpo", f"data.train=[{manifest}]", "data.iqa_fraction=1")
    assert not any("samples" in note for note in only.notes)
    write_manifest(tmp_path / "iqa.parquet", [{"sample_id": "0", "task": "iqa", "split": "train"} | same])
    notes = plan("grpo", f"data.train=[{tmp_path}/iqa.parquet]").notes
    assert "no iaa samples, yet data.iqa_fraction=0.5: the run would stop" in notes
    assert plan("grpo", f"data.train=[{manifest}]", "grpo.max_steps=5").steps == 5
    assert plan("grpo", f"data.train=[{manifest},{tmp_path}/none.parquet]").steps is None


def test_several_nodes_show_the_lines_that_start_ray():
    token, head, others, stage = ray_commands(plan("sft", "cluster.nodes=4"), "tatar-dist sft")
    assert "source launch/ray_security.sh" in token
    assert "ray start --head" in head and "other 3 nodes" in others and "cluster.address=" in stage
    assert ray_commands(plan("sft"), "tatar-dist sft") == ["tatar-dist sft"]


@settings(deadline=None, max_examples=FUZZ_EXAMPLES // 1000)
@given(
    nodes=st.integers(1, 40),
    gpus=st.integers(1, 8),
    tp=st.sampled_from([1, 2, 4]),
    stage=st.sampled_from(["sft", "grpo"]),
)
def test_automatic_counts_always_fit(nodes, gpus, tp, stage):
    assume(tp <= gpus and nodes * gpus >= 1 + tp)
    p = plan(stage, f"cluster.nodes={nodes}", f"cluster.gpus_per_node={gpus}", f"rollout.tensor_parallel={tp}")
    assert p.learners >= 1 and p.gpus_used <= p.gpus
    assert (p.split.rows, p.split.ranks) == (128, p.learners)


@pytest.mark.parametrize(
    ("steps", "warmup", "said"),
    [(8, 10, "8, all in the warm-up of 10: the learning rate stays below lr"), (20, 10, "20, 10 of them warm-up")],
)
def test_no_more_steps_warm_up_than_there_are(steps, warmup, said):
    console = Console(width=120, file=io.StringIO())
    console.print(as_table(plan("sft", f"sft.max_steps={steps}", f"sft.optim.warmup_steps={warmup}")))
    assert said in console.file.getvalue()


@pytest.mark.parametrize(
    ("words", "way"),
    [
        ([], "nccl"),
        (["cluster.placement=colocated"], "cuda_ipc"),
        (["cluster.gpus_per_node=0"], "object_store"),
        (["cluster.gpus_per_node=0", "cluster.placement=colocated"], "object_store"),
        (["rollout.push=object_store"], "object_store"),
    ],
)
def test_weights_take_the_fastest_way_that_the_machine_has(words, way):
    p = plan("grpo", *words)
    assert p.push == way == p.to_dict()["push"]
    console = Console(width=100, file=io.StringIO())
    console.print(as_table(p))
    assert f"pushed by {way}" in console.file.getvalue()
    assert plan("sft").push is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rollout.push=nccl", "cluster.placement=colocated"], "does not work with cluster.placement=colocated"),
        (["rollout.push=cuda_ipc"], "does not work with cluster.placement=disaggregated"),
        (["rollout.push=nccl", "cluster.gpus_per_node=0"], "needs GPUs, cluster.gpus_per_node is 0"),
    ],
)
def test_a_way_of_pushing_that_the_machine_does_not_have_is_refused(words, message):
    with pytest.raises(UserError, match=f"^{words[0]} {message}: use auto$"):
        plan("grpo", *words)


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


def test_a_machine_without_a_gpu_is_told_of_the_config_for_cpus(monkeypatch):
    from tatar_dist.cluster import ray_cluster as cluster

    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 8.0})
    asked = SimpleNamespace(_asked={"CPU": 0.0, "GPU": 0.0})
    with pytest.raises(UserError, match="4 learner.*need 4 GPUs, Ray has 0.*gpus_per_node=0.*configs/demo.yaml"):
        cluster.Cluster._reserve(asked, "learner(s)", 4, 1.0, 1)


def test_learners_packed_onto_one_node_share_its_cores():
    from tatar_dist.cluster.ray_cluster import Cluster

    config = SimpleNamespace(cluster=SimpleNamespace(gpus_per_node=8, nodes=4))
    for gpu, processes, threads in ((True, 8, 12), (True, 32, 12), (True, 2, 48), (False, 32, 3)):
        assert Cluster.threads(SimpleNamespace(gpu=gpu, cores=96, _sides=1, config=config), processes) == threads
