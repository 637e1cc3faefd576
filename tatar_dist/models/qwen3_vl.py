"""Qwen3-VL, dense: 16-pixel patches; features of three inner vision layers beside the last.

These deepstack features (arXiv 2406.04334) travel with the image's features: the model adds them to the outputs of its
first decoder layers, at the image's places, which in a packed row are each prompt's own. Positions are those of
Qwen2.5-VL; their frequencies are interleaved inside the model.
"""

from __future__ import annotations

from typing import Any

from tatar_dist.errors import UserError
from tatar_dist.models.base import QwenVL


class Backbone(QwenVL):
    model_type = "qwen3_vl"
    model_class = "Qwen3VLForConditionalGeneration"

    @classmethod
    def check_directory(cls, path: str, trained: bool = False) -> dict[str, Any]:
        """Check as for every family, and for the flag of interleaved frequencies, which vLLM reads.
        Transformers takes it for granted: without it engine and learner would be two models."""
        settings = super().check_directory(path, trained)
        text = settings.get("text_config", {})
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        if settings and not rope.get("mrope_interleaved"):
            raise UserError(
                f"model.path={path}: config.json has no text_config.rope_parameters.mrope_interleaved=true, which "
                "Qwen3-VL needs: vLLM would not interleave rotary frequencies, the learner does"
            )
        return settings
