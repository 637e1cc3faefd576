"""The estimate of a GPU's memory: exact where sizes decide, near what was measured where torch does, never silent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tatar_dist.assets import TINY_MODEL as TINY
from tatar_dist.cli import main
from tatar_dist.config.load import load_config
from tatar_dist.errors import UserError
from tatar_dist.models import costs
from tatar_dist.plan import memory
from tatar_dist.plan.plan import resolve

CONFIGS = Path(__file__).parents[2] / "configs"


def found(stage: str, *words: str, gpu: float = 80):
    config = load_config([str(CONFIGS / f"{stage}.yaml")], list(words))
    return memory.estimate(config, resolve(config, stage), gpu)


def role(estimate: memory.Estimate, name: str) -> memory.Memory:
    return next(m for m in estimate.roles if m.role == name)


def test_parameters_are_those_of_the_model_that_transformers_builds():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(TINY)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    sizes = memory.sizes_of(str(TINY))
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert sizes.vision_parameters == sum(p.numel() for p in model.model.visual.parameters())


@pytest.mark.parametrize(("name", "billions"), [("3B", 3.75), ("7B", 8.29), ("32B", 33.5), ("72B", 73.4)])
def test_released_models_have_the_parameters_that_the_hub_states(name, billions):
    assert memory.sizes_of(f"Qwen/Qwen2.5-VL-{name}-Instruct").parameters / 1e9 == pytest.approx(billions, rel=0.002)


def test_a_model_of_unknown_size_is_said(tmp_path):
    with pytest.raises(UserError, match="no config.json there and no released Qwen2.5-VL"):
        memory.sizes_of("somebody/else")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl", "text_config": {}}')
    with pytest.raises(UserError, match="config.json: not of a Qwen2.5-VL: KeyError"):
        memory.sizes_of(str(tmp_path))


@pytest.mark.parametrize("kind", ["qwen3_vl", None])
def test_another_family_is_not_taken_for_qwen2_5_vl(tmp_path, kind):
    settings = json.loads((TINY / "config.json").read_text()) | {"model_type": kind}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"config.json: model_type is {kind!r}; only the sizes of qwen2_5_vl are known"):
        memory.sizes_of(str(tmp_path))
    config = load_config([str(CONFIGS / "grpo.yaml")], [f"model.path={tmp_path}"])
    assert f"memory is not estimated: {tmp_path}" in memory.estimate(config, resolve(config, "grpo"))


def test_a_twentieth_of_a_gpu_stays_free():
    part = {"weights": 0.95 * 2**30}
    assert memory.Memory("learner", part, 2**30).fits and not memory.Memory("learner", part, 0.999 * 2**30).fits


def test_states_are_sharded_and_the_reference_goes_with_the_kl_term():
    """7B, 4 ranks: 16 bytes a parameter and the reference's 2."""
    parts = role(found("grpo"), "learner").parts
    p = memory.sizes_of("Qwen2.5-VL-7B").parameters
    states = [parts[k] for k in ("weights", "gradients", "optimizer", "reference")]
    assert states == [2 * p / 4, 4 * p / 4, 12 * p / 4, 2 * p / 4]
    assert "reference" not in role(found("grpo", "grpo.kl_beta=0"), "learner").parts
    assert "reference" not in role(found("sft"), "learner").parts
    assert role(found("sft", "sft.optim.name=sgd"), "learner").parts["optimizer"] == 4 * p / 8


def test_a_nodes_copy_holds_all_weights_and_those_of_the_reference():
    p = memory.sizes_of("Qwen2.5-VL-7B").parameters
    copy = "cluster.zero_hpz_partition_size=4"
    assert role(found("grpo", copy), "learner").parts["copy for the node"] == 2 * 2 * p / 4
    assert role(found("sft", copy), "learner").parts["copy for the node"] == 2 * p / 4
    assert "copy for the node" not in role(found("grpo"), "learner").parts


