"""Attention over a ragged batch, forward and backward; its log-sum-exp lets two be merged.

Segment i's queries see segment i's keys and nothing else; segments tile the token dimension, nothing is padded.
Kernels: flash attention of torch's CPU build (segments of equal lengths go in one call, causal ones also with others
of nearly their length), its varlen form on CUDA in half precision (torch.nn.attention.varlen; never run), and explicit
matrices for float32 on CUDA (never run there).
The backward takes the output and log-sum-exp of the *merged* attention: p_ij = exp(s_ij - lse_i) and rowsum(dO * O)
are then right for every part (arXiv 2205.14135, appendix B.4, where blocks of keys are what parts are here).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.attention.varlen  # registers the operators
from torch import Tensor

CAUSAL_CLASS = 32  # causal segments whose lengths round up to the same multiple of it share a call


@dataclass(frozen=True)
class Ragged:
    """Lengths of the segments, in tokens. Causal attention needs equal query and key lengths."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool

    @cached_property
    def _calls(self) -> list[tuple[Any, Any, Tensor | None]]:
        """Return (places of queries, places of keys, valid) of every kernel call on the CPU.

        One segment alone is a slice; n segments are (n, L) indices; `valid` (n, L) marks what is no padding.
        """
        starts = [list(accumulate(x, initial=0)) for x in (self.queries, self.keys)]
        classes: dict[Any, list[int]] = {}
        for i, (q, k) in enumerate(zip(self.queries, self.keys, strict=True)):
            if q and k:
                classes.setdefault(-(-q // CAUSAL_CLASS) if self.causal else (q, k), []).append(i)
        calls: list[tuple[Any, Any, Tensor | None]] = []
        for members in classes.values():
            at = [[s[i] for i in members] for s in starts]
            if len(members) == 1:
                (q,), (k,) = at
                i = members[0]
                calls.append((slice(q, q + self.queries[i]), slice(k, k + self.keys[i]), None))
                continue
            where = [_indices(a, [n[i] for i in members]) for a, n in zip(at, (self.queries, self.keys), strict=True)]
            valid = where[0][1]
            calls.append((where[0][0], where[1][0], None if bool(valid.all()) else valid))
        return calls

    def varlen(self, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
        """Return flash's varlen arguments: cu_seq_q, cu_seq_k (segments + 1,) int32, longest q, k.

        The longest query segment is given as at least 2: for 1 the kernel uses its decoding path, which expects a
        query in every segment.
        """
        if device not in self._on_device:
            bounds = [torch.tensor([0, *accumulate(x)], dtype=torch.int32) for x in (self.queries, self.keys)]
            self._on_device[device] = (
                bounds[0].to(device), bounds[1].to(device), max(2, *self.queries), max(self.keys, default=0)
            )  # fmt: skip
        return self._on_device[device]

    @cached_property
    def _on_device(self) -> dict[torch.device, tuple[Tensor, Tensor, int, int]]:
        return {}


@lru_cache(maxsize=256)
def ragged(queries: tuple[int, ...], keys: tuple[int, ...], causal: bool) -> Ragged:
    """Return one `Ragged` for equal lengths: all layers of a forward share its index tensors."""
    return Ragged(queries, keys, causal)


def _indices(starts: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return (n, L) positions, the last one repeated to L, and a (n, L) mask of the others."""
    steps = torch.arange(max(lengths))
    end = torch.tensor(lengths)[:, None]
    return torch.tensor(starts)[:, None] + torch.minimum(steps, end - 1), steps < end


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Ragged, scale: float) -> tuple[Tensor, Tensor]:
    """Compute softmax(q k^T scale) v within each segment.

    q: (T, H, D); k, v: (S, Hkv, D), H a multiple of Hkv. Returns out (T, H, D) and lse (T, H) in at least float32; a
    segment without keys gives 0 and -inf.
    """
    if _has_varlen(q):
        cu_q, cu_k, max_q, max_k = segments.varlen(q.device)
        out, lse, _ = torch.ops.torch_attn._varlen_attn(
            q, k, v, cu_q, cu_k, max_q, max_k, segments.causal, scale, None, q.shape[1] != k.shape[1]
        )
        return out, lse.transpose(0, 1)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
    for at_q, at_k, valid in segments._calls:
        o, norm = _attend(_take(q, at_q), _take(k, at_k), _take(v, at_k), segments.causal, scale)
        _put(out, at_q, o, valid)
        _put(lse[..., None], at_q, norm[..., None], valid)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Ragged, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of q, k, v; `out`, `lse` may be of a merged attention these are part of."""
    if _has_varlen(q):
        cu_q, cu_k, max_q, max_k = segments.varlen(q.device)
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the dropout that there is none of
        dq, dk, dv = torch.ops.torch_attn._varlen_attn_backward(
            grad.contiguous(), q, k, v, out, lse.transpose(0, 1).contiguous(), cu_q, cu_k, max_q, max_k,
            segments.causal, state, scale,
        )  # fmt: skip
        return dq, dk, dv
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for at_q, at_k, valid in segments._calls:
        g = _take(grad, at_q)
        if valid is not None:  # repeated queries have no gradient
            g = g * valid[:, None, :, None].to(g.device)
        parts = _attend_backward(
            g, _take(q, at_q), _take(k, at_k), _take(v, at_k), _take(out, at_q),
            _take(lse[..., None], at_q)[..., 0], segments.causal, scale,
        )  # fmt: skip
        for total, part, at in zip((dq, dk, dv), parts, (at_q, at_k, at_k), strict=True):
            _put(total, at, part, valid if at is at_q or segments.causal else None)
    return dq, dk, dv


def _has_varlen(q: Tensor) -> bool:
    return q.device.type != "cpu" and q.dtype in (torch.bfloat16, torch.float16)


def _take(x: Tensor, at: Any) -> Tensor:
    """Gather (T, H, D) as (n, H, L, D)."""
    return (x[at][None] if isinstance(at, slice) else x[at.to(x.device)]).transpose(1, 2)


def _put(total: Tensor, at: Any, part: Tensor, valid: Tensor | None) -> None:
    """Scatter (n, H, L, D) into (T, H, D); segments do not overlap, so nothing is added up."""
    part = part.transpose(1, 2)
    if isinstance(at, slice):
        total[at] = part[0]
    elif valid is None:
        total[at.to(total.device)] = part
    else:
        valid = valid.to(total.device)
        total[at.to(total.device)[valid]] = part[valid]


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attend over (n, H, L, D); return the same and lse (n, H, L)."""
    if q.device.type != "cpu":
        return explicit(q, k, v, causal, scale)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type != "cpu":
        return explicit_backward(grad, q, k, v, out, lse, causal, scale)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, scale=scale
    )


def explicit(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attend as `_attend` by an explicit matrix: flash attention lacks float32 on CUDA."""
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ _heads(v, q), lse


def explicit_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    p = (_scores(q, k, causal, scale) - lse[..., None]).exp()
    ds = p * (grad @ _heads(v, q).transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * scale
    dk, dv = ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad
    shape = (*k.shape[:2], -1, *k.shape[2:])
    return ds @ _heads(k, q), dk.view(shape).sum(2), dv.view(shape).sum(2)


def _heads(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = q @ _heads(k, q).transpose(-1, -2) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores
