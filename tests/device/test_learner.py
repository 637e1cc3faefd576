"""Steps of a learner at the widths of the real models, every tensor where transformers and DeepSpeed leave it."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from deepspeed.utils import groups
from pretend import NAME, FakeAccelerator, join_process_group
from torch.utils._pytree import tree_leaves

from tatar_dist.learner.process_group import share_within_nodes
from tatar_dist.learner.zero3 import deepspeed_config
from tatar_dist.models.costs import ModelSizes
from tatar_dist.plan import memory
from tatar_dist.plan.plan import resolve

from models import MODELS  # isort: skip

LARGE = "Qwen2.5-VL-7B"
GRPO = ["grpo.logprob_gap_limit=1e9"]  # values are made up, so is the gap
FORMS = [
    ["grpo.kl_beta=0.1"],  # a reference
    ["grpo.inner_iterations=2"],
    ["grpo.ratio=sequence", "grpo.importance=sequence", "grpo.importance_mode=mask"],
    ["model.lora_rank=16", "grpo.kl_beta=0.1"],
    ["model.train_vision=false"],
    ["model.gradient_checkpointing=false"],
    ["model.float32_head=false", "grpo.optim.name=sgd"],
    ["model.dtype=float32"],
]


@pytest.mark.parametrize("model", [m for m in MODELS if m != LARGE])  # FORMS are of the other
def test_a_policy_step_of_every_model(rig, model):
    metrics = rig(model, "grpo", *GRPO).grpo().metrics
    assert {"loss/total", "policy/entropy", "optim/grad_norm", "sync/logprob_gap"} <= metrics.keys()


@pytest.mark.parametrize("words", FORMS, ids=lambda words: words[0])
def test_a_policy_step_in_every_form(rig, words):
    assert "optim/grad_norm" in rig(LARGE, "grpo", *GRPO, *words).grpo().metrics


def test_a_supervised_step_and_the_held_out_loss(rig):
    one = rig(LARGE, "sft")
    assert "loss/total" in one.sft().metrics
    assert one.learner.sft_loss([one.rows]).keys() == {f"{k}/{t}" for k in ("nll", "tokens") for t in ("iqa", "iaa")}


def test_buffers_lie_on_the_accelerator(rig):
    module = rig(LARGE, "grpo", *GRPO).learner.zero3.engine.module
    assert {n: b.device.type for n, b in module.named_buffers() if b.device.type != NAME} == {}


@pytest.mark.parametrize("model", MODELS)
def test_rotary_frequencies_are_float32_in_policy_and_reference(rig, model):
    zero3 = rig(model, "grpo", *GRPO, "grpo.kl_beta=0.1").learner.zero3
    for module in (zero3.engine.module, zero3._reference.module):
        frequencies = {n: b.dtype for n, b in module.named_buffers() if "inv_freq" in n}
        assert frequencies and set(frequencies.values()) == {torch.float32}, frequencies


def test_gradients_are_summed_in_float32_and_the_update_is_one_kernel(rig):
    one = rig(LARGE, "grpo", *GRPO)
    assert one.learner.zero3.engine.optimizer.gradient_accumulation_dtype == torch.float32
    one.grpo()
    updates = one.mode.dtypes["aten::_fused_adamw_"]
    assert {d for dtypes in updates for d in dtypes} == {torch.float32}


def test_logits_of_a_bfloat16_model_are_float32(rig):
    one = rig(LARGE, "grpo", *GRPO)
    one.grpo()
    assert set(one.mode.dtypes["aten::mm.dtype"]) == {(torch.bfloat16, torch.bfloat16, torch.float32)}
    rounded = rig(LARGE, "grpo", *GRPO, "model.float32_head=false", layers=1)
    rounded.grpo()
    assert "aten::mm.dtype" not in rounded.mode.dtypes


def test_small_parameters_stay_whole_on_an_accelerator_alone(rig):
    one = rig(LARGE, "grpo", *GRPO)
    whole = [n for n, p in one.learner.zero3.engine.module.named_parameters() if p.ds_persist]
    assert any(n.endswith("norm.weight") for n in whole) and not any("mlp" in n and "weight" in n for n in whole)
    on_cpu = deepspeed_config(one.learner.config, one.learner.config.grpo.optim, torch.device("cpu"), False)
    assert on_cpu["zero_optimization"]["stage3_param_persistence_threshold"] == 0


@pytest.mark.parametrize(("placement", "times"), [("colocated", 1), ("disaggregated", 0)])
def test_cached_memory_is_returned_before_an_engine_on_the_same_gpu_wakes(rig, monkeypatch, placement, times):
    calls: list[str] = []
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: calls.append("empty_cache"))
    one = rig("Qwen2.5-VL-3B", "grpo", *GRPO, f"cluster.placement={placement}")  # a first push follows
    assert len(calls) == times
    one.grpo()
    assert len(calls) == 2 * times
    one.learner.logprob_gap([one.rows])  # the check before training
    assert len(calls) == 3 * times


KEPT = {
    "full": [],
    "lora": ["model.lora_rank=16"],
    "offloaded": ["cluster.offload_optimizer=true"],
    "copied": ["cluster.zero_hpz_partition_size=4", "cluster.learner_placement=spread", "grpo.kl_beta=0.1"],
}


@pytest.mark.parametrize("case", KEPT)
def test_what_a_learner_keeps_after_a_step_is_what_plan_counts(rig, monkeypatch, case):
    if case == "copied":
        join_process_group()
        for name in ("_ZERO_PARAM_INTRA_PARALLEL_GROUP", "_create_zero_param_parallel_group"):
            monkeypatch.setattr(groups, name, getattr(groups, name))  # as they were, for the next test
        share_within_nodes("aabbabab", 0, 4, timedelta(seconds=60))
    one = rig(LARGE, "grpo", *GRPO, *KEPT[case], "cluster.learners=8", "cluster.nodes=2")
    one.grpo()
    if case == "copied":  # DeepSpeed drops them after an update, and makes them again from what a push gathers
        before = one.mode.bytes
        assert len(list(one.learner.zero3.full_parameters())) > 50 and one.mode.bytes > before
    config, sizes = one.learner.config, ModelSizes.of(one.shape.to_dict())
    parts = memory.learner(config, resolve(config, "grpo"), sizes, 80 * memory.GIB).parts
    assert ("optimizer" in parts, "copy for the node" in parts) == (case != "offloaded", case == "copied")
    states = (*memory.STATES, "reduce bucket")
    assert one.mode.bytes == pytest.approx(sum(parts.get(name, 0.0) for name in states), rel=0.02)


def test_only_the_micro_batch_in_use_lies_on_the_accelerator(rig):
    one, peaks = rig("Qwen2.5-VL-3B", "grpo", *GRPO, "grpo.kl_beta=0.1", images=[(896, 896)]), []
    for batches in (2, 2, 4):  # the optimizer's moments come with the first step
        one.mode.peaks.clear()
        one.learner.grpo_step([one.rows] * batches, 0)
        peaks.append(max(one.mode.peaks.values()))
    pixels = 4096 * 1176 * 4  # of a micro-batch with one image, float32
    assert peaks[2] - peaks[1] < pixels


@pytest.mark.parametrize("words", [[], ["model.lora_rank=16"]], ids=["full", "lora"])
def test_what_is_pushed_lies_on_the_accelerator_and_is_what_was_announced(rig, words):
    from vllm.distributed.weight_transfer.packed_tensor import pack_tensors

    zero3 = rig("Qwen2.5-VL-3B", "grpo", *GRPO, *words).learner.zero3
    parameters = list(zero3.full_parameters())
    assert [(n, t.dtype, list(t.shape)) for n, t in parameters] == zero3.metadata()
    assert {t.device.type for _, t in parameters} == {NAME}
    assert "lm_head.weight" not in dict(parameters)  # tied: it comes once
    sent, pairs = 0, iter(parameters)
    while (chunk := pack_tensors(pairs, lambda pair: pair[1], 256 << 20)) is not None:
        sent += chunk.packed_tensor.numel()
    assert sent == sum(t.nbytes for _, t in parameters)


def test_collectives_have_tensors_of_the_accelerator_alone(rig, monkeypatch):
    """NCCL has none for CPU tensors; the pretended group would take any."""
    dispatch, seen = FakeAccelerator.dispatch, set()

    def recorded(mode, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and func.name() != "c10d::barrier":  # torch makes its tensor
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            seen.update((func.name(), x.device.type) for x in tensors)
        return dispatch(mode, func, types, args, kwargs)

    monkeypatch.setattr(FakeAccelerator, "dispatch", recorded)
    one = rig("Qwen2.5-VL-3B", "grpo", *GRPO, "grpo.kl_beta=0.1")
    one.grpo()
    one.learner.logprob_gap([one.rows])
    assert one.learner.save() > 0
    assert {"c10d::allreduce_", "c10d::_allgather_base_"} <= {name for name, _ in seen}
    assert {(name, device) for name, device in seen if device != NAME} == set()
