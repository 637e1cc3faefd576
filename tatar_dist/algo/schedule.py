"""Schedules of a run: learning rate, KL weight; and what of the loss the config implies.
The learning rate warms up linearly from 0, then stays, or decays linearly or by cosine to 0 after the last step."""

from __future__ import annotations

import math
from typing import Literal

from tatar_dist.config.schema import Config, GRPOConfig, OptimConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Return the rate of update `step` (0-based) by Hugging Face's linear and cosine schedules."""
    if step < optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    progress = min(progress, 1.0)
    if optim.schedule == "linear":
        return optim.lr * (1.0 - progress)
    return optim.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def kl_beta(grpo: GRPOConfig, step: int, total_steps: int) -> float:
    """Return the weight of the KL at update `step` (0-based): kl_beta first, kl_beta_end last."""
    if grpo.kl_schedule == "constant" or total_steps < 2:
        return grpo.kl_beta
    progress = min(step / (total_steps - 1), 1.0)
    if grpo.kl_schedule == "cosine":
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    return grpo.kl_beta + (grpo.kl_beta_end - grpo.kl_beta) * progress


def needs_reference(grpo: GRPOConfig) -> bool:
    """Return whether any step has a KL term; otherwise no reference model is loaded."""
    return grpo.kl_beta > 0 or (grpo.kl_schedule != "constant" and grpo.kl_beta_end > 0)


def importance(config: Config) -> Literal["none", "token", "sequence"]:
    """Resolve `grpo.importance`: auto is token where engines sample from other probabilities.

    They differ from the learners' with a lag, with fp8 weights, and when adapters are merged into bfloat16 weights,
    whose rounding can absorb a small adapter (learner/lora.py).
    """
    g, m = config.grpo, config.model
    rounded = config.rollout.quantization == "fp8" or (m.lora_rank and m.dtype == "bfloat16")
    if g.importance != "auto":
        return g.importance
    return "token" if g.staleness or rounded else "none"
