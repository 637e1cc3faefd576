"""Qwen2.5-VL: windowed attention in the vision tower, 14-pixel patches, CLIP's mean and std.

Its positions and its processor are the ones all Qwen-VL share (base.py).
"""

from __future__ import annotations

from tatar_dist.models.base import QwenVL


class Backbone(QwenVL):
    model_type = "qwen2_5_vl"
    model_class = "Qwen2_5_VLForConditionalGeneration"
