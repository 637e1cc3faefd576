"""Post-training of vision-language models as image quality and aesthetics scorers, on Ray, vLLM and DeepSpeed."""

__version__ = "0.1.0"
