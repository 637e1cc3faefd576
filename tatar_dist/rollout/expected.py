"""Ask an engine for each completion's expected score (prompts/expected.py); for scoring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tatar_dist.prompts.expected import Question, expected_scores
from tatar_dist.types import Group


def with_expected(llm: Any, groups: Sequence[Group], inputs: Sequence[dict[str, Any]]) -> list[Group]:
    """Return the groups with `Completion.expected` filled in.

    Args:
        llm: the `vllm.LLM`.
        inputs: its input for the prompt of each group.
    """
    from vllm import SamplingParams

    prompts = [  # a completion holds what its prompt has begun
        ({**source, "prompt": g.prompt.text}, c.text)
        for source, g in zip(inputs, groups, strict=True)
        for c in g.completions
    ]
    tokenizer = llm.get_tokenizer()

    def ask(questions: list[Question]) -> list[dict[str, float]]:
        ids = [[tokenizer.encode(s, add_special_tokens=False)[0] for s in symbols] for _, _, symbols in questions]
        asked = [{**prompts[i][0], "prompt": prompts[i][0]["prompt"] + text} for i, text, _ in questions]
        params = [
            SamplingParams(max_tokens=1, temperature=0.0, logprobs=len(allowed), allowed_token_ids=allowed)
            for allowed in ids
        ]
        answers = []
        for question, allowed, output in zip(questions, ids, llm.generate(asked, params, use_tqdm=False), strict=True):
            top = output.outputs[0].logprobs[0]
            symbols = zip(question[2], allowed, strict=True)
            answers.append({symbol: math.exp(top[token].logprob) for symbol, token in symbols if token in top})
        return answers

    expected = iter(expected_scores([text for _, text in prompts], ask))
    return [replace(g, completions=tuple(replace(c, expected=next(expected)) for c in g.completions)) for g in groups]
