"""Calls of engines: the chunk of prompts in one, and the check of the groups that come back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tatar_dist.rollout.engine import Sampling
from tatar_dist.types import Completion, Group, Prompt

ROUNDING = 1e-3  # a log-probability is at most 0, up to the arithmetic of a softmax in half precision


@dataclass(eq=False)
class Chunk:
    """Prompts of one engine call. `failures`: engines that failed on it; `done`: it is answered."""

    prompts: list[Prompt]
    failures: int = 0
    done: bool = False


class Queue:
    """Queue of chunks: first those a failed engine left undone, then new ones, made when needed."""

    def __init__(self, parts: Iterable[list[Prompt]]) -> None:
        self._again: deque[Chunk] = deque()
        self._parts = iter(parts)

    def __bool__(self) -> bool:
        if not self._again and (part := next(self._parts, None)) is not None:
            self._again.append(Chunk(part))
        return bool(self._again)

    def take(self) -> Chunk | None:
        return self._again.popleft() if self else None

    def put_back(self, chunks: Sequence[Chunk]) -> None:
        """Insert at the front, in this order."""
        self._again.extendleft(reversed(chunks))

    def clear(self) -> None:
        self._again.clear()
        self._parts = iter(())


def problem(groups: object, prompts: Sequence[Prompt], sampling: Sampling, version: int) -> str | None:
    """Describe what is wrong with the groups of one engine call; None if they are valid.

    They must be those of the prompts in order, each with `sampling.n` completions sampled at `version`; a completion
    has 1 to `max_tokens` non-negative token ids with one finite log-probability each, none above 0.
    """
    if not isinstance(groups, list) or not all(isinstance(g, Group) for g in groups):
        return f"not a list of groups: {type(groups).__name__}"
    asked, came = [p.group_id for p in prompts], [g.prompt.group_id for g in groups]
    if asked != came:
        return f"asked for {asked[:3]}… ({len(asked)}), got {came[:3]}… ({len(came)})"
    for g in groups:
        if g.weight_version != version:
            return f"{g.prompt.group_id}: sampled at weight version {g.weight_version}, asked for {version}"
        if len(g.completions) != sampling.n:
            return f"{g.prompt.group_id}: {len(g.completions)} completions, asked for {sampling.n}"
        for i, c in enumerate(g.completions):
            if fault := _bad_completion(c, sampling.max_tokens):
                return f"{g.prompt.group_id}: completion {i}: {fault}"
    return None


def _bad_completion(c: Completion, max_tokens: int) -> str | None:
    if not 1 <= len(c.token_ids) <= max_tokens:
        return f"{len(c.token_ids)} tokens, allowed are 1 to {max_tokens}"
    if len(c.logprobs) != len(c.token_ids):
        return f"{len(c.logprobs)} log-probabilities for {len(c.token_ids)} tokens"
    if any(t < 0 for t in c.token_ids):
        return "a negative token id"
    if not all(math.isfinite(p) and p <= ROUNDING for p in c.logprobs):
        return "a log-probability that is none"
    return None
