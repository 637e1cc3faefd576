"""Post-training of vision-language models as image quality and aesthetics scorers, on Ray, vLLM and DeepSpeed."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`Scorer`, imported when it is asked for: the command line need not wait for it."""
    if name == "Scorer":
        from tatar_dist.scoring.scorer import Scorer

        return Scorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
