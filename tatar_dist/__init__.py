"""Post-training of vision-language models as image quality and aesthetics scorers, on Ray, vLLM and DeepSpeed."""

from pathlib import Path

__version__ = "0.1.0"
CONFIGS = Path(__file__).resolve().parents[1] / "configs"  # of the checkout that this package is run from
