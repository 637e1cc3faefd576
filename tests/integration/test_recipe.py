"""The settings of the large recipe, bfloat16 with gradient checkpointing, train and keep engines in sync here too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tatar_dist import grpo as controller
from tatar_dist import sft

pytestmark = pytest.mark.usefixtures("shared_ray")
RECIPE = ("model.dtype=bfloat16", "model.gradient_checkpointing=true", "grpo.logprob_gap_limit=0.05")


def metrics(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]


def test_sft_then_grpo_in_bfloat16_with_gradient_checkpointing(model_untied, make_config, tmp_path):
    words = (*RECIPE, "sft.max_steps=3", "sft.global_batch=8", "sft.optim.lr=0.001", f"output={tmp_path / 'sft'}")
    tuned = make_config(model_untied, *words)
    sft.run(tuned)
    losses = [m["loss/total"] for m in metrics(tuned)]
    assert losses[-1] < losses[0]
    model = Path(tuned.output) / "checkpoints/latest/model"
    assert {t.dtype for t in load_file(model / "model.safetensors").values()} == {torch.bfloat16}

    one = ("rollout.engines=1", "cluster.learners=1")
    refined = make_config(str(model), *RECIPE, "grpo.max_steps=2", "grpo.optim.lr=0.001", *one)
    controller.run(refined)
    first, second = metrics(refined)
    # two bytes a weight on the wire
    assert second["sync/bytes"] == 2 * sum(t.numel() for t in load_file(model / "model.safetensors").values())
    assert first["sync/logprob_gap"] < 0.05 and second["sync/logprob_gap"] < 0.05
    assert first["optim/grad_norm"] > 0 and second["loss/kl"] > 0
