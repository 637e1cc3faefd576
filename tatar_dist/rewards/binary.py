"""Binary reward: 1 if the score lies within T points of the target, the plain baseline of the probes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tatar_dist.errors import UserError


@dataclass(frozen=True)
class BinaryParams:
    threshold: float = 8.75  # T, points

    def check(self) -> None:
        if self.threshold <= 0:
            raise UserError(f"binary threshold={self.threshold}: must be positive (points)")


def binary(q: np.ndarray, g: np.ndarray, params: BinaryParams) -> np.ndarray:
    """(N,) float64: 1 where |q - g| < T, else 0; 0 where unparsed (q NaN). Scores and T in points."""
    return (np.abs(q - g) < params.threshold).astype(np.float64)
