"""Format reward: 1 if the answer parses (tatar_dist/prompts/answer.py holds the grammar), else 0."""

from __future__ import annotations

import numpy as np


def format_term(parsed: np.ndarray) -> np.ndarray:
    """(N,) float64 from the (N,) bool `parsed`."""
    return parsed.astype(np.float64)
