"""A manifest of scores alone trains both stages."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import manifest_rows

from tatar_dist import grpo, sft
from tatar_dist.data.writing import write_manifest


@pytest.mark.nightly
@pytest.mark.usefixtures("shared_ray")
def test_scores_alone_train_sft_and_grpo(model_untied, make_config, tmp_path):
    manifests = []
    for task in ("iqa", "iaa"):
        rows = [{**row, "rationale": None, "score_std": 9.0} for row in manifest_rows(task, 12)]
        write_manifest(tmp_path / f"{task}.parquet", rows)
        manifests.append(str(tmp_path / f"{task}.parquet"))
    data = f"data.train=[{','.join(manifests)}]"
    tuned = make_config(
        model_untied, data, f"output={tmp_path / 'sft'}", "sft.thought_dropout={iqa: 1, iaa: 1}", "sft.max_steps=30",
        "sft.global_batch=8", "sft.optim.lr=0.003", "checkpoint.every=0",
    )  # fmt: skip
    sft.run(tuned)
    losses = [m["loss/total"] for m in metrics(tuned)]
    assert losses[-1] < 0.7 * losses[0]
    trained = make_config(
        tmp_path / "sft/checkpoints/latest/model", data, f"output={tmp_path / 'grpo'}", "grpo.max_steps=2",
        "grpo.advantage=per_term", "grpo.scale=batch", "reward.weights.cost=0.5",
        "reward.params={length_optional: true, rater_sd: true, thurstone_measure: regret, thurstone_scale: shared}",
    )  # fmt: skip
    grpo.run(trained)
    steps = metrics(trained)
    assert len(steps) == 2
    for task, term in (("iqa", "gaussian"), ("iaa", "thurstone")):
        for step in steps:
            shares = [v for k, v in step.items() if k.startswith("reward/share/") and k.endswith(f"/{task}")]
            assert f"reward/share/{term}/{task}" in step and sum(shares) == pytest.approx(1)
    rows = pq.read_table(tmp_path / "grpo/rollouts/step_000000.parquet").to_pylist()
    assert {row["score_std"] for row in rows} == {9.0}
    assert any(row["completion"].startswith("<answer>") for row in rows), "it has learned to answer without thought"


def metrics(config) -> list[dict]:
    return [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
