"""Make what benches work on, a random Qwen2.5-VL of 14M parameters and its inputs, and count its FLOPs and bytes.

896 x 896 pixels are 1,024 image tokens; with the text around them a prompt has about 1,050. Completions are random
tokens: how long a forward takes does not depend on which. FLOPs are those of models/costs.py, for updates that are
packed or have a row a completion; the peak of memory above the model is of a packed one, in float32, without gradient
checkpointing.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tatar_dist.assets import CONFIGS
from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config
from tatar_dist.data.writing import write_manifest
from tatar_dist.demo.tiny.build import TinySizes, build
from tatar_dist.models.costs import ModelSizes, Unit, head_bytes, kept_elements, passes
from tatar_dist.prompts.answer import Prompts
from tatar_dist.types import LearnerRow

SIZES = TinySizes(
    vocab=4096, text_hidden=256, text_layers=6, text_heads=8, text_kv_heads=2, text_intermediate=1024,
    vision_hidden=256, vision_depth=8, vision_heads=8, vision_intermediate=512,
)  # fmt: skip
PIXELS, GROUP, TOKENS = 896, 8, 64
TEXT = "Rate the quality of this image."
FLOAT = 4  # bytes


def image(seed: int, pixels: int = PIXELS) -> bytes:
    """Return a PNG of `pixels` x `pixels`."""
    coarse = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def write_images(directory: Path, n: int, pixels: int = PIXELS) -> list[Path]:
    """Write `image(i)` of all i below `n` as DIRECTORY/i.png."""
    files = [directory / f"{i}.png" for i in range(n)]
    for i, file in enumerate(files):
        file.write_bytes(image(i, pixels))
    return files


def manifest(file: Path, n: int) -> Path:
    """Write a training manifest of `n` images of IQA, unless it is there, and return `file`."""
    same = {"dataset": "bench", "task": "iqa", "split": "train", "rationale": None}
    if not file.exists():
        rows = ({"sample_id": f"{i:04d}", "score": float(i % 100), "image_bytes": image(i)} for i in range(n))
        write_manifest(file, [same | row for row in rows])
    return file


def make(directory: Path, pixels: int = PIXELS, sizes: TinySizes = SIZES, words: Sequence[str] = ()) -> Config:
    """Write the model; return a float32 configuration with images of `pixels` x `pixels`."""
    from transformers import AutoProcessor

    path, area = directory / "model", pixels * pixels
    if not path.exists():
        wording = Prompts.load(CONFIGS / "prompts.yaml")  # its words are the vocabulary, so that they are few tokens
        build(path, corpus=[wording.system, *wording.user.values(), TEXT, "system user assistant"] * 20, sizes=sizes)
        AutoProcessor.from_pretrained(path, min_pixels=area, max_pixels=area).save_pretrained(path)  # for a peer, too
    model = [f"model.path={path}", "model.dtype=float32", f"model.min_pixels={area}", f"model.max_pixels={area}"]
    return load_config([], [f"output={directory / 'run'}", *model, *words])


def prompt_text(backbone: Any) -> str:
    content = [{"type": "image"}, {"type": "text", "text": TEXT}]
    messages = [{"role": "user", "content": content}]
    return backbone.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def prompt_tokens(backbone: Any, text: str, pixels: int = PIXELS) -> int:
    """Count the tokens of a rendered prompt with its image."""
    return len(backbone.tokenizer(text)["input_ids"]) + backbone.image_tokens(pixels, pixels)


def rows(backbone: Any, groups: int, size: int, tokens: int, pixels: int = PIXELS) -> list[LearnerRow]:
    """Return groups of `size` completions of `tokens` tokens with advantages of both signs."""
    rng = np.random.default_rng(0)
    text = prompt_text(backbone)
    share = {"weight": 1 / groups / size / tokens, "prompt_tokens": prompt_tokens(backbone, text, pixels)}
    completions = []
    for g in range(groups):
        png = image(g, pixels)
        for i in range(size):
            ids = tuple(int(x) for x in rng.integers(40, 200, tokens))
            advantage = 2.0 * i / max(1, size - 1) - 1.0
            completions.append(LearnerRow(f"{g}", png, text, ids, "iqa", advantage, (-8.0,) * tokens, **share))
    return completions


@dataclass(frozen=True)
class Work:
    """Sizes of one update: groups of `size` completions of `tokens` tokens, images of `pixels` x `pixels`."""

    groups: int = 1
    size: int = GROUP
    tokens: int = TOKENS
    pixels: int = PIXELS
    vocab: int = SIZES.vocab
    checkpointing: bool = False

    @property
    def completion_tokens(self) -> int:
        return self.groups * self.size * self.tokens


def _counts(config: Any, work: Work, prompt: int, packed: bool) -> tuple[ModelSizes, int, int, int, float]:
    """Return ModelSizes, and images, patches of each, tokens and pairs in a layer as `forward_flops` takes them."""
    if packed:
        images, unit = work.groups, Unit(tuple(range(work.size)), prompt, (work.tokens - 1,) * work.size)
    else:
        images, unit = work.groups * work.size, Unit((0,), prompt, (work.tokens,))
    patches = (work.pixels // config.vision_config.patch_size) ** 2
    return ModelSizes.of(config.to_dict()), images, patches, images * unit.tokens, images * unit.pairs


def attention_flops(config: Any, work: Work, prompt: int, packed: bool) -> float:
    """Count the FLOPs of scores and weighted sums in one forward; causal attention counts the half that it needs."""
    sizes, images, patches, _, pairs = _counts(config, work, prompt, packed)
    return sizes.attention_flops(images, patches, pairs)


def forward_flops(config: Any, work: Work, prompt: int, packed: bool) -> float:
    """Count the FLOPs of a forward without patch embedding and head: what checkpointing adds to an update."""
    sizes, *counted = _counts(config, work, prompt, packed)
    return sizes.forward_flops(*counted)


def flops(config: Any, work: Work, prompt: int, packed: bool) -> float:
    """Count the FLOPs of forward and backward. `config`: a Qwen2_5_VLConfig; `prompt`: tokens of a prompt."""
    sizes, images, patches, *_ = _counts(config, work, prompt, packed)
    body = forward_flops(config, work, prompt, packed) * passes(work.checkpointing)
    head = work.completion_tokens * 2 * sizes.head
    # pixels have no gradient; the chunked head makes its logits twice
    return body + images * patches * 2 * sizes.patch * 2 + head * passes(packed)


def kept_bytes(config: Any, work: Work, prompt: int) -> float:
    """Count what autograd keeps of a packed forward for the backward."""
    sizes, images, patches, tokens, _ = _counts(config, work, prompt, packed=True)
    return FLOAT * kept_elements(sizes, images * patches, tokens, checkpointing=False)


def peak_bytes(config: Any, work: Work, prompt: int, parameters: int) -> float:
    """Return the largest of three moments: the head makes logits; its gradient; only the gradients are left."""
    head = head_bytes(ModelSizes.of(config.to_dict()), work.completion_tokens, FLOAT)
    return max(kept_bytes(config, work, prompt) + head, FLOAT * parameters)
