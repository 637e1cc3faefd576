"""Post-train vision-language scorers of image quality and aesthetics: Ray, vLLM, DeepSpeed."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `Scorer` when it is asked for, so that the command line need not wait for it."""
    if name == "Scorer":
        from tatar_dist.scoring.scorer import Scorer

        return Scorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
