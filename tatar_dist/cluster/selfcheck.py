"""Compare log-probabilities of engines and learners after the first push, before training.

For ways of pushing and running engines that were never run on the current hardware (plan/proven.py). The pool and the
learners must hold the same version; a gap that is too large raises WeightsOutOfSync.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tatar_dist.config.schema import Config
from tatar_dist.learner.sharding import shard_rows
from tatar_dist.rollout.engine import Sampling
from tatar_dist.types import LearnerRow, Prompt

PROMPTS = 8
TOKENS = 32  # of a completion: enough to see a wrong layer, a cache or a version


def verify(pool: Any, learners: Any, prompts: Sequence[Prompt], config: Config) -> dict[str, float]:
    """Return sync/logprob_gap and its _max, in nats, over completions of at most 8 prompts.

    Engines on the learners' GPUs sleep afterwards: with their keys and values a forward has no memory. Push again.

    Raises:
        WeightsOutOfSync: the mean gap is over `grpo.logprob_gap_limit`.
    """
    asked, ranks = list(prompts)[:PROMPTS], len(learners.actors)
    n = -(-ranks // len(asked))  # every rank has a completion
    r = config.rollout
    groups = pool.generate(asked, Sampling(n, r.temperature, min(TOKENS, r.max_new_tokens), config.seed, step=-1))
    rows = [
        LearnerRow(
            image_id=g.prompt.group_id,
            image=g.prompt.sample.image,
            prompt_text=g.prompt.text,
            completion_ids=c.token_ids,
            task=g.prompt.sample.task,
            advantage=0.0,
            weight=0.0,
            sampled_logprobs=c.logprobs,
            prompt_token_ids=g.prompt_token_ids,
            prompt_tokens=len(g.prompt_token_ids),
        )
        for g in groups
        for c in g.completions
    ]
    shards = shard_rows(rows, ranks, config.grpo.micro_tokens)
    pool.prepare_update()
    refs = [a.logprob_gap.remote(shard) for a, shard in zip(learners.actors, shards, strict=True)]
    gap: dict[str, float] = learners.wait(refs)[0]
    return gap
