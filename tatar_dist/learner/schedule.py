"""The learning rate at a step: linear warm-up from 0, then constant, or linear or cosine decay to 0 after the last."""

from __future__ import annotations

import math

from tatar_dist.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Rate of the update number `step` (0-based) of `total_steps`; Hugging Face's linear and cosine schedules."""
    if step < optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    progress = min(progress, 1.0)
    if optim.schedule == "linear":
        return optim.lr * (1.0 - progress)
    return optim.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
