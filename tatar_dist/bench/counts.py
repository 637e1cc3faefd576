"""What an update of the learner has to compute and to keep, counted from sizes alone: FLOPs and bytes.

In: a Qwen2_5_VLConfig, the sizes of an update (`Work`), tokens of a prompt. Out: FLOPs of forward and backward, packed
or a row a completion; the peak of memory above the model, packed, float32, without gradient checkpointing.

A matrix product of (m, k) and (k, n) counts 2 m k n; backward counts twice the forward, checkpointing one forward more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tatar_dist.bench import subject
from tatar_dist.learner.head import CHUNK_BYTES

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


def _counts(work: Work, prompt: int, packed: bool) -> tuple[int, int, float]:
    """Images encoded, tokens through the language model, and pairs of a query and a key in each of its layers."""
    rows = work.groups * work.size
    if not packed:
        length = prompt + work.tokens
        return rows, rows * length, rows * length**2 / 2
    answer = work.tokens - 1
    pairs = prompt**2 / 2 + work.size * answer * (prompt + answer / 2)
    return work.groups, work.groups * (prompt + work.size * answer), work.groups * pairs


def attention_flops(config: Any, work: Work, prompt: int, packed: bool) -> float:
    """FLOPs of scores and weighted sums in one forward; causal attention counts the half that it needs."""
    v, t = config.vision_config, config.text_config
    patches, window = (work.pixels // v.patch_size) ** 2, (v.window_size // v.patch_size) ** 2
    images, _, pairs = _counts(work, prompt, packed)
    full = len(v.fullatt_block_indexes)
    seen = full * patches + (v.depth - full) * min(window, patches)
    return images * patches * 4 * v.hidden_size * seen + t.num_hidden_layers * pairs * 4 * t.hidden_size


def flops(config: Any, work: Work, prompt: int, packed: bool) -> float:
    """FLOPs of forward and backward. `config`: a Qwen2_5_VLConfig; `prompt`: tokens of a prompt."""
    v, t = config.vision_config, config.text_config
    patches, merged = (work.pixels // v.patch_size) ** 2, v.hidden_size * v.spatial_merge_size**2
    image = patches * v.depth * 2 * (4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size)
    patch = 2 * v.in_channels * v.temporal_patch_size * v.patch_size**2 * v.hidden_size
    image += patches / v.spatial_merge_size**2 * 2 * (merged**2 + merged * v.out_hidden_size)
    kv = t.num_key_value_heads * t.hidden_size // t.num_attention_heads
    linear = 2 * (2 * t.hidden_size**2 + 2 * t.hidden_size * kv + 3 * t.hidden_size * t.intermediate_size)
    images, tokens, _ = _counts(work, prompt, packed)
    body = images * image + t.num_hidden_layers * tokens * linear + attention_flops(config, work, prompt, packed)
    head = work.groups * work.size * work.tokens * 2 * t.hidden_size * t.vocab_size
    # pixels have no gradient; the chunked head makes its logits twice
    return body * (3 + work.checkpointing) + images * patches * patch * 2 + head * (3 + packed)


def kept_bytes(config: Any, work: Work, prompt: int) -> float:
    """What autograd keeps of a packed forward for the backward.

    A vision block of width h and intermediate width m keeps of each patch: twice its input and two results of a norm
    (6 h), queries, keys and the fused projection that values are a part of (5 h), attention's output (h), and four
    times m in the gated MLP. A decoder layer keeps 8 h, keys and values of their own width, and 4 m of each token.
    """
    v, t = config.vision_config, config.text_config
    kv = t.num_key_value_heads * t.hidden_size // t.num_attention_heads
    images, tokens, _ = _counts(work, prompt, packed=True)
    patches = images * (work.pixels // v.patch_size) ** 2
    vision = patches * v.depth * (12 * v.hidden_size + 4 * v.intermediate_size)
    text = tokens * t.num_hidden_layers * (8 * t.hidden_size + 2 * kv + 4 * t.intermediate_size)
    return FLOAT * (vision + text)


def peak_bytes(config: Any, work: Work, prompt: int, parameters: int) -> float:
    """The largest of three moments: the head makes logits (three tensors of a chunk's size live at once, four where a
    chunk before it is still held), the head's gradient is made (it, and two), all gradients are all that is left."""
    t, kept = config.text_config, kept_bytes(config, work, prompt)
    whole = FLOAT * work.groups * work.size * work.tokens * t.vocab_size
    logits, live = (whole, 3) if whole <= CHUNK_BYTES else (CHUNK_BYTES, 4)
    head = FLOAT * t.hidden_size * t.vocab_size
    return max(kept + live * logits, kept + head + 2 * logits, FLOAT * parameters)
