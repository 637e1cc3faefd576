"""Make the benches' random Qwen2.5-VL of 14M parameters and its inputs; count FLOPs, bytes.

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
WORDS = (
    "model.dtype=float32", "cluster.gpus_per_node=0", "cluster.learners=1", "rollout.engines=1",
    "cluster.learner_cpus=0.5", "cluster.engine_cpus=0.5", "data.iqa_fraction=1", "grpo.kl_beta=0",
    "watch.prometheus=false",
)  # fmt: skip


def image(seed: int, pixels: int = PIXELS) -> bytes:
    """Return a PNG of `pixels` x `pixels`."""
    coarse = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def write_images(directory: Path, n: int, pixels: int = PIXELS) -> None:
    """Write `image(i)` of all i below `n` as DIRECTORY/i.png."""
    for i in range(n):
        (directory / f"{i}.png").write_bytes(image(i, pixels))


def make(directory: Path, pixels: int = PIXELS, sizes: TinySizes = SIZES, words: Sequence[str] = ()) -> Config:
    """Write the model unless it exists; return the config of WORDS, `words` and the image size."""
    from transformers import AutoProcessor

    path, area = directory / "model", pixels * pixels
    if not path.exists():
        wording = Prompts.load(CONFIGS / "prompts.yaml")  # its words are the vocabulary, so that they are few tokens
        build(path, corpus=[wording.system, *wording.user.values(), TEXT, "system user assistant"] * 20, sizes=sizes)
        AutoProcessor.from_pretrained(path, min_pixels=area, max_pixels=area).save_pretrained(path)  # for a peer, too
    model = [f"model.path={path}", f"model.min_pixels={area}", f"model.max_pixels={area}"]
    return load_config([], [f"output={directory / 'run'}", *WORDS, *model, *words])


def prompt_text(backbone: Any) -> str:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXT}]}]
    return backbone.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def prompt_tokens(backbone: Any, pixels: int = PIXELS) -> int:
    """Count the tokens of the prompt with its image."""
    return len(backbone.tokenizer(prompt_text(backbone))["input_ids"]) + backbone.image_tokens(pixels, pixels)


def rows(backbone: Any, groups: int, size: int, tokens: int, pixels: int = PIXELS) -> list[LearnerRow]:
    """Return groups of `size` completions of `tokens` tokens with advantages of both signs."""
    rng = np.random.default_rng(0)
    text = prompt_text(backbone)
    share = {"weight": 1 / groups / size / tokens, "prompt_tokens": prompt_tokens(backbone, pixels)}
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
    """Sizes of an update: groups of `size` completions of `tokens` tokens, images `pixels` wide."""

    groups: int = 1
    size: int = GROUP
    tokens: int = TOKENS
    pixels: int = PIXELS
    vocab: int = SIZES.vocab
    checkpointing: bool = False

    @property
    def completion_tokens(self) -> int:
        return self.groups * self.size * self.tokens


def counts(config: Any, work: Work, prompt: int, packed: bool) -> tuple[ModelSizes, int, int, int, float]:
    """Return (ModelSizes, images, patches each, tokens, pairs in a layer) for `forward_flops`.

    `config`: a Qwen2_5_VLConfig; `prompt`: tokens of a prompt.
    """
    if packed:
        images, unit = work.groups, Unit(tuple(range(work.size)), prompt, (work.tokens - 1,) * work.size)
    else:
        images, unit = work.groups * work.size, Unit((0,), prompt, (work.tokens,))
    patches = (work.pixels // config.vision_config.patch_size) ** 2
    return ModelSizes.of(config.to_dict()), images, patches, images * unit.tokens, images * unit.pairs


def flops(config: Any, work: Work, prompt: int, packed: bool) -> float:
    """Count the FLOPs of forward and backward. Arguments as in `counts`."""
    sizes, images, patches, *text = counts(config, work, prompt, packed)
    # without patch embedding and head: what checkpointing computes again
    body = sizes.forward_flops(images, patches, *text) * passes(work.checkpointing)
    head = work.completion_tokens * 2 * sizes.head
    # pixels have no gradient; the chunked head makes its logits twice
    return body + images * patches * 2 * sizes.patch * 2 + head * passes(packed)


def kept_bytes(config: Any, work: Work, prompt: int) -> float:
    """Count what autograd keeps of a packed forward for the backward."""
    sizes, images, patches, tokens, _ = counts(config, work, prompt, packed=True)
    return FLOAT * kept_elements(sizes, images * patches, tokens, checkpointing=False)


def peak_bytes(config: Any, work: Work, prompt: int, parameters: int) -> float:
    """Return the peak of three moments: logits made; the head's gradient; only gradients left."""
    head = head_bytes(ModelSizes.of(config.to_dict()), work.completion_tokens, FLOAT)
    return max(kept_bytes(config, work, prompt) + head, FLOAT * parameters)
