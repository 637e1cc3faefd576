"""What the Qwen-VL families share: processor call, vision call, 3-D positions of an image.

Not a family itself: a family's module names its model type and its transformers class, and overrides what differs.
Turns rendered prompts and images into input ids, image features and hidden states. Needs torch and transformers only.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from tatar_dist.assets import looked_in
from tatar_dist.config.schema import ModelConfig
from tatar_dist.errors import UserError
from tatar_dist.models.costs import ModelSizes, RowCosts
from tatar_dist.models.files import check_adapter, check_files


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
    """One loaded family: `processor` of texts and images, `model` (transformers, learners only).

    A family sets `model_type` as config.json has it, and `model_class`, a name in transformers.
    """

    model_type: ClassVar[str]
    model_class: ClassVar[str]

    def __init__(self, config: ModelConfig) -> None:
        from transformers import AutoProcessor

        self.config = config
        try:
            limits = {"min_pixels": config.min_pixels, "max_pixels": config.max_pixels}
            self.processor = AutoProcessor.from_pretrained(config.path, **limits)
        except ImportError:
            raise
        except Exception as e:  # a damaged file: of any kind, tokenizers raises Exception itself
            problem = f"neither a model directory{looked_in(config.path)} nor a model the hub can give"
            if Path(config.path).is_dir():
                problem = f"its tokenizer or processor cannot be read: {' '.join(str(e).split())[:300]}"
            raise UserError(f"model.path={config.path}: {problem}") from e
        self.tokenizer = self.processor.tokenizer

    @classmethod
    def check_directory(cls, path: str, trained: bool = False) -> dict[str, Any]:
        """Return the model's config.json. Raises UserError if directory `path` lacks this family.

        Reads headers of files only. Returns {} for a name that is not a local path: it is left to the hub.
        """
        directory = Path(path)
        if not directory.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
            return {}
        check_adapter(directory)
        file = directory / "config.json"
        try:
            settings: dict[str, Any] = json.loads(file.read_text())
        except OSError:
            absent = "no config.json in it, so it is not a Hugging Face model directory"
            problem = absent if directory.exists() else f"no such directory{looked_in(path)}"
            raise UserError(f"model.path={path}: {problem}") from None
        except ValueError as e:
            raise UserError(f"{file}: not valid JSON: {e}") from None
        if (kind := settings.get("model_type")) != cls.model_type:
            raise UserError(f"model.path={path}: model_type is {kind!r}, model.family needs {cls.model_type!r}")
        check_files(directory, settings, trained)
        return settings

    def check_weights(self) -> None:
        """Check that the files hold all tensors of the model, and no others, by their headers.

        Transformers and vLLM start tensors that are absent at random or ignore those they do not know.

        Raises:
            UserError: tensors that are missing, unknown or of another shape, counted, with the first names.
        """
        settings = self.check_directory(self.config.path)
        if settings and not settings.get("quantization_config"):
            with contextlib.redirect_stderr(StringIO()):  # a bar
                self._load(device_map="meta")

    def _load(self, **options: Any) -> torch.nn.Module:
        """Load by transformers. Raises UserError if its report names any tensor."""
        import transformers

        told = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # of its table of a hundred lines, one is made below
        try:
            model, report = getattr(transformers, self.model_class).from_pretrained(
                self.config.path,
                dtype=getattr(torch, self.config.dtype),
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        finally:
            transformers.logging.set_verbosity(told)
        kinds = (("missing", "missing_keys"), ("unknown", "unexpected_keys"), ("of another shape", "mismatched_keys"))
        names = {kind: sorted(n for n in map(_name, report[key]) if not n.endswith("inv_freq")) for kind, key in kinds}
        found = [(kind, wrong) for kind, wrong in names.items() if wrong]  # frequencies are computed, not read
        if found:
            counted = "; ".join(
                f"{len(names)} {kind} ({', '.join(names[:3])}{', …' * (len(names) > 3)})" for kind, names in found
            )
            raise UserError(f"model.path={self.config.path}: its weights do not fit its config.json: {counted}")
        return model  # type: ignore[no-any-return]

    def costs(self) -> RowCosts:
        """Return the costs of a prompt and of attention relative to a token; a 7B's where unknown."""
        settings = self.check_directory(self.config.path)
        try:
            return ModelSizes.of(settings).costs()
        except (KeyError, TypeError, ZeroDivisionError):
            return RowCosts()

    def load_model(self) -> torch.nn.Module:
        """Load the transformers model in `config.dtype`, its vision tower frozen if so configured."""
        model = self._load(attn_implementation="sdpa")  # the learner exchanges it (learner/shared_prefix.py)
        if not self.config.train_vision:
            model.model.visual.requires_grad_(False)
        return model

    @staticmethod
    def part_of(name: str) -> str:
        """Return the part of the model that a parameter belongs to: one that a weight push may miss."""
        if "visual." in name:
            return "merger" if "merger" in name else "vision"
        if layer := re.search(r"\.layers\.(\d+)\.", name):
            return "odd layers" if int(layer[1]) % 2 else "even layers"
        return "embedding" if "embed_tokens" in name else "head" if "lm_head" in name else "norm"

    def end_of_turn(self) -> int:
        """Return the token id that ends the assistant's turn (`<|im_end|>`)."""
        return int(self.tokenizer.convert_tokens_to_ids("<|im_end|>"))

    def forbidden_ids(self) -> list[int]:
        """Return the vision placeholder ids, which a completion must not contain: it has no image."""
        names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
        return sorted({int(self.tokenizer.convert_tokens_to_ids(n)) for n in names})

    def image_tokens(self, width: int, height: int) -> int:
        """Return an image's tokens, by its size in pixels, beyond its one placeholder in the text."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        p = self.processor.image_processor
        factor = p.patch_size * p.merge_size
        high, wide = smart_resize(height, width, factor, self.config.min_pixels, self.config.max_pixels)
        return (high // factor) * (wide // factor) - 1

    def encode_prompt(self, text: str, image: Image.Image) -> EncodedPrompt:
        """Tokenise `text` (chat template rendered, one image placeholder) and patchify `image`."""
        b = self.processor(text=[text], images=[image], return_tensors="pt")
        return EncodedPrompt(b["input_ids"][0], b["mm_token_type_ids"][0], b["pixel_values"], b["image_grid_thw"])

    def positions(self, prompt: EncodedPrompt) -> torch.Tensor:
        """Return (3, P) positions in time, height and width (arXiv 2409.12191, section 2.1).

        Text advances all three by one a token. An image's tokens form a grid; text continues after its longer side.
        """
        merge = self.processor.image_processor.merge_size
        sides = (prompt.grid[0] // torch.tensor([1, merge, merge])).tolist()
        start = int(prompt.type_ids.argmax())
        grid = torch.stack(torch.meshgrid(*map(torch.arange, sides), indexing="ij")).reshape(3, -1)
        after = torch.arange(len(prompt.ids) - start - grid.shape[1])
        return torch.cat(
            [torch.arange(start).expand(3, -1), start + grid, (start + max(sides) + after).expand(3, -1)], dim=1
        )

    @staticmethod
    def vision(model: Any, pixel_values: torch.Tensor, grids: torch.Tensor) -> Any:
        """Run the vision tower over all images; drop `last_hidden_state`, the unmerged patches."""
        features: Any = model.model.get_image_features(pixel_values, grids, return_dict=True)
        return replace(features, last_hidden_state=None)

    @staticmethod
    def hidden_states(
        model: Any, ids: torch.Tensor, positions: torch.Tensor, layout: Any, features: Any
    ) -> torch.Tensor:
        """Return the last hidden states (T, H) of a packed row (learner/shared_prefix.py).

        `features` are in the order of the images. Positions are passed, because the model otherwise keeps `rope_deltas`
        between calls.
        """
        out = model.model(
            input_ids=ids[None],
            position_ids=positions[:, None],
            mm_encoder_outputs={"image": features},
            use_cache=False,
            layout=layout,
        )
        return out.last_hidden_state[0]


def _name(key: Any) -> str:
    """Return a tensor's name from the loading report: a name, or (name, shape, shape)."""
    return key if isinstance(key, str) else f"{key[0]} {tuple(key[1])} for {tuple(key[2])}"
