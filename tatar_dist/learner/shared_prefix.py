"""Attention of completions that share one copy of a prompt; the layout of a packed row.

A packed row is [prompt 1 … prompt n | completions of 1 … completions of n], every token once. A prompt's token sees its
prompt up to itself; a completion's token sees its whole prompt and its own completion up to itself. That is two ragged
attentions (ragged.py), one over every segment with itself, one of each group's completions over its prompt, merged
by their log-sum-exp: no mask, no padding, no copy of a prompt's keys. `install` puts it into a transformers model,
whose vision tower gets the same kernels for its windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tatar_dist.learner import ragged
from tatar_dist.learner.ragged import Ragged

# transformers passes vision windows as one ragged batch if the name contains "flash"
NAME = "tatar_flash_shared_prefix"


@dataclass(frozen=True)
class Layout:
    """Tokens of n groups' prompts, and of each group's completions; a completion may have 0."""

    prompts: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    @property
    def prompt_tokens(self) -> int:
        return sum(self.prompts)

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + sum(map(sum, self.completions))

    @cached_property
    def own(self) -> Ragged:
        """Return the segments of every prompt and every completion with itself."""
        lengths = (*self.prompts, *(c for group in self.completions for c in group if c))
        return ragged.ragged(lengths, lengths, True)

    @cached_property
    def cross(self) -> Ragged:
        """Return the segments of all completions of a group with its prompt."""
        return ragged.ragged(tuple(map(sum, self.completions)), self.prompts, False)


class _SharedPrefix(torch.autograd.Function):
    """Attention of a packed row: q (T, H, D), k, v (T, Hkv, D) -> (T, H, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
        out, lse = ragged.forward(q, k, v, layout.own, scale)
        p = layout.prompt_tokens
        if p < layout.tokens:
            seen, norm = ragged.forward(q[p:], k[:p], v[:p], layout.cross, scale)
            both = torch.logaddexp(lse[p:], norm)
            share = [(x - both).exp()[..., None] for x in (lse[p:], norm)]  # in float32, rounded once
            out = torch.cat([out[:p], (out[p:] * share[0] + seen * share[1]).to(out.dtype)])
            lse = torch.cat([lse[:p], both])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        (grad,), layout, p = grads, ctx.layout, ctx.layout.prompt_tokens
        dq, dk, dv = ragged.backward(grad, q, k, v, out, lse, layout.own, ctx.scale)
        if p < layout.tokens:
            parts = ragged.backward(grad[p:], q[p:], k[:p], v[:p], out[p:], lse[p:], layout.cross, ctx.scale)
            for total, part in zip((dq[p:], dk[:p], dv[:p]), parts, strict=True):
                total += part
        return dq, dk, dv, None, None


class _Windows(torch.autograd.Function):
    """Attention within segments, for the vision tower."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Ragged, scale: float) -> Tensor:
        out, lse = ragged.forward(q, k, v, segments, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        return *ragged.backward(grads[0], q, k, v, out, lse, ctx.segments, ctx.scale), None, None


_windows: Any = WeakTensorKeyDictionary()  # all layers get the same tensor of bounds


def _windows_of(bounds: Tensor) -> Ragged:
    if bounds not in _windows:
        ends = bounds.tolist()
        lengths = tuple(b - a for a, b in zip(ends, ends[1:], strict=False))
        _windows[bounds] = ragged.ragged(lengths, lengths, False)
    return _windows[bounds]


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute attention for transformers; returns (output (1, T, H, D), None).

    query: (1, H, T, D); key and value: (1, Hkv, T, D). If the keyword argument `layout` is given, the row is packed;
    else `cu_seq_lens_q` gives the bounds of the vision tower's windows. `attention_mask` is ignored.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if (layout := kwargs.get("layout")) is not None:
        return _SharedPrefix.apply(q, k, v, layout, scaling)[None], None
    return _Windows.apply(q, k, v, _windows_of(kwargs["cu_seq_lens_q"]), scaling)[None], None


def install(model: Any) -> None:
    """Let a transformers language model use packed rows, and its vision tower ragged windows."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    config = model.config
    config.text_config._attn_implementation = config.vision_config._attn_implementation = NAME
    for part in model.modules():  # a sub-model may hold a copy of its configuration
        if hasattr(part, "config") and part is not model and part.config is not config:
            part.config._attn_implementation = NAME
