"""A run whose loss, gradient or weights are no longer finite stops, and its last good checkpoint stays."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tatar_dist import grpo, sft
from tatar_dist.errors import RunError
from tatar_dist.run.checkpoints import finished
from tatar_dist.run.events import read_events

pytestmark = pytest.mark.usefixtures("shared_ray")
EVERY = ("checkpoint.every=1", "checkpoint.keep=1", "cluster.learners=2", "sft.global_batch=4")


def steps(run) -> list[int]:
    return [state["step"] for _, state in finished(Path(run))]


def whole(run) -> None:
    """Check that the newest checkpoint's weights are all finite and small."""
    weights = load_file(Path(run) / "checkpoints/latest/model/model.safetensors")
    assert all(w.abs().max() < 1e3 for w in weights.values())


def test_weights_that_give_no_finite_answer_are_not_saved(model_untied, make_config, monkeypatch):
    first = make_config(model_untied, *EVERY, "sft.max_steps=2")
    sft.run(first)
    assert steps(first.output) == [2]
    config = make_config(model_untied, *EVERY, "sft.max_steps=6", "sft.optim.lr=1e30", "checkpoint.accept=[sft]")
    with pytest.raises(RunError, match=r"step [23]: .*not finite.*earlier ones stay. Lower sft.optim.lr"):
        sft.run(config)
    assert steps(first.output) == [2]
    monkeypatch.setattr(sft, "_evaluated", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or {})
    checkpoint = dataclasses.replace(config.checkpoint, every=0)  # none is due, the signal asks for one
    with pytest.raises(RunError, match="step 2: with the weights after it .*not finite: no checkpoint of them"):
        sft.run(dataclasses.replace(config, checkpoint=checkpoint))
    assert steps(first.output) == [2]
    whole(first.output)


def test_a_gradient_that_is_not_finite_is_skipped_a_few_times_at_most(model_untied, make_config, tmp_path):
    model = Path(shutil.copytree(model_untied, tmp_path / "nan"))
    weights = load_file(model / "model.safetensors")
    weights[next(iter(sorted(weights)))].view(-1)[0] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    stops = make_config(model, *EVERY, "sft.max_steps=4")
    with pytest.raises(RunError, match="step 0: loss/total=nan, optim/grad_norm=inf: the run stops; there is no check"):
        sft.run(stops)
    assert steps(stops.output) == []
    skips = make_config(
        model,
        f"output={tmp_path / 'skips'}",
        "sft.global_batch=4",
        "sft.max_steps=8",
        "sft.optim.on_nonfinite=skip",
        "checkpoint.every=0",
    )
    with pytest.raises(RunError, match="step 3: .*, after 3 skipped steps: the run stops"):
        sft.run(skips)
    skipped = [e["in_a_row"] for e in read_events(Path(skips.output)) if e["event"] == "step/skipped"]
    assert skipped == [1, 2, 3, 4]
    lines = [json.loads(line) for line in (Path(skips.output) / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == [0, 1, 2, 3] and all(m["loss/total"] is None for m in lines)


@pytest.mark.nightly
def test_a_grpo_run_that_diverges_keeps_its_checkpoint(model_untied, make_config):
    words = ("checkpoint.every=1", "checkpoint.keep=1", "rollout.engines=1", "cluster.learners=1")
    good = make_config(model_untied, *words, "grpo.max_steps=1")
    grpo.run(good)
    worse = make_config(model_untied, *words, "grpo.max_steps=4", "grpo.optim.lr=1e30", "checkpoint.accept=[grpo]")
    with pytest.raises(RunError, match="not finite: no checkpoint"):
        grpo.run(worse)
    assert steps(good.output) == [1]
    whole(good.output)
