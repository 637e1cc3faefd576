"""One step's scored groups: prompts to the engines, completions to the reward actor, silent groups replaced if asked.

In: the next prompts. Out: `Collected`, of as many groups as prompts. A group whose completions all got the same reward
is silent: its advantages are 0. `grpo.zero_std` says what becomes of it: `keep` (it counts in the normaliser and feels
the KL), `drop` (it stays out of the loss), or `refill`: in up to `grpo.refill_limit` rounds the silent groups give way
to new prompts of their data set, sampled from the same weights, and the whole batch is scored again, since a ranking
depends on who is in it (dynamic sampling, arXiv 2503.14476); groups silent after that are dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tatar_dist.config import GRPOConfig
from tatar_dist.data.sampler import PromptSampler
from tatar_dist.prompt_source import PromptSource
from tatar_dist.records import Group, Prompt, ScoredGroup
from tatar_dist.rewards.remote import RemoteScorer


@dataclass
class Collected:
    """The step's groups in order, the silent ones they replaced, reward metrics, and seconds by phase."""

    scored: list[ScoredGroup]
    replaced: list[ScoredGroup] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    generate_seconds: float = 0.0
    reward_seconds: float = 0.0


def collect(
    grpo: GRPOConfig,
    prompts: Sequence[Prompt],
    step: int,
    generate: Callable[[Sequence[Prompt]], list[Group]],
    scorer: RemoteScorer,
    source: PromptSource,
    sampler: PromptSampler,
    begin: Callable[[str], None],
) -> Collected:
    """Generate and score the global batch of a step. `begin` is told of each phase.

    Raises what `generate` and the reward actor raise.
    """
    out = Collected([])
    asked, groups = list(prompts), []
    for round_ in range(1 + (grpo.refill_limit if grpo.zero_std == "refill" else 0)):
        if round_:
            silent = [s for s in out.scored if s.zero_std]
            fresh = source.more([s.group.prompt for s in silent], asked, sampler, step)
            if not fresh:
                break
            given_up = silent[: len(fresh)]
            out.replaced += given_up
            gone = {s.group.prompt.group_id for s in given_up}
            groups = [g for g in groups if g.prompt.group_id not in gone]
            asked += fresh
        begin("generate")
        start = time.perf_counter()
        groups += generate(asked if not round_ else fresh)
        groups.sort(key=lambda g: g.prompt.group_id)
        middle = time.perf_counter()
        begin("reward")
        out.scored, out.metrics = scorer.score(groups, step)
        out.generate_seconds += middle - start
        out.reward_seconds += time.perf_counter() - middle
    if grpo.zero_std != "keep":
        out.scored = [replace(s, trained=not s.zero_std) for s in out.scored]
    out.metrics["reward/replaced_groups"] = float(len(out.replaced))
    out.metrics["reward/dropped_groups"] = float(sum(not s.trained for s in out.scored))
    return out
