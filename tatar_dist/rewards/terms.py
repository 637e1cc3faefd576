"""Terms that need no other image: gaussian, length, binary. Each is 0 for what is unparsed.

    gaussian  min(cap, scale * exp(-d^2 / 2 sigma^2)), d = |q - g|, sigma = sigma0 * (1 + alpha * d / 100),
              sigma0 = T / sqrt(2 ln 2); with rater_sd sqrt(sigma0^2 + score_std^2), a score_std of 0 where unknown
    length    clip(1 - excess / margin, 0, 1), excess = words over `iqa_max` (IQA) or missing to `iaa_min` (IAA); with
              `optional` 1 for an answer without words of thought, which changes IAA only
    cost      clip(1 - tokens / budget, 0, 1), the budget by task: what an answer spends is paid for
    binary    1 if the score lies within T points of the target: the plain baseline of the probes

gaussian is TATAR's (arXiv 2603.19779, and its public code). T is the distance, in points, at which a fixed-width bell
would pay one half; alpha widens it for far answers, so that they still feel a slope, more for IAA than for IQA. Length
is a ramp over the whitespace tokens inside <think>, where TATAR's public code has a hard gate, at which one word flips
the reward; the gates of gaussian exist for the preset `released` alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, MinLen

from tatar_dist.config.validate import STRICT_KEYS, Finite
from tatar_dist.errors import UserError
from tatar_dist.types import TASKS, Task

TOKENS_PER_WORD = 256 / 180  # English rationales: 256 tokens hold about 180 words
ANSWER_TOKENS = 24  # the four tags and the number

Positive = Annotated[Finite, Gt(0)]
Factor = Annotated[Finite, Ge(0)]


@dataclass(frozen=True)
class Term:
    """What a preset says of every term: its weight in the reward, and the tasks it applies to."""

    __pydantic_config__ = STRICT_KEYS

    weight: Finite = 0.0
    tasks: Annotated[tuple[Task, ...], MinLen(1)] = TASKS


@dataclass(frozen=True)
class GaussianParams(Term):
    threshold: Positive = 8.75  # T, points
    alpha_iqa: Factor = 0.8
    alpha_iaa: Factor = 2.0
    scale_iqa: Factor = 1.0
    scale_iaa: Factor = 1.0
    cap: Factor = 1.0
    rater_sd: bool = False  # the bell is as wide as the raters' `score_std`, too
    gate_iqa_max_words: Finite | None = None  # words of the whole completion, tags included; above: 0
    gate_iaa_min_words: Finite | None = None  # below: 0


@dataclass(frozen=True)
class LengthParams(Term):
    iqa_max: Finite = 65.0  # words
    iaa_min: Finite = 125.0
    margin: Positive = 15.0
    optional: bool = False  # an answer without thought is in bounds


@dataclass(frozen=True)
class CostParams(Term):
    iqa_budget: Positive = 256.0  # tokens
    iaa_budget: Positive = 512.0


@dataclass(frozen=True)
class BinaryParams(Term):
    threshold: Positive = 8.75  # T, points


def gaussian(
    q: np.ndarray,
    g: np.ndarray,
    iaa: np.ndarray,
    words: np.ndarray,
    params: GaussianParams,
    score_std: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Return (N,) float64 in [0, cap]; 0 where unparsed.

    Args:
        q: (N,) predicted scores in points, clamped to [0, 100]; NaN where unparsed.
        g: (N,) targets in points.
        iaa: (N,) bool, True for IAA rows.
        words: (N,) words of the whole completion, for the gates.
        score_std: (N,) spread of the raters in points, NaN where unknown.
    """
    d = np.abs(q - g)
    sigma0 = params.threshold / math.sqrt(2.0 * math.log(2.0))
    if params.rater_sd:
        sigma0 = np.hypot(sigma0, np.nan_to_num(score_std))
    sigma = sigma0 * (1.0 + np.where(iaa, params.alpha_iaa, params.alpha_iqa) * d / 100.0)
    r = np.minimum(params.cap, np.where(iaa, params.scale_iaa, params.scale_iqa) * np.exp(-0.5 * (d / sigma) ** 2))
    if params.gate_iqa_max_words is not None:
        r = np.where(~iaa & (words > params.gate_iqa_max_words), 0.0, r)
    if params.gate_iaa_min_words is not None:
        r = np.where(iaa & (words < params.gate_iaa_min_words), 0.0, r)
    return np.where(np.isnan(q), 0.0, r)


def length(words: np.ndarray, iaa: np.ndarray, parsed: np.ndarray, params: LengthParams) -> np.ndarray:
    """Return (N,) float64 in [0, 1] from (N,) think words and (N,) bool `iaa` and `parsed`."""
    excess = np.where(iaa, params.iaa_min - words, words - params.iqa_max)
    excess = np.where(params.optional & (words == 0), 0.0, excess)
    return np.where(parsed, np.clip(1.0 - excess / params.margin, 0.0, 1.0), 0.0)


def cost(tokens: np.ndarray, iaa: np.ndarray, parsed: np.ndarray, params: CostParams) -> np.ndarray:
    """Return (N,) float64 in [0, 1] from (N,) numbers of tokens, (N,) bool `iaa` and `parsed`.

    Raises:
        UserError: the number of tokens of a row is unknown.
    """
    if np.isnan(tokens).any():
        raise UserError("the reward term cost counts tokens, and a row has no such key")
    budget = np.where(iaa, params.iaa_budget, params.iqa_budget)
    return np.where(parsed, np.clip(1.0 - tokens / budget, 0.0, 1.0), 0.0)


def binary(q: np.ndarray, g: np.ndarray, params: BinaryParams) -> np.ndarray:
    """Return (N,) float64: 1 where |q - g| < T, else 0; q (NaN: unparsed), g and T in points."""
    return (np.abs(q - g) < params.threshold).astype(np.float64)


def check_token_budget(iaa_min: float, max_new_tokens: int) -> None:
    """Raise UserError if no IAA completion of `max_new_tokens` can reach `iaa_min` words."""
    needed = math.ceil(iaa_min * TOKENS_PER_WORD) + ANSWER_TOKENS
    if max_new_tokens < needed:
        raise UserError(
            f"rollout.max_new_tokens={max_new_tokens}: the reward asks for {iaa_min:g} words in an IAA rationale, "
            f"about {needed} tokens with the answer; raise it, or lower reward.params.length_iaa_min"
        )
