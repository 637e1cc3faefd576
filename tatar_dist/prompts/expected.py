"""Compute the expected score over the numbers that a model might have written as its answer.

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
    points: list[list[tuple[int, float]]] = [[] for _ in texts]  # (number in whole points, probability)
    begun = [(i, text[: start[0]], "", 1.0) for i, (text, start) in enumerate(zip(texts, starts, strict=True)) if start]
    while begun:  # numbers that may go on: completion, its text before the number, digits so far, probability
        longer = []
        answers = ask([(i, prefix + digits, _after(digits)) for i, prefix, digits, _ in begun])
        for (i, prefix, digits, p), answer in zip(begun, answers, strict=True):
            for symbol, q in answer.items():
                number = digits + symbol if symbol in DIGITS else digits
                if not digits and q < FLOOR:
                    continue
                if number != digits and _after(number):
                    longer.append((i, prefix, number, p * q))
                else:
                    points[i].append((int(number), p * q))
        begun = longer
    return [_moments(values, start[1]) if start else None for values, start in zip(points, starts, strict=True)]


def _after(digits: str) -> tuple[str, ...]:
    """Return the symbols that may follow the digits of a number; none after a whole one."""
    if len(digits) <= 1:
        return {"": DIGITS, "0": (POINT, END)}.get(digits, (*DIGITS, POINT, END))
    return ("0", POINT, END) if digits == "10" else ()


def _moments(values: list[tuple[int, float]], number: str) -> Expected:
    """Return mean, standard deviation and mass over whole points; 100 has no decimals."""
    half = 0.5 if POINT in number else 0.0
    points = [(v + half if v < 100 else 100.0, p) for v, p in values]
    mass = sum(p for _, p in points)
    mean = sum(v * p for v, p in points) / mass
    return Expected(mean, math.sqrt(sum(p * (v - mean) ** 2 for v, p in points) / mass), mass)
