"""Which finished checkpoints stay: the newest, every n-th step, and the best by a metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tatar_dist.config.schema import CheckpointConfig


@dataclass(frozen=True)
class Finished:
    """A whole checkpoint: its directory's name, its step and its value of `checkpoint.keep_best`, if it has one."""

    name: str
    step: int
    metric: float | None = None


def kept(finished: Sequence[Finished], config: CheckpointConfig) -> set[str]:
    """Names of those that stay. `finished`: newest first; the newest always stays. Of equally good ones the newest."""
    stay = {f.name for f in finished[: max(1, config.keep)]}
    if config.keep_every:
        stay |= {f.name for f in finished if f.step % config.keep_every == 0}
    sign = 1 if config.best_mode == "max" else -1
    rated = [(sign * f.metric, f.name) for f in finished if f.metric is not None and math.isfinite(f.metric)]
    if rated:
        stay.add(max(rated, key=lambda r: r[0])[1])
    return stay
