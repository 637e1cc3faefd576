"""Groups that teach nothing are dropped or replaced within the step, on real engines and learners."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tatar_dist import grpo as controller

pytestmark = pytest.mark.usefixtures("shared_ray")
TERM = """
import numpy as np
def one(batch, answers):
    '''1 for whatever parses, so that a pair of completions is silent when both do or neither does.'''
    return np.ones(len(batch))
"""
PRESET = """
name: one
terms:
  one: {function: my_term_of_one.one, weight: 1}
"""
FORM = (  # every other new key of the loss at once: that they run together on real ranks
    "grpo.aggregation=token-mean",
    "grpo.importance=token",
    "grpo.importance_mode=mask",
    "grpo.mask_truncated=true",
    "grpo.kl_schedule=linear",
    "grpo.max_steps=2",
    "grpo.group_size=2",
)


@pytest.fixture
def preset_word(tmp_path, monkeypatch):
    (tmp_path / "my_term_of_one.py").write_text(TERM)
    monkeypatch.syspath_prepend(tmp_path)
    preset = tmp_path / "one.yaml"
    preset.write_text(PRESET)
    return f"reward.preset={preset}"


def groups_of(file: Path) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in pq.read_table(file).to_pylist() if file.exists() else []:
        found.setdefault(row["group_id"], []).append(row)
    return found


@pytest.mark.parametrize(("policy", "learners"), [("refill", 2), ("drop", 1)])
def test_silent_groups_are_replaced_or_dropped(policy, learners, preset_word, model_untied, make_config):
    counts = ("rollout.engines=1", f"cluster.learners={learners}")
    config = make_config(model_untied, preset_word, f"grpo.zero_std={policy}", *FORM, *counts)
    controller.run(config)
    run = Path(config.output)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen, gave_up, dropped = set(), 0, 0
    for step, metrics in enumerate(lines):
        kept = groups_of(run / f"rollouts/step_{step:06d}.parquet")
        replaced = groups_of(run / f"rollouts/replaced/step_{step:06d}.parquet")
        assert len(kept) == 4 and not kept.keys() & replaced.keys()
        assert {len(rows) for rows in [*kept.values(), *replaced.values()]} == {2}
        assert sorted(r[0]["task"] for r in kept.values()) == ["iaa", "iaa", "iqa", "iqa"]
        for group, rows in [*kept.items(), *replaced.items()]:
            assert group not in seen
            seen.add(group)
            silent = len({r["reward"] for r in rows}) == 1
            if group in replaced:
                assert silent
            else:
                assert all(r["trained"] != silent for r in rows)
        here = sum(not rows[0]["trained"] for rows in kept.values())
        assert metrics["reward/replaced_groups"] == len(replaced) and metrics["reward/dropped_groups"] == here
        gave_up, dropped = gave_up + len(replaced), dropped + here
        assert metrics["sync/logprob_gap"] < 1e-4 and metrics["policy/importance_cut"] == 0
        assert metrics["policy/importance_mean"] == pytest.approx(1, abs=1e-3)
        assert metrics["loss/kl_beta"] == (0.01 if step == 0 else 0.0)
    assert gave_up > 0 if policy == "refill" else gave_up == 0 and dropped > 0
