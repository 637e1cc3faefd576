"""Qwen3-VL, dense: patches of 16 pixels, and features of three inner layers of the vision tower beside its last.

These deepstack features (arXiv 2406.04334) travel with the image's features: the model adds them to the outputs of its
first decoder layers, at the image's places, which in a packed row are each prompt's own. Positions are those of
Qwen2.5-VL; their frequencies are interleaved inside the model.
"""

from __future__ import annotations

from tatar_dist.backbones.base import QwenVL


class Backbone(QwenVL):
    model_type = "qwen3_vl"
    model_class = "Qwen3VLForConditionalGeneration"
