"""Low-rank adapters (LoRA, arXiv 2106.09685), for machines too small to train all weights.

A linear layer computes x W^T + b + (alpha / rank) x A^T B^T, where B starts at 0; all else is frozen. Adapters never
leave the learners: engines and checkpoints get W + (alpha / rank) B A under W's own name (`merged`). Without them
(`without`) the model is the one it started from, so the reference of GRPO needs no second copy.

In bfloat16 merged weights are rounded: what an adapter adds to a weight of 0.02 is lost below 4e-5. Engines so sample
from a policy a little behind the learners', which GRPO corrects for (schedule.importance). Needs torch alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from tatar_dist.config.schema import ModelConfig
from tatar_dist.errors import UserError

DOWN, UP = "lora_a", "lora_b"


class LoraLinear(nn.Module):
    """A linear layer with the same parameters under the same names, frozen, and two of its own.

    lora_a: (rank, in), Kaiming uniform like a linear layer of torch; lora_b: (out, rank), zeros.
    """

    def __init__(self, layer: nn.Linear, rank: int, scale: float, random: torch.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(layer.in_features)
        start = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=random)
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_a = nn.Parameter(start.to(layer.weight))
        self.lora_b = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        self.scale, self.active = scale, True

    def forward(self, x: Tensor) -> Tensor:
        out = functional.linear(x, self.weight, self.bias)
        if not self.active:
            return out
        low = functional.linear(functional.linear(x, self.lora_a), self.lora_b)
        return out + self.scale * low


def scale(config: ModelConfig) -> float:
    """Return alpha / rank, adapters' factor (arXiv 2106.09685, section 4.1); 0 without adapters."""
    return config.lora_alpha / config.lora_rank if config.lora_rank else 0.0


def install(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Freeze `model` and put adapters into its linear layers that were trained.

    They are in all but the head, or in those named in `config.lora_targets`, and the same on every rank.

    Raises:
        UserError: a target that names no such layer, or a rank above a layer's width.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad and not name.endswith("lm_head")
    }
    known = {name.rpartition(".")[2] for name in layers}
    for target in config.lora_targets:
        if target not in known:
            raise UserError(
                f"model.lora_targets: no trained linear layer is called {target!r}; use {', '.join(sorted(known))}"
            )
    model.requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        if config.lora_targets and name.rpartition(".")[2] not in config.lora_targets:
            continue
        if config.lora_rank > (width := min(layer.in_features, layer.out_features)):
            raise UserError(f"model.lora_rank={config.lora_rank}: {name} is only {width} wide; lower the rank")
        model.set_submodule(name, LoraLinear(layer, config.lora_rank, scale(config), random))


@contextlib.contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """Disable the adapters of `model` within the block."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def is_adapter(name: str) -> bool:
    """Return whether a parameter of that name belongs to an adapter."""
    return name.rpartition(".")[2] in (DOWN, UP)


def merged(named: Iterable[tuple[str, Tensor]], scale: float) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight plus what its adapter adds, in float32); no adapters.

    `named` holds a layer's adapter wherever it holds its weight. A weight without one is not copied.
    """
    by_name = dict(named)
    for name, weight in by_name.items():
        if is_adapter(name):
            continue
        down, up = (by_name.get(f"{name.removesuffix('weight')}{part}") for part in (DOWN, UP))
        if down is None or up is None:
            yield name, weight.detach()
        else:
            added = up.detach().float() @ down.detach().float()
            yield name, (weight.detach().float() + scale * added).to(weight.dtype)
