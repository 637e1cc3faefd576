"""Make what benches work on: a random Qwen2.5-VL of 14M parameters and its inputs.

896 x 896 pixels are 1,024 image tokens; with the text around them a prompt has about 1,050. Completions are random
tokens: how long a forward takes does not depend on which.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tatar_dist.assets import CONFIGS
from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config
from tatar_dist.data.writing import write_manifest
from tatar_dist.demo.tiny.build import TinySizes, build
from tatar_dist.prompts.answer import Prompts
from tatar_dist.types import LearnerRow

SIZES = TinySizes(
    vocab=4096, text_hidden=256, text_layers=6, text_heads=8, text_kv_heads=2, text_intermediate=1024,
    vision_hidden=256, vision_depth=8, vision_heads=8, vision_intermediate=512,
)  # fmt: skip
PIXELS = 896
TEXT = "Rate the quality of this image."


def image(seed: int, pixels: int = PIXELS) -> bytes:
    """Return a PNG of `pixels` x `pixels`."""
    coarse = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def file(seed: int, directory: Path) -> Path:
    """Return where a bench keeps `image(seed)` for its processes."""
    return directory / f"{seed}.png"


def manifest(file: Path, n: int, split: str, pixels: int = PIXELS) -> Path:
    """Write a manifest of `n` images of IQA, unless it is there, and return `file`."""
    same = {"dataset": "bench", "task": "iqa", "split": split, "rationale": None}
    if not file.exists():
        own = ({"sample_id": f"{i:04d}", "score": float(i % 100), "image_bytes": image(i, pixels)} for i in range(n))
        write_manifest(file, [same | row for row in own])
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
    """Tokens of a rendered prompt with its image."""
    return len(backbone.tokenizer(text)["input_ids"]) + backbone.image_tokens(pixels, pixels)


def rows(backbone: Any, groups: int, size: int, tokens: int, pixels: int = PIXELS, seed: int = 0) -> list[LearnerRow]:
    """Return groups of `size` completions of `tokens` tokens with advantages of both signs."""
    rng = np.random.default_rng(seed)
    text = prompt_text(backbone)
    prompt = prompt_tokens(backbone, text, pixels)
    made = []
    for g in range(groups):
        png = image(g, pixels)
        for i in range(size):
            ids = tuple(int(x) for x in rng.integers(40, 200, tokens))
            advantage = 2.0 * i / max(1, size - 1) - 1.0
            share = {"weight": 1 / groups / size / tokens, "prompt_tokens": prompt}
            made.append(LearnerRow(f"{g}", png, text, ids, "iqa", advantage, (-8.0,) * tokens, **share))
    return made
