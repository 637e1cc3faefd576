"""Adapters through the whole pipeline: engines and checkpoints hold merged weights, a resumed run its adapters."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tatar_dist import controller, sft

LORA = ("model.lora_rank=4", "model.lora_alpha=8")


def metrics(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def weights(config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output) / "checkpoints/latest/model/model.safetensors")


def test_sft_then_grpo_with_adapters_resumed_by_one_learner(model_untied, make_config, tmp_path):
    words = (*LORA, "sft.max_steps=3", "sft.global_batch=8", "sft.optim.lr=0.01", f"output={tmp_path / 'sft'}")
    tuned = make_config(model_untied, *words)
    sft.run(tuned)
    losses = [m["loss/total"] for m in metrics(tuned)]
    assert losses[-1] < losses[0]
    before, after = load_file(Path(model_untied) / "model.safetensors"), weights(tuned)
    assert set(after) == set(before)  # no trace of adapters
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and all(n.endswith(".weight") and "norm" not in n and "embed" not in n for n in moved), moved
    assert any("visual." in n for n in moved) and any("q_proj" in n for n in moved) and "lm_head.weight" not in moved

    model = str(Path(tuned.output) / "checkpoints/latest/model")
    refined = make_config(
        model, *LORA, "grpo.max_steps=4", "grpo.optim.lr=0.01", "checkpoint.every=2", "checkpoint.keep=9"
    )
    controller.run(refined)
    steps = metrics(refined)
    # what engines sampled from, merged, is what learners compute, adapters beside the weights
    assert all(m["sync/logprob_gap_max"] < 1e-4 for m in steps)
    assert abs(steps[0]["loss/kl"]) < 1e-6 < steps[1]["loss/kl"] < steps[3]["loss/kl"]  # the start is the reference
    assert all(m["optim/grad_norm"] > 0 for m in steps)

    other = tmp_path / "resumed"
    shutil.copytree(refined.output, other, symlinks=True)
    shutil.rmtree(other / "checkpoints" / "step_000004")
    for file in Path(model).glob("*.safetensors"):  # what is trained on is in the checkpoint, wherever it came from
        save_file({n: torch.zeros_like(t) for n, t in load_file(file).items()}, file, {"format": "pt"})
    alone = dataclasses.replace(refined.cluster, learners=1)
    resumed = dataclasses.replace(refined, output=str(other), cluster=alone)
    controller.run(resumed)
    again = metrics(resumed)
    assert [m["step"] for m in again] == [0, 1, 2, 3]
    assert again[2]["sync/logprob_gap_max"] < 1e-4
    # the same prompts and completions from the same adapters: a fresh start would have a KL of 0
    assert abs(again[2]["loss/kl"] - steps[2]["loss/kl"]) < 0.05 * steps[2]["loss/kl"]


def test_adapters_in_bfloat16_are_sampled_from_nearly_and_corrected_for(model_untied, make_config):
    words = ("model.dtype=bfloat16", "model.gradient_checkpointing=true", "grpo.logprob_gap_limit=0.05")
    one = ("rollout.engines=1", "cluster.learners=1", "grpo.max_steps=3", "grpo.optim.lr=0.01")
    config = make_config(model_untied, *LORA, *words, *one)
    controller.run(config)
    steps = metrics(config)
    assert all(0 < m["sync/logprob_gap"] < 0.05 and m["policy/importance_mean"] > 0 for m in steps)
    assert steps[2]["loss/kl"] > 1e-4  # far more than rounding: adapters moved
    merged = weights(config)
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}
    before = load_file(Path(model_untied) / "model.safetensors")
    name = next(n for n in merged if n.endswith("layers.0.self_attn.q_proj.weight"))
    assert (merged[name].float() - before[name].float()).abs().mean() > 1e-4
