"""Size and cost of a Qwen-VL by its config.json: parameters, FLOPs, bytes, a prompt's rows.

A product of (m, k) and (k, n) is m k n multiply-adds and 2 m k n FLOPs. The layers are those of Qwen2.5-VL (arXiv
2502.13923). `ModelSizes.costs` is also used for Qwen3-VL, whose vision MLP (two matrices) and head width it does not
model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOKEN_PIXELS = 28**2  # of an image token of Qwen2.5-VL: 2 x 2 patches of 14 x 14
CHUNK = 256 << 20  # policy.CHUNK_BYTES, which needs torch to be read
Linear = dict[str, tuple[int, int]]  # linear layers: name -> (in, out)


@dataclass(frozen=True)
class Unit:
    """Rows of a prompt. rows: numbers in the batch; prompt: tokens; lengths: of each completion."""

    rows: tuple[int, ...]
    prompt: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Return the tokens of the packed row."""
        return self.prompt + sum(self.lengths)

    @property
    def pairs(self) -> float:
        """Return the pairs of a query and a key it sees, in a layer; a causal square counts half."""
        return self.prompt**2 / 2 + sum(n * (self.prompt + n / 2) for n in self.lengths)

    def parted(self, n: int) -> tuple[Unit, Unit]:
        """Return the first n rows, and the others."""
        return Unit(self.rows[:n], self.prompt, self.lengths[:n]), Unit(self.rows[n:], self.prompt, self.lengths[n:])


@dataclass(frozen=True)
class RowCosts:
    """Costs relative to a token through the language model's matrices, which costs 1.

    pair: of a query and a key that it sees, in attention; vision, vision_pair: the same in the vision tower, a token
    of the prompt and a pair of them, as if all of a prompt were its image.
    """

    vision: float = 0.4
    pair: float = 3e-5
    vision_pair: float = 3e-5

    def of(self, unit: Unit) -> float:
        """Return the cost of a packed unit, in tokens."""
        image = self.vision * unit.prompt + self.vision_pair * unit.prompt**2
        return unit.tokens + self.pair * unit.pairs + image


def passes(recomputed: bool, trained: bool = True) -> int:
    """Count passes in forwards: a backward is one for inputs and, if `trained`, one for weights."""
    return 2 + trained + recomputed


def weights(layers: Linear) -> int:
    """Count the elements of the matrices, which are also the multiply-adds of a token."""
    return sum(i * o for i, o in layers.values())


def _gated(hidden: int, wide: int) -> Linear:
    return {"gate_proj": (hidden, wide), "up_proj": (hidden, wide), "down_proj": (wide, hidden)}


