"""Time a step with staleness 1 beside its slower half: `tatar-dist bench overlap`.

The ratio is max(generate, learn + sync) of steps with staleness 0 over the whole step with staleness 1: 1 would be
perfect overlap of generating with learning and pushing. The pipeline of `bench step`, engine pinned to the first half
of the cores and learner to the other in both (`cluster.pin_cores`), in turns. A push waits for the engine to finish its
batch, so what is left beside generating is the push, reward and the controller's own work.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tatar_dist.bench import step
from tatar_dist.bench.harness import ratio, result, two_cores

STEPS, ROUNDS, TARGET = 5, 2, 1 / 1.1
PARTS = ("seconds", "time/generate", "time/learn", "time/sync", "time/reward")


def run() -> dict[str, Any]:
    """Measure steps with staleness 0 and 1. Raises UserError with fewer than 2 CPU cores."""
    two_cores("overlap")
    parts: dict[str, dict[str, list[float]]] = {lag: {part: [] for part in PARTS} for lag in ("0", "1")}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        words = [
            "model.gradient_checkpointing=false", "cluster.pin_cores=true", f"grpo.max_steps={STEPS}",
            "grpo.logprob_gap_limit=10",
        ]  # fmt: skip
        for _ in range(ROUNDS):
            for lag, seconds in parts.items():
                side = step.ours(directory, [*words, f"grpo.staleness={lag}"])
                for part in PARTS:
                    seconds[part] += side[part][:-1]  # the last step of a run has nothing ahead to sample
    halves = zip(*(parts["0"][part] for part in ("time/generate", "time/learn", "time/sync")), strict=True)
    slower = [max(generate, learn + sync) for generate, learn, sync in halves]
    return result(
        "overlap",
        "max(generate, learn + sync) with staleness 0",
        ratio(slower, parts["1"]["seconds"]),
        TARGET,
        "1, perfect overlap",
        staleness=parts,
    )
