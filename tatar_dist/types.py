"""The records that flow through one GRPO step, in one direction.

    Prompt -> Group(prompt, completions) -> ScoredGroup(+ reward terms, advantages) -> LearnerRow -> StepReport

Every stage returns its record and never reaches back. Images travel as encoded bytes, never as pixels: each
process decodes an image once per step. All records pickle, because Ray carries them between processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Task = Literal["iqa", "iaa"]
TASKS: tuple[Task, Task] = ("iqa", "iaa")
SPLITS = ("train", "validation", "test")
EIGHT = (
    "visual elements",
    "composition & structure",
    "overall gestalt",
    "technical execution",
    "theme & communication",
    "emotion & viewer response",
    "originality & creativity",
    "overall evaluation",
)


@dataclass(frozen=True)
class Sample:
    """One row of a manifest. `image` is the encoded file (PNG, JPEG, ...), `score` is on 0-100."""

    sample_id: str
    dataset: str
    task: Task
    image: bytes
    score: float
    rationale: str | None = None
    split: str = "train"
    meta: dict = field(default_factory=dict)
    score_std: float | None = None  # of the raters, in points


@dataclass(frozen=True)
class Prompt:
    """An engine's input: a sample and its rendered chat text. `group_id` is unique in the run.

    `with_image` False: the text alone, as for a teacher that reads notes (rationale construction). `begun`: start of
    the answer, which the engine continues to `</answer>`; completions hold it in their text, not in their tokens.
    """

    sample: Sample
    text: str
    group_id: str
    with_image: bool = True
    begun: str = ""


@dataclass(frozen=True)
class Expected:
    """Distribution over the scores that an answer could have had (prompts/expected.py).
    mean, sd: in points; mass: the probability that the scores considered have together."""

    mean: float
    sd: float
    mass: float


@dataclass(frozen=True)
class Completion:
    """One sampled answer. `logprobs`: natural-log probabilities of the n_tokens `token_ids`.

    `expected`: the expectation over possible scores, where it was requested and the answer parses.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    expected: Expected | None = None


@dataclass(frozen=True)
class Group:
    """The G completions of one prompt, all sampled by one engine at one weight version."""

    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    weight_version: int


@dataclass(frozen=True)
class ScoredGroup:
    """A group with its terms and advantages, (G,) float64; NaN where a term does not apply.

    `zero_std`: all completions have the same reward, so no advantage. `trained`: whether it enters the loss.
    """

    group: Group
    parsed: np.ndarray
    terms: dict[str, np.ndarray]
    reward: np.ndarray
    advantage: np.ndarray
    zero_std: bool = False
    trained: bool = True


@dataclass(frozen=True)
class LearnerRow:
    """One training row: a prompt, its completion and its inputs of the loss.

    `weight` is the weight of each of its tokens in the global loss (algo/aggregation.py). SFT rows carry no advantage,
    no weight (all tokens have the same) and no sampled log-probabilities. Rows with equal `image_id` inside one
    micro-batch share a single pass through the vision tower and the prompt, of `prompt_tokens` tokens. A `filler` has
    no effect on the loss: it keeps a rank without rows in the collective calls.
    """

    image_id: str
    image: bytes
    prompt_text: str
    completion_ids: tuple[int, ...]
    task: Task
    advantage: float = 0.0
    sampled_logprobs: tuple[float, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    weight: float = 0.0
    prompt_tokens: int = 0
    filler: bool = False


@dataclass(frozen=True)
class StepReport:
    """Result of one optimiser step: scalar metrics by contract name, and seconds."""

    metrics: dict[str, float]
    seconds: float
