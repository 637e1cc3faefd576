"""Length reward: a soft budget on the think text, short for IQA, long for IAA.

    r = clip(1 - excess / margin, 0, 1),  excess = words over `iqa_max` (IQA) or missing to `iaa_min` (IAA)

(A ramp where TATAR's public code has a hard gate, at which a word more or less flips the reward.) Words are whitespace
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


def length(words: np.ndarray, iaa: np.ndarray, parsed: np.ndarray, params: LengthParams) -> np.ndarray:
    """(N,) float64 in [0, 1]; 0 where unparsed.

    Args:
        words: (N,) think words.
        iaa, parsed: (N,) bool.
    """
    excess = np.where(iaa, params.iaa_min - words, words - params.iqa_max)
    return np.where(parsed, np.clip(1.0 - excess / params.margin, 0.0, 1.0), 0.0)


def check_token_budget(params: LengthParams, max_new_tokens: int, tokens_per_word: float = TOKENS_PER_WORD) -> None:
    """Refuse a generation limit under which no IAA completion can earn its length reward. Raises UserError."""
    needed = math.ceil(params.iaa_min * tokens_per_word) + ANSWER_TOKENS
    if max_new_tokens < needed:
        raise UserError(
            f"rollout.max_new_tokens={max_new_tokens}: the length reward asks for {params.iaa_min:g} words in an IAA "
            f"rationale, about {needed} tokens with the answer; raise it, or lower reward.params.length_iaa_min"
        )