def test_an_offloaded_optimizer_leaves_the_gpu_for_its_node():
    """7B, 8 ranks of a node: gradients twice, rounded up in pinned memory; the optimizer once more for a checkpoint."""
    p, here = memory.sizes_of("Qwen2.5-VL-7B").parameters, found("sft")
    there = found("sft", "cluster.offload_optimizer=true")
    gone = {"gradients", "optimizer"}
    assert gone.isdisjoint(role(there, "learner").parts) and gone < set(role(here, "learner").parts)
    assert here.node == {} and there.to_dict()["node"] == there.node
    shard = 4 * p / 8  # bytes: 1.04e9 elements, more than one sub-group of DeepSpeed's
    assert there.node["optimizer"] == there.node["a checkpoint's copy"] == 8 * 3 * shard
    assert 2**32 > shard > 4e9 > 2**31 and 2**28 > shard - 4e9 > 2**27
    assert there.node["gradients"] == 8 * (2**32 + 2**32 + 2**28)
    two = found("sft", "cluster.offload_optimizer=true", "cluster.nodes=2", "cluster.learners=12").node
    assert two["optimizer"] == 8 * 12 * p / 12  # of the node with more learners


def test_fp8_engines_hold_the_language_models_layers_in_half_the_bytes():
    whole, rounded = (
        role(found("grpo", *words), "engine").parts["weights"]
        for words in ([], ["rollout.quantization=fp8", "grpo.logprob_gap_limit=0.15"])
    )
    assert whole - rounded == 28 * (3584 * (2 * 3584 + 2 * 512) + 3 * 3584 * 18944)


