"""With staleness 1 the engines work ahead; what dies meanwhile costs freshness or time, never a prompt."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tatar_dist import grpo as controller
from tatar_dist.run.events import read_events

pytestmark = pytest.mark.usefixtures("shared_ray")
STEPS = 6


def test_an_engine_and_a_learner_that_die_while_work_is_done_ahead(model_untied, make_config):
    config = make_config(
        model_untied,
        f"grpo.max_steps={STEPS}",
        "grpo.staleness=1",
        "grpo.logprob_gap_limit=10",
        "grpo.optim.lr=0.003",
        "rollout.engines=1",
        "cluster.learners=1",
        "checkpoint.every=2",
        # batch 2 is sampled while step 1 is learned; with the only engine gone it waits for step 2 and its weights
        "failpoints=['engine.generate:kill:step=2', 'learner.backward:kill:step=4']",
    )
    controller.run(config)
    run = Path(config.output)
    events = read_events(run)
    assert events[-1]["event"] == "run/end"
    assert [e["event"] for e in events if e["event"] in ("engine/dead", "learners/failed")] == [
        "engine/dead",
        "learners/failed",
    ]
    (dead,) = [e for e in events if e["event"] == "engine/dead"]
    assert (dead["step"], dead["phase"]) == (1, "learn"), "it died while the learners worked"

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == list(range(STEPS))
    # step 4 was learned again from the checkpoint, which held its completions: as old as before
    assert [m["policy/staleness"] for m in lines] == [0, 1, 0, 1, 1, 1]
    moved = [m["sync/logprob_gap"] > 1e-5 for m in lines]
    assert moved == [False, True, False, True, True, True], "only completions of older weights differ"
    assert all(0 < m["policy/importance_mean"] <= config.grpo.importance_cap for m in lines)

    files = sorted((run / "rollouts").glob("step_*.parquet"))
    groups = [set(pq.read_table(f, columns=["group_id"])["group_id"].to_pylist()) for f in files]
    assert [len(g) for g in groups] == [config.grpo.prompts_per_step] * STEPS
    assert [{int(name.split("/")[0]) for name in g} for g in groups] == [{n} for n in range(STEPS)]
    samples = Counter(name.split("/", 1)[1] for g in groups for name in g)
    assert max(samples.values()) == 1, "24 samples are asked of 48, none twice"
