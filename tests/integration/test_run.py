"""A GRPO run leaves the files and metric names that other people's scripts read, and a model that loads without us."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import manifest_rows

from tatar_dist import grpo as controller
from tatar_dist.data.writing import write_manifest
from tatar_dist.evaluate import runner
from tatar_dist.scoring import export

pytestmark = pytest.mark.usefixtures("shared_ray")
CONTRACT = (
    [f"reward/{t}/{task}" for task in ("iqa", "iaa") for t in ("total", "format", "length")]
    + ["reward/gaussian/iqa", "reward/thurstone/iaa", "reward/frac_zero_std/gaussian/iqa"]
    + [
        f"completion/{t}/{task}"
        for task in ("iqa", "iaa")
        for t in ("tokens", "think_words", "clipped_ratio", "parse_failures")
    ]
    + [f"loss/{t}" for t in ("policy", "kl", "total")]
    + [f"policy/{t}" for t in ("entropy", "clip_fraction", "ratio_max")]
    + [f"sync/{t}" for t in ("seconds", "bytes", "logprob_gap")]
    + [f"time/{t}" for t in ("generate", "reward", "learn", "sync", "step")]
    + [f"perf/{t}" for t in ("tokens_per_second", "rollout_idle", "learner_idle")]
)
ROLLOUT = {"step", "group_id", "sample_id", "dataset", "task", "target", "completion", "reward", "advantage"}


def test_a_run_leaves_what_the_contract_names(model_tied, make_config, tmp_path):
    held_out = tmp_path / "held_out.parquet"
    rows = manifest_rows("iqa", 6, seed=9) + manifest_rows("iaa", 6, seed=9)
    rows[2]["image_bytes"] = b"not an image"
    write_manifest(held_out, rows)
    words = (
        "grpo.max_steps=2",
        "grpo.eval_every=2",
        "grpo.optim.lr=0.001",
        "grpo.optim.lr_scale={norm: 2}",
        f"data.validation=[{held_out}]",
        f"data.test=[{held_out}]",
        "data.eval_limit=4",
        "evaluate.samples=2",
    )
    config = make_config(model_tied, *words, "rollout.engines=1")
    controller.run(config)
    run = Path(config.output)

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == [0, 1]
    for m in lines:
        assert not [name for name in CONTRACT if name not in m]
        assert all(math.isfinite(m[name]) for name in CONTRACT)
        assert m["sync/logprob_gap"] < 1e-4
    names = [f"eval/set-{t}/{k}" for t in ("iqa", "iaa") for k in ("srcc", "plcc")]
    assert not [n for n in names if n in lines[0]] and not [n for n in names if n not in lines[1]]

    for name in ("config.yaml", "tensorboard", "checkpoints/latest", "checkpoints/step_000002", "quarantine.jsonl"):
        assert (run / name).exists(), name
    table = pq.read_table(run / "rollouts/step_000001.parquet")
    assert ROLLOUT <= set(table.column_names)
    assert table.num_rows == 16 and len(set(table["group_id"].to_pylist())) == 4

    model = export.run(run, tmp_path / "model")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    loaded, before = (
        dict(AutoModelForImageTextToText.from_pretrained(m, dtype=torch.float32).named_parameters())
        for m in (model, model_tied)
    )
    assert lines[1]["sync/bytes"] == sum(4 * w.numel() for w in before.values())
    for part in ("visual.", "language_model.layers.", "embed_tokens"):  # which is the head, too: step 1 compared all
        assert max(float((loaded[n] - w).abs().max().detach()) for n, w in before.items() if part in n) > 1e-3, part
    assert AutoProcessor.from_pretrained(model).tokenizer.get_vocab()

    shutil.rmtree(tmp_path / "run")
    result = runner.run(make_config(str(model), *words))
    assert result["datasets"]["set-iqa"]["n"] == 4 and result["datasets"]["set-iqa"]["n_missing"] == 1
    assert result["datasets"]["set-iaa"]["n_missing"] == 0
    predictions = pq.read_table(run / "predictions.parquet").to_pylist()
    assert len(predictions) == 8 and {"target", "prediction", "completion", "truncated"} <= set(predictions[0])
    assert pq.read_table(run / "sampled.parquet").num_rows == 16
    assert "reward/gaussian/iqa" in result["rewards"]