@dataclass
class ModelSizes:
    """The `text_config` and `vision_config` of a config.json. tied: the head is the embedding.

    Attributes:
        kv: width of the keys of a token in one layer.
        head: weights of the head.
        merge: patches of an image token.
        full_blocks: vision blocks whose attention sees all of the image; the others see windows.
    """

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    tied: bool = False

    def __post_init__(self) -> None:
        t, v = self.text, self.vision
        self.kv: int = t["hidden_size"] // t["num_attention_heads"] * t["num_key_value_heads"]
        self.head: int = t["vocab_size"] * t["hidden_size"]
        self.merge: int = v.get("spatial_merge_size", 2) ** 2
        self.full_blocks = len(v.get("fullatt_block_indexes", range(v["depth"])))

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> ModelSizes:
        """Take the sizes from a config.json as a dict. Raises KeyError without a vision_config."""
        text = settings.get("text_config", settings)
        return cls(text, settings["vision_config"], bool(settings.get("tie_word_embeddings")))

    def kv_bytes(self, wide: int) -> int:
        """Return bytes of keys and values of a token in all layers, elements of `wide` bytes."""
        return 2 * wide * self.kv * int(self.text["num_hidden_layers"])

    @property
    def linear(self) -> tuple[Linear, Linear, Linear]:
        """Return the linear layers of a decoder layer, of a vision block and of the vision merger."""
        (h, m), (w, n) = ((s["hidden_size"], s["intermediate_size"]) for s in (self.text, self.vision))
        layer = {"q_proj": (h, h), "k_proj": (h, self.kv), "v_proj": (h, self.kv), "o_proj": (h, h)} | _gated(h, m)
        merged, out = w * self.merge, self.vision.get("out_hidden_size", h)
        return layer, {"qkv": (w, 3 * w), "proj": (w, w)} | _gated(w, n), {"0": (merged, merged), "2": (merged, out)}

    @property
    def patch(self) -> int:
        """Return the number of weights of the patch embedding."""
        v = self.vision
        return int(v["in_channels"] * v["temporal_patch_size"] * v["patch_size"] ** 2 * v["hidden_size"])

    @property
    def vision_parameters(self) -> int:
        """Count tower parameters: linear layers with biases, two norms a block, one at the merger."""
        _, *parts = self.linear
        block, merger = (weights(part) + sum(out for _, out in part.values()) for part in parts)
        h = self.vision["hidden_size"]
        return int(self.patch + self.vision["depth"] * (block + 2 * h) + h + merger)

    @property
    def parameters(self) -> int:
        """Count all parameters; a decoder layer has q, k and v biases, and two norms."""
        h, kv = self.text["hidden_size"], self.kv
        layers = self.text["num_hidden_layers"] * (weights(self.linear[0]) + h + 2 * kv + 2 * h)
        return int(self.vision_parameters + layers + h + self.head * (1 if self.tied else 2))

    def adapters(self, rank: int, targets: Sequence[str], vision: bool) -> int:
        """Count LoRA parameters (learner/lora.py): rank x (in + out) of every layer with adapters."""
        times = (self.text["num_hidden_layers"], vision and self.vision["depth"], vision)
        layers = ((n, name, sum(s)) for n, part in zip(times, self.linear, strict=True) for name, s in part.items())
        return rank * sum(n * size for n, name, size in layers if not targets or name in targets)

    def attention_flops(self, images: int, patches: int, pairs: float) -> float:
        """Count FLOPs of scores and weighted sums in a forward: 4 x width a pair of query and key.

        patches: of an image; pairs: in each layer of the language model.
        """
        v, t = self.vision, self.text
        window = (v["window_size"] // v["patch_size"]) ** 2
        seen = self.full_blocks * patches + (v["depth"] - self.full_blocks) * min(window, patches)
        tower: int = images * patches * 4 * v["hidden_size"] * seen
        return tower + t["num_hidden_layers"] * pairs * 4 * t["hidden_size"]

    def forward_flops(self, images: int, patches: int, tokens: int, pairs: float) -> float:
        """Count a forward's FLOPs: `attention_flops`, all products but patch embedding and head."""
        layer, block, merger = map(weights, self.linear)
        image = patches * self.vision["depth"] * 2 * block + patches / self.merge * 2 * merger
        text = self.text["num_hidden_layers"] * tokens * 2 * layer
        return images * image + text + self.attention_flops(images, patches, pairs)

    def costs(self) -> RowCosts:
        """Return row costs by multiply-adds, without head, vision merger and windowed attention."""
        layer, block, _ = map(weights, self.linear)
        text, image = self.text["num_hidden_layers"] * layer, self.merge * self.vision["depth"] * block
        pairs = self.full_blocks * 2 * self.vision["hidden_size"] * self.merge**2
        return RowCosts(image / text, 2 * self.text["hidden_size"] / layer, pairs / text)


def layer_elements(sizes: ModelSizes, patches: float, tokens: float) -> tuple[float, float]:
    """Count what autograd keeps of a vision block (of `patches`) and a decoder layer (`tokens`).

    A vision block of width h and intermediate width m keeps of each patch: twice its input and two results of a norm
    (6 h), queries, keys and the fused projection that values are a part of (5 h), attention's output (h), and four
    times m in the gated MLP. A decoder layer keeps 8 h, keys and values of their own width, and 4 m of each token.
    """
    t, v = sizes.text, sizes.vision
    block = patches * (12 * v["hidden_size"] + 4 * v["intermediate_size"])
    return block, tokens * (8 * t["hidden_size"] + 2 * sizes.kv + 4 * t["intermediate_size"])


def kept_elements(sizes: ModelSizes, patches: float, tokens: float, checkpointing: bool) -> float:
    """Count what autograd keeps of a forward: every layer, or with checkpointing its input.

    Beside the layers: pixels in float32 and once more, the merger's norm and MLP (5 h of a patch), and the last norm
    (4 h of a token).
    """
    t, v = sizes.text, sizes.vision
    ends = patches * (3 * sizes.patch / v["hidden_size"] + 5 * v["hidden_size"]) + tokens * 4 * t["hidden_size"]
    block, layer = layer_elements(sizes, patches, tokens)
    if checkpointing:
        block, layer = patches * v["hidden_size"], tokens * t["hidden_size"]
    return ends + v["depth"] * block + t["num_hidden_layers"] * layer


def head_bytes(sizes: ModelSizes, tokens: float, wide: int, trained: bool = True) -> float:
    """Return the peak bytes of the language-model head for the logits of `tokens` tokens.

    Forward: three chunks of float32 logits, or four if there are several: the previous one is still held. Backward: the
    weight's gradient in float32 if `trained`, a chunk of gradients in the weight's dtype (`wide` bytes), and beside
    them either a chunk of logits or, below float32, the chunk's product in the weight's dtype.
    """
    logits = 4.0 * tokens * sizes.text["vocab_size"]
    chunk, live = (logits, 3) if logits <= CHUNK else (CHUNK, 4)
    product = wide * sizes.head if trained and wide < 4 else 0
    return max(live * chunk, 4 * trained * sizes.head + chunk * wide / 4 + max(chunk, product))
