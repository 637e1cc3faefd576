"""Adapters through the whole pipeline: engines and checkpoints hold merged weights, a resumed run its adapters."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tatar_dist import grpo as controller
from tatar_dist import sft

pytestmark = pytest.mark.usefixtures("shared_ray")
LORA = ("model.lora_rank=4", "model.lora_alpha=8")


def metrics(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def weights(config) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output) / "checkpoints/latest/model/model.safetensors")


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names whose tensors differ, after a look at what may: linear layers but the head, of tower and language model."""
    assert set(after) == set(before)  # no trace of adapters
    names = {n for n in before if not torch.equal(before[n], after[n])}
    assert names and all(n.endswith(".weight") and "norm" not in n and "embed" not in n for n in names), names
    assert any("visual." in n for n in names) and any("q_proj" in n for n in names) and "lm_head.weight" not in names
    return names


def test_grpo_with_adapters_resumed_by_one_learner(model_untied, make_config, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_untied, model)
    words = ("grpo.max_steps=4", "grpo.optim.lr=0.01", "checkpoint.every=2", "checkpoint.keep=9", "rollout.engines=1")
    config = make_config(str(model), *LORA, *words)
    controller.run(config)
    steps = metrics(config)
    # what engines sampled from, merged, is what learners compute, adapters beside the weights
    assert all(m["sync/logprob_gap_max"] < 1e-4 for m in steps)
    assert abs(steps[0]["loss/kl"]) < 1e-6 < steps[1]["loss/kl"] < steps[3]["loss/kl"]  # the start is the reference
    assert all(m["optim/grad_norm"] > 0 for m in steps)
    moved(load_file(model / "model.safetensors"), weights(config))

    other = tmp_path / "resumed"
    shutil.copytree(config.output, other, symlinks=True)
    shutil.rmtree(other / "checkpoints" / "step_000004")
    for file in model.glob("*.safetensors"):  # what is trained on is in the checkpoint, wherever it came from
        save_file({n: torch.zeros_like(t) for n, t in load_file(file).items()}, file, {"format": "pt"})
    resumed = dataclasses.replace(config, output=str(other), cluster=dataclasses.replace(config.cluster, learners=1))
    controller.run(resumed)
    again = metrics(resumed)
    assert [m["step"] for m in again] == [0, 1, 2, 3]
    assert again[2]["sync/logprob_gap_max"] < 1e-4
    # the same prompts and completions from the same adapters: a fresh start would have a KL of 0
    assert abs(again[2]["loss/kl"] - steps[2]["loss/kl"]) < 0.05 * steps[2]["loss/kl"]


def test_in_bfloat16_sft_then_grpo_whose_engines_are_corrected_for(model_untied, make_config, tmp_path):
    words = ("model.dtype=bfloat16", "model.gradient_checkpointing=true", "grpo.logprob_gap_limit=0.05")
    one = ("rollout.engines=1", "cluster.learners=1")
    short = ("sft.max_steps=3", "sft.global_batch=8", "sft.optim.lr=0.01")
    tuned = make_config(model_untied, *LORA, *words, *one, *short, f"output={tmp_path / 'sft'}")
    sft.run(tuned)
    losses = [m["loss/total"] for m in metrics(tuned)]
    assert losses[-1] < losses[0]
    before = {n: t.bfloat16() for n, t in load_file(Path(model_untied) / "model.safetensors").items()}
    moved(before, weights(tuned))

    model = str(Path(tuned.output) / "checkpoints/latest/model")
    config = make_config(model, *LORA, *words, *one, "grpo.max_steps=3", "grpo.optim.lr=0.01")
    controller.run(config)
    steps = metrics(config)
    assert all(0 < m["sync/logprob_gap"] < 0.05 and m["policy/importance_mean"] > 0 for m in steps)
    assert steps[2]["loss/kl"] > 1e-4  # far more than rounding: adapters moved
    moved(weights(tuned), weights(config))
