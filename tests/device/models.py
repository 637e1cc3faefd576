"""The language model, vision tower and head of the models that people train, from their published config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    family: str
    text: dict[str, Any]
    vision: dict[str, Any]
    tied: bool = False

    def config(self, image_token: int, layers: int | None = None) -> Any:
        """The transformers configuration; `layers`: only the first ones, of the language model and of the tower."""
        import transformers

        text, vision = {"max_position_embeddings": 32768, **self.text}, dict(self.vision)
        if layers:
            text["num_hidden_layers"] = vision["depth"] = layers
            for key in ("fullatt_block_indexes", "deepstack_visual_indexes"):
                if key in vision:
                    vision[key] = [layers - 1]
        name = {"qwen2_5_vl": "Qwen2_5_VLConfig", "qwen3_vl": "Qwen3VLConfig"}[self.family]
        settings = {"text_config": text, "vision_config": vision, "tie_word_embeddings": self.tied}
        return getattr(transformers, name)(**settings, image_token_id=image_token, video_token_id=image_token + 1)


def _qwen2_5(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int, tied: bool) -> Shape:
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
        "tie_word_embeddings": tied,
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": hidden,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return Shape("qwen2_5_vl", text, vision, tied)


MODELS = {
    "Qwen2.5-VL-7B": _qwen2_5(3584, 28, 28, 4, 18944, 152064, tied=False),
    "Qwen2.5-VL-3B": _qwen2_5(2048, 36, 16, 2, 11008, 151936, tied=True),
    "Qwen3-VL-8B": Shape(
        "qwen3_vl",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 12288,
            "vocab_size": 151936,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_theta": 5e6
            },
        },
        {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "patch_size": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    ),
}  # fmt: skip
