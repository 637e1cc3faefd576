"""Count what an update of the learner has to compute and to keep: FLOPs and bytes, from sizes alone.

For updates that are packed or have a row a completion; the peak of memory above the model is of a packed one, in
float32, without gradient checkpointing. The formulas are those of models/sizes.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tatar_dist.bench import subject
from tatar_dist.models.costs import Unit
from tatar_dist.models.sizes import ModelSizes, head_bytes, kept_elements, passes

GROUP, TOKENS = 8, 64
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Work:
    """Sizes of one update: groups of `size` completions of `tokens` tokens, images of `pixels` x `pixels`."""

    groups: int = 1
    size: int = GROUP
    tokens: int = TOKENS
    pixels: int = subject.PIXELS
    vocab: int = subject.SIZES.vocab
    checkpointing: bool = False


def _counts(config: Any, work: Work, prompt: int, packed: bool) -> tuple[ModelSizes, int, int, int, float]:
    """ModelSizes, and images, patches of each, tokens and pairs in a layer as `ModelSizes.forward_flops` takes them."""
    if packed:
        images, unit = work.groups, Unit(tuple(range(work.size)), prompt, (work.tokens - 1,) * work.size)
    else:
        images, unit = work.groups * work.size, Unit((0,), prompt, (work.tokens,))
    patches = (work.pixels // config.vision_config.patch_size) ** 2
    return ModelSizes.of(config.to_dict()), images, patches, images * unit.tokens, images * unit.pairs


def attention_flops(config: Any, work: Work, prompt: int, packed: bool) -> float:
    """FLOPs of scores and weighted sums in one forward; causal attention counts the half that it needs."""
    sizes, images, patches, _, pairs = _counts(config, work, prompt, packed)
    return sizes.attention_flops(images, patches, pairs)


def forward_flops(config: Any, work: Work, prompt: int, packed: bool) -> float:
    """FLOPs of one forward without the patch embedding and the head: what checkpointing adds to an update."""
    sizes, *counted = _counts(config, work, prompt, packed)
    return sizes.forward_flops(*counted)


def flops(config: Any, work: Work, prompt: int, packed: bool) -> float:
    """FLOPs of forward and backward. `config`: a Qwen2_5_VLConfig; `prompt`: tokens of a prompt."""
    sizes, images, patches, *_ = _counts(config, work, prompt, packed)
    body = forward_flops(config, work, prompt, packed) * passes(work.checkpointing)
    head = work.groups * work.size * work.tokens * 2 * sizes.head
    # pixels have no gradient; the chunked head makes its logits twice
    return body + images * patches * 2 * sizes.patch * 2 + head * passes(packed)


def kept_bytes(config: Any, work: Work, prompt: int) -> float:
    """What autograd keeps of a packed forward for the backward."""
    sizes, images, patches, tokens, _ = _counts(config, work, prompt, packed=True)
    return FLOAT * kept_elements(sizes, images * patches, tokens, checkpointing=False)


def peak_bytes(config: Any, work: Work, prompt: int, parameters: int) -> float:
    """The largest of three moments: the head makes logits; its gradient; all gradients are all that is left."""
    head = head_bytes(ModelSizes.of(config.to_dict()), work.groups * work.size * work.tokens, FLOAT)
    return max(kept_bytes(config, work, prompt) + head, FLOAT * parameters)
