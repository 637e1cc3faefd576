"""What the Qwen-VL families share: the processor call, the vision call and the 3-D positions of an image.

Not a family itself: a family's module names its model type and its transformers class, and overrides what differs.
Turns rendered prompts and images into input ids, image features and hidden states. Needs torch and transformers only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from tatar_dist.assets import looked_in
from tatar_dist.config.schema import ModelConfig
from tatar_dist.errors import UserError
from tatar_dist.models.costs import ModelSizes, RowCosts

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model reads it.

    ids: (P,) int64 with the image placeholder expanded; type_ids: (P,) 1 at image tokens;
    pixel_values: (n_patches, patch_dim) float32; grid: (1, 3) int64 (t, h, w in patches).
    """

    ids: torch.Tensor
    type_ids: torch.Tensor
    pixel_values: torch.Tensor
    grid: torch.Tensor


class QwenVL:
    """One loaded family: `processor` for texts and images, `model` the transformers module (on the learners only).

    A family sets `model_type` as config.json has it, and `model_class`, a name in transformers.
    """

    model_type: ClassVar[str]
    model_class: ClassVar[str]

    def __init__(self, config: ModelConfig) -> None:
        from transformers import AutoProcessor

        self.config = config
        try:
            self.processor = AutoProcessor.from_pretrained(
                config.path, min_pixels=config.min_pixels, max_pixels=config.max_pixels
            )
        except OSError as e:  # transformers explains at length
            where = looked_in(config.path)
            raise UserError(
                f"model.path={config.path}: neither a model directory{where} nor a model the hub can give"
            ) from e
        self.tokenizer = self.processor.tokenizer

    @classmethod
    def check_directory(cls, path: str) -> dict[str, Any]:
        """The model's config.json as a dict. Raises UserError when `path` is a directory without this family's model.

        A name that is no local path is left to the hub.
        """
        import json

        directory = Path(path)
        if not directory.exists():
            if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
                return {}
            raise UserError(f"model.path={path}: no such directory{looked_in(path)}")
        file = directory / "config.json"
        if not file.is_file():
            raise UserError(f"model.path={path}: no config.json in it, so it is not a Hugging Face model directory")
        try:
            settings: dict[str, Any] = json.loads(file.read_text())
        except ValueError as e:
            raise UserError(f"{file}: not valid JSON: {e}") from None
        if (found := settings.get("model_type")) != cls.model_type:
            raise UserError(f"model.path={path}: model_type is {found!r}, model.family needs {cls.model_type!r}")
        if not any(directory.glob("*.safetensors")):
            raise UserError(f"model.path={path}: holds no *.safetensors weights")
        return settings

    def costs(self) -> RowCosts:
        """What a prompt and attention cost beside a token of the language model, by FLOPs; of a 7B where unknown."""
        settings = self.check_directory(self.config.path)
        try:
            return ModelSizes.of(settings).costs()
        except (KeyError, TypeError, ZeroDivisionError):
            return RowCosts()

    def load_model(self) -> torch.nn.Module:
        """The transformers model in `config.dtype`, vision tower frozen if the config says so."""
        import transformers

        model: torch.nn.Module = getattr(transformers, self.model_class).from_pretrained(
            self.config.path,
            dtype=DTYPES[self.config.dtype],
            attn_implementation="sdpa",  # the learner exchanges it (learner/shared_prefix.py)
            use_safetensors=True,
        )
        if not self.config.train_vision:
            model.model.visual.requires_grad_(False)
        return model

    def end_of_turn(self) -> int:
        """Token id that ends the assistant's turn (`<|im_end|>`)."""
        return int(self.tokenizer.convert_tokens_to_ids("<|im_end|>"))

    def forbidden_ids(self) -> list[int]:
        """Vision placeholder ids: never sampled, because a completion that holds one has no image to go with it."""
        names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
        return sorted({int(self.tokenizer.convert_tokens_to_ids(n)) for n in names})

    def image_tokens(self, width: int, height: int) -> int:
        """Tokens an image of this size in pixels takes beyond its one placeholder in the text."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        p = self.processor.image_processor
        factor = p.patch_size * p.merge_size
        high, wide = smart_resize(height, width, factor, self.config.min_pixels, self.config.max_pixels)
        return (high // factor) * (wide // factor) - 1

    def encode_prompt(self, text: str, image: Image.Image) -> EncodedPrompt:
        """Tokenise `text` (chat template already rendered, one image placeholder) and patchify `image`."""
        b = self.processor(text=[text], images=[image], return_tensors="pt")
        return EncodedPrompt(b["input_ids"][0], b["mm_token_type_ids"][0], b["pixel_values"], b["image_grid_thw"])

    def positions(self, prompt: EncodedPrompt) -> torch.Tensor:
        """(3, P) positions in time, height and width: text counts on in all three, an image's tokens are a grid whose
        longer side is what the text behind it goes on from (arXiv 2409.12191, section 2.1)."""
        grids = iter(prompt.grid // torch.tensor([1, self._merge, self._merge]))
        parts, start, at, types = [], 0, 0, prompt.type_ids.tolist()
        while at < len(types):
            if types[at]:
                t, h, w = next(grids).tolist()
                grid = torch.stack(torch.meshgrid(*map(torch.arange, (t, h, w)), indexing="ij"))
                parts.append(start + grid.reshape(3, -1))
                start, at = start + max(h, w), at + t * h * w
            else:
                parts.append(torch.full((3, 1), start))
                start, at = start + 1, at + 1
        return torch.cat(parts, dim=1)

    @property
    def _merge(self) -> int:
        return int(self.processor.image_processor.merge_size)

    @staticmethod
    def vision(model: Any, pixel_values: torch.Tensor, grids: torch.Tensor) -> Any:
        """One pass of the vision tower over all images: their features, as `hidden_states` takes them.

        Its patches before the merger are let go: nobody reads them.
        """
        features: Any = model.model.get_image_features(pixel_values, grids, return_dict=True)
        return replace(features, last_hidden_state=None)

    @staticmethod
    def hidden_states(
        model: Any, ids: torch.Tensor, positions: torch.Tensor, layout: Any, features: Any
    ) -> torch.Tensor:
        """Last hidden states (T, H) of a packed row (learner/shared_prefix.py); `features` in the order of the images.

        Positions are passed, because the model otherwise keeps `rope_deltas` between calls.
        """
        out = model.model(
            input_ids=ids[None],
            position_ids=positions[:, None],
            mm_encoder_outputs={"image": features},
            use_cache=False,
            layout=layout,
        )
        return out.last_hidden_state[0]
