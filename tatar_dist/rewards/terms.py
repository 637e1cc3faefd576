"""The terms that need no other image: length, format and binary. Each is 0 where a completion does not parse.

    length   clip(1 - excess / margin, 0, 1), excess = words over `iqa_max` (IQA) or missing to `iaa_min` (IAA)
    format   1 if the answer parses (the grammar is in tatar_dist/prompts/answer.py)
    binary   1 if the score lies within T points of the target: the plain baseline of the probes

Length is a ramp where TATAR's public code has a hard gate, at which one word flips the reward. Words are whitespace
tokens inside <think>.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tatar_dist.errors import UserError

TOKENS_PER_WORD = 256 / 180  # English rationales: 256 tokens hold about 180 words
ANSWER_TOKENS = 24  # the four tags and the number


@dataclass(frozen=True)
class LengthParams:
    iqa_max: float = 65.0
    iaa_min: float = 125.0
    margin: float = 15.0

    def check(self) -> None:
        if self.margin <= 0:
            raise UserError(f"length margin={self.margin}: must be positive (words)")


@dataclass(frozen=True)
class BinaryParams:
    threshold: float = 8.75  # T, points

    def check(self) -> None:
        if self.threshold <= 0:
            raise UserError(f"binary threshold={self.threshold}: must be positive (points)")


def length(words: np.ndarray, iaa: np.ndarray, parsed: np.ndarray, params: LengthParams) -> np.ndarray:
    """(N,) float64 in [0, 1] from the (N,) think words and the (N,) bool `iaa` and `parsed`."""
    excess = np.where(iaa, params.iaa_min - words, words - params.iqa_max)
    return np.where(parsed, np.clip(1.0 - excess / params.margin, 0.0, 1.0), 0.0)


def format_term(parsed: np.ndarray) -> np.ndarray:
    """(N,) float64 from the (N,) bool `parsed`."""
    return parsed.astype(np.float64)


def binary(q: np.ndarray, g: np.ndarray, params: BinaryParams) -> np.ndarray:
    """(N,) float64: 1 where |q - g| < T, else 0. Scores q (NaN: unparsed), targets g and T are in points."""
    return (np.abs(q - g) < params.threshold).astype(np.float64)


def check_token_budget(params: LengthParams, max_new_tokens: int, tokens_per_word: float = TOKENS_PER_WORD) -> None:
    """Refuse a generation limit under which no IAA completion can earn its length reward. Raises UserError."""
    needed = math.ceil(params.iaa_min * tokens_per_word) + ANSWER_TOKENS
    if max_new_tokens < needed:
        raise UserError(
            f"rollout.max_new_tokens={max_new_tokens}: the length reward asks for {params.iaa_min:g} words in an IAA "
            f"rationale, about {needed} tokens with the answer; raise it, or lower reward.params.length_iaa_min"
        )
