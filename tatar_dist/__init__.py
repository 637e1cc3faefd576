"""Post-training of vision-language models as image quality and aesthetics scorers, on Ray, vLLM and DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__version__ = "0.1.0"
CONFIGS = Path(__file__).resolve().parents[1] / "configs"  # of the checkout that this package is run from


def __getattr__(name: str) -> Any:
    """`Scorer`, imported when it is asked for: the command line need not wait for it."""
    if name == "Scorer":
        from tatar_dist.scorer import Scorer

        return Scorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
