"""Time two learners and two engines beside one of each: `tatar-dist bench scaling`.

The ratio is how many times faster two are: an update of the same global batch of 2 groups (real ZeRO-3), and
completions of the same 4 prompts; random 14M model, float32, in turns. Ideal is 2; the limit is what one process gains
from half of the work, with nothing beside it (an engine makes as many decoding steps for half of the rows). Each
process is pinned to a core of its own and computes with one thread.
"""

from __future__ import annotations

import contextlib
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from tatar_dist.bench import subject
from tatar_dist.bench.harness import in_turns, ratio, result, two_cores
from tatar_dist.run.process import keep_on

PIXELS = 448  # 256 image tokens
GROUPS, GROUP, TOKENS = 2, 8, 64  # an update: groups, completions of each, their tokens
PROMPTS, SAMPLES, MADE = 4, 4, 48  # a generation
ROUNDS, TARGET = 3, 1.6


def _config(directory: Path, processes: int) -> Any:
    words = [
        "cluster.threads=1", f"cluster.learners={processes}", f"rollout.engines={processes}",
        f"rollout.max_num_seqs={PROMPTS * SAMPLES}", "rollout.max_model_len=512", f"grpo.prompts_per_step={GROUPS}",
        f"grpo.group_size={GROUP}", "grpo.logprob_gap_limit=1000", "model.gradient_checkpointing=false",
    ]  # fmt: skip
    return subject.make(directory, PIXELS, words=words)


class Rig:
    """`processes` pairs of a learner and an engine, each on its own core; the two take turns."""

    def __init__(self, directory: Path, processes: int, cores: list[int], stack: contextlib.ExitStack) -> None:
        import ray

        from tatar_dist.cluster.ray_cluster import Cluster
        from tatar_dist.learner.sharding import shard_rows
        from tatar_dist.models import family
        from tatar_dist.types import Prompt, Sample

        config = _config(directory, processes)
        cluster = stack.enter_context(Cluster(config))
        self.learners, self.pool = cluster.learners(processes), cluster.engines(processes)
        self.pool.start(1)
        self.learners.setup("grpo", 1)
        self.pool.started()
        self._engines = [e.actor for e in self.pool.engines]
        for actors in (self.learners.actors, self._engines):
            pin = [a.__ray_call__.remote(lambda _, c: keep_on([c]), c) for a, c in zip(actors, cores, strict=False)]
            ray.get(pin)
        backbone = family(config.model.family)(config.model)
        rows = subject.rows(backbone, GROUPS, GROUP, TOKENS, PIXELS)
        budget, costs = config.grpo.micro_tokens, backbone.costs()
        self._shards, self._half = (shard_rows(r, processes, budget, costs) for r in (rows, rows[: len(rows) // 2]))
        text = subject.prompt_text(backbone)
        images = [subject.image(i, PIXELS) for i in range(PROMPTS)]
        self._prompts = [Prompt(Sample(str(i), "bench", "iqa", b, 50.0), text, str(i)) for i, b in enumerate(images)]

    def learn(self, half: bool = False) -> None:
        self.learners.grpo_step(self._half if half else self._shards, 0)

    def generate(self, half: bool = False) -> None:
        import ray

        from tatar_dist.rollout.engine import Sampling

        ray.get([e.__ray_call__.remote(lambda engine: engine._reset_caches()) for e in self._engines])
        self.pool.generate(self._prompts[: PROMPTS // 2 if half else PROMPTS], Sampling(SAMPLES, 1.0, MADE))


def run() -> dict[str, Any]:
    """Measure everything. Raises UserError where there are fewer than two cores."""
    from tatar_dist.cluster.ray_cluster import Cluster

    cores = two_cores("scaling")
    parts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        stack.enter_context(Cluster(_config(directory, 4)))  # one Ray with room for both
        one, two = (Rig(directory, n, cores, stack) for n in (1, 2))
        for part, work, shared in (("learners", one.learn, two.learn), ("engines", one.generate, two.generate)):
            seconds = in_turns(work, shared, rounds=ROUNDS)
            half = in_turns(work, partial(work, half=True), rounds=ROUNDS)
            parts[part] = {
                "one_seconds": seconds[0],
                "two_seconds": seconds[1],
                "ratio": ratio(*seconds),
                "limit": ratio(*half),
            }
    worst = min(parts, key=lambda part: parts[part]["ratio"]["median"])
    return result(
        "scaling",
        f"one process instead of two, {worst}",
        parts[worst]["ratio"],
        TARGET,
        f"{parts[worst]['limit']['median']:.2f}: half of the work with nothing beside it; over 2 cores only simulated",
        parts=parts,
    )
