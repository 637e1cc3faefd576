"""What an engine returned is compared with what it was asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tatar_dist.rollout.calls import problem
from tatar_dist.rollout.engine import Sampling
from tatar_dist.types import Completion, Group, Prompt, Sample

SAMPLING = Sampling(n=2, temperature=1.0, max_tokens=4)
PROMPTS = [Prompt(Sample(f"s{i}", "d", "iqa", b"", 50.0), "text", f"000001/d/s{i}") for i in range(3)]
GOOD = Completion("x", (1, 2, 3), (-0.5, -0.1, 0.0), "stop")


def groups() -> list[Group]:
    return [Group(p, (5,), (GOOD, GOOD), 3) for p in PROMPTS]


def test_what_was_asked_for_passes():
    assert problem(groups(), PROMPTS, SAMPLING, 3) is None


def with_completion(c: Completion) -> list[Group]:
    found = groups()
    found[1] = replace(found[1], completions=(GOOD, c))
    return found


@pytest.mark.parametrize(
    "answer, said",
    [
        (None, "not a list of groups: NoneType"),
        ([1, 2, 3], "not a list"),
        (groups()[:2], r"\(3\), got .*\(2\)"),
        (groups()[::-1], "asked for"),
        ([*groups()[:2], replace(groups()[2], prompt=PROMPTS[0])], "asked for"),
        ([replace(g, weight_version=2) for g in groups()], "weight version 2, asked for 3"),
        ([replace(g, completions=(GOOD,)) for g in groups()], "1 completions, asked for 2"),
        (with_completion(replace(GOOD, token_ids=(), logprobs=())), "completion 1: 0 tokens"),
        (with_completion(replace(GOOD, token_ids=(1,) * 5, logprobs=(-1.0,) * 5)), "5 tokens, allowed are 1 to 4"),
        (with_completion(replace(GOOD, logprobs=(-1.0,))), "1 log-probabilities for 3 tokens"),
        (with_completion(replace(GOOD, token_ids=(1, -2, 3))), "negative token id"),
        (with_completion(replace(GOOD, logprobs=(-1.0, float("nan"), -1.0))), "log-probability that is none"),
        (with_completion(replace(GOOD, logprobs=(-1.0, float("-inf"), -1.0))), "log-probability that is none"),
        (with_completion(replace(GOOD, logprobs=(-1.0, 0.2, -1.0))), "log-probability that is none"),
    ],
)
def test_anything_else_is_named(answer, said):
    import re

    assert re.search(said, problem(answer, PROMPTS, SAMPLING, 3))