def test_activations_grow_with_a_forward_and_checkpointing_saves_most_of_them():
    def kept(*words: str) -> float:
        return role(found("grpo", *words, gpu=1000), "learner").parts["activations"]

    assert kept("model.gradient_checkpointing=false") > 8 * kept()
    assert kept("grpo.micro_tokens=65536") > 3 * kept("grpo.micro_tokens=16384")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The 14M model of the benches, and an update's MiB above it without and with checkpoints of activations, as
    `bench learner` measures them."""
    pytest.importorskip("torch")
    from tatar_dist.bench import learner
    from tatar_dist.bench.subject import SIZES, Work

    directory = tmp_path_factory.mktemp("measured")
    works = [Work(pixels=448, checkpointing=checkpointing) for checkpointing in (False, True)]
    done = learner.alone(works, True, directory, exact=True)
    sizes = memory.sizes_of(str(directory / str(SIZES.vocab) / "model"))
    return sizes, {w.checkpointing: (w, d["mib"] * 2**20) for w, d in zip(works, done, strict=True)}


@pytest.mark.xdist_group("measured")  # in one process
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_an_update_is_above_the_one_measured_and_near(checkpointing, measured):
    sizes, (work, measured) = measured[0], measured[1][checkpointing]
    image, answers = (work.pixels // 28) ** 2, work.groups * work.size * work.tokens
    tokens = work.groups * (image + 30) + answers
    amounts = sizes, 4 * image * work.groups, tokens
    kept = memory.KEPT["float32"] * memory.kept_elements(*amounts, checkpointing)
    layer = memory.KEPT["float32"] * (checkpointing + memory.GRADIENTS) * max(memory.layer_elements(*amounts))
    last = layer * checkpointing + 4 * sizes.parameters  # gradients are whole here, without ZeRO
    counted = (1 + memory.ALLOCATOR) * max(kept + memory.head_bytes(sizes, answers, 4), kept + layer, last)
    print(f"checkpointing={checkpointing}: estimated {counted / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert measured < counted < 1.7 * measured


def test_chunks_of_logits_are_those_of_the_head():
    head = pytest.importorskip("tatar_dist.learner.policy")
    assert costs.CHUNK == head.CHUNK_BYTES


@pytest.mark.parametrize("stage", ["sft", "grpo"])
@pytest.mark.parametrize("gpu", [24, 40, 48])
def test_what_is_advised_for_learners_fits_when_it_is_done(stage, gpu):
    words = ["model.gradient_checkpointing=false"]
    line = next(a for a in found(stage, *words, gpu=gpu).advice if "learner" in a)
    done = [w.strip(",;") for w in line.split() if "=" in w]
    more = ["cluster.nodes=16"] if any("cluster.learners" in w for w in done) else []
    again = found(stage, *[w for w in words if not any(w.split("=")[0] in d for d in done)], *done, *more, gpu=gpu)
    assert done and role(again, "learner").fits


def test_keys_and_values_take_what_is_left_and_bound_the_sequences():
    """A 7B token has 28 layers x 4 heads x 128 x 2 x 2 bytes = 56 KiB."""
    engine = role(found("grpo", "rollout.max_num_seqs=1000"), "engine")
    cache = 0.85 * 80 * 2**30 - engine.parts["weights"] - memory.ENGINE_OTHER
    assert engine.parts["keys and values"] == pytest.approx(cache)
    assert engine.sequences == int(cache // (57344 * 4096))
    assert role(found("grpo"), "engine").sequences == 64  # rollout.max_num_seqs


def test_an_engine_that_is_too_large_gets_more_gpus():
    words = ["model.path=Qwen/Qwen2.5-VL-72B-Instruct", "cluster.nodes=8"]
    line = next(a for a in found("grpo", *words).advice if "engine" in a)
    assert "set rollout.tensor_parallel=4" in line
    assert role(found("grpo", *words, "rollout.tensor_parallel=4"), "engine").fits


def test_the_command_prints_it_for_gpus_and_on_request_for_others(capsys):
    recipe = ["plan", "--config", str(CONFIGS / "grpo.yaml"), "--stage", "grpo", "--json"]
    assert main([*recipe, "--gpu-memory", "24"]) == 0
    said = json.loads(capsys.readouterr().out)["memory"]
    assert "nothing was compared with a GPU" in said["note"] and "within 10 %" in said["note"]
    assert main(recipe[:-1]) == 0 and "nothing was compared with a GPU" in " ".join(capsys.readouterr().out.split())
    assert said["gpu_gib"] == 24 and said["advice"] and not said["roles"][0]["fits"]
    cpu = ["output=x", "cluster.gpus_per_node=0"]
    assert main([*recipe, *cpu]) == 0 and json.loads(capsys.readouterr().out)["memory"] is None
    assert main([*recipe, *cpu, f"model.path={TINY}", "--gpu-memory", "8"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["roles"][0]["fits"]
    assert main([*recipe, "--gpu-memory", "0"]) == 2 and "must be above 0 GiB" in capsys.readouterr().err


def test_colocated_engines_leave_room_for_the_learner():
    words = ["cluster.placement=colocated", "cluster.learners=8", "rollout.engines=8"]
    estimate = found("grpo", *words)
    held = [role(estimate, "learner").parts.get(k, 0.0) for k in (*memory.STATES, "reduce bucket")]
    assert role(estimate, "engine").parts["learner meanwhile"] == pytest.approx(sum(held)) and sum(held) > 15 * 2**30
    line = next(a for a in estimate.advice if "engine" in a)
    share = float(line.rsplit("=", 1)[1])
    assert share < 0.85 and role(found("grpo", *words, f"rollout.gpu_memory_utilization={share}"), "engine").fits


def test_the_tiny_model_fits_a_small_gpu():
    estimate = found("grpo", f"model.path={TINY}", gpu=24)
    assert all(m.fits for m in estimate.roles) and estimate.advice == ()


def test_adapters_have_the_parameters_that_are_installed_and_need_neither_optimizer_nor_reference():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tatar_dist.learner import lora

    sizes = memory.sizes_of(str(TINY))
    for words in ([], ["model.train_vision=false"], ["model.lora_targets=[q_proj,down_proj]"]):
        config = load_config([str(CONFIGS / "grpo.yaml")], ["model.lora_rank=4", *words]).model
        with torch.device("meta"):
            model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.AutoConfig.from_pretrained(TINY))
        model.model.visual.requires_grad_(config.train_vision)
        before = sum(p.numel() for p in model.parameters())
        lora.install(model, config, 0)
        installed = sum(p.numel() for p in model.parameters()) - before
        assert installed == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert sizes.adapters(4, config.lora_targets, config.train_vision) == installed > 0
    whole, adapted = (role(found("grpo", *words), "learner") for words in ([], ["model.lora_rank=16"]))
    assert whole.parts["reference"] > 0 and "reference" not in adapted.parts
    assert adapted.parts["optimizer"] < 0.02 * whole.parts["optimizer"]
