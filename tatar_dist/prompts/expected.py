"""Compute the expected score over the numbers that the model might have written in its answer.

`expected_scores` takes completions and a function that returns the model's probabilities of the next symbol after a
text, among those that the grammar allows there (constrained decoding). It returns mean and standard deviation over
whole points, and the share of the probability that they cover. A sampled answer is one draw from this distribution; its
mean has no sampling noise and fewer ties, so it ranks finer. The rationale before the answer stays as written.

    number = 0 | [1-9] [0-9]? | 100, and then `.` or `</answer>`

Decimals are not queried: if the written answer has some, half a point stands for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tatar_dist.prompts.answer import answer_start
from tatar_dist.types import Expected

DIGITS = tuple("0123456789")
POINT, END = ".", "</answer>"
FLOOR = 0.01  # less probable first digits are skipped: at most a tenth of the probability in total

# (index of the completion, text after it that the model continues, symbols allowed next) -> a probability for each
Question = tuple[int, str, tuple[str, ...]]
Ask = Callable[[list[Question]], list[dict[str, float]]]


def expected_scores(texts: Sequence[str], ask: Ask) -> list[Expected | None]:
    """Return one `Expected` per completion; None for one whose answer does not parse.

    Args:
        texts: completions.
        ask: called at most three times, each time with all questions of a digit.
    """
    starts = [answer_start(text) for text in texts]
    asked = [(i, text[: start[0]]) for i, (text, start) in enumerate(zip(texts, starts, strict=True)) if start]
    found: dict[int, list[tuple[int, float]]] = {i: [] for i, _ in asked}

    first = ask([(i, prefix, DIGITS) for i, prefix in asked])
    heads = [
        (i, prefix, digit, p)
        for (i, prefix), each in zip(asked, first, strict=True)
        for digit, p in each.items()
        if p >= FLOOR
    ]
    second = ask([(i, prefix + digit, _after(digit)) for i, prefix, digit, _ in heads])
    tens = []
    for (i, prefix, digit, p), each in zip(heads, second, strict=True):
        for symbol, q in each.items():
            if digit + symbol == "10":
                tens.append((i, prefix + "10", p * q))
            else:
                found[i].append((int(digit + symbol) if symbol in DIGITS else int(digit), p * q))
    third = ask([(i, text, ("0", POINT, END)) for i, text, _ in tens]) if tens else []
    for (i, _, p), each in zip(tens, third, strict=True):
        found[i] += [(100 if symbol == "0" else 10, p * q) for symbol, q in each.items()]
    return [_moments(found[i], start[1]) if start else None for i, start in enumerate(starts)]


def _after(digit: str) -> tuple[str, ...]:
    return (POINT, END) if digit == "0" else (*DIGITS, POINT, END)


def _moments(values: list[tuple[int, float]], number: str) -> Expected:
    """Return mean, standard deviation and mass over whole points; 100 has no decimals."""
    half = 0.5 if POINT in number else 0.0
    points = [(v + half if v < 100 else 100.0, p) for v, p in values]
    mass = sum(p for _, p in points)
    mean = sum(v * p for v, p in points) / mass
    return Expected(mean, math.sqrt(sum(p * (v - mean) ** 2 for v, p in points) / mass), mass)
