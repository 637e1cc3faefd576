"""The policy: log-probabilities and entropies at completion positions.

`PolicyModel` wraps a transformers model so that one module forward does vision once per image, the language model
once per prompt and completion (shared_prefix.py), and the head at completion positions only. SFT and GRPO use the same
forward; ZeRO-3 wraps it whole. Needs torch and transformers alone.

The head never holds all logits: a vocabulary of 152k makes 0.6 MB of float32 logits a token. CHUNK_BYTES bounds the
logits of a chunk, of which a few copies exist at a time, forward and backward (which computes them again).
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tatar_dist.learner import shared_prefix
from tatar_dist.learner.batch import MicroBatch


@dataclass(frozen=True)
class TokenLogprobs:
    """logp: (B, C) float32 natural-log probability of each completion token (0 at padding);
    entropy: (B, C) float32 nats of the sampled distribution, detached (0 at padding)."""

    logp: Tensor
    entropy: Tensor


class PolicyModel(nn.Module):
    """The transformers model `backbone`, with its attention and its head's forward replaced.

    PREFIX stands before the checkpoint's names of its parameters. The distribution is the one the engine samples from:
    logits / temperature, forbidden ids removed.
    """

    PREFIX = "backbone."

    def __init__(
        self,
        model: nn.Module,
        family: Any,
        forbidden_ids: list[int],
        temperature: float = 1.0,
        float32_head: bool = True,
    ) -> None:
        super().__init__()
        shared_prefix.install(model)
        install_head(model.lm_head, temperature, float32_head)
        self.backbone = model
        self.family = family
        self.register_buffer("forbidden", torch.tensor(forbidden_ids, dtype=torch.long), persistent=False)

    def forward(self, batch: MicroBatch) -> TokenLogprobs:
        model: Any = self.backbone
        features = self.family.vision(model, batch.pixel_values, batch.grids)
        hidden = self.family.hidden_states(model, batch.ids, batch.positions, batch.layout, features)
        logp, entropy = model.lm_head(hidden[batch.source], batch.target, self.forbidden)
        at = batch.row, batch.column
        zeros = torch.zeros(batch.mask.shape, device=logp.device)
        return TokenLogprobs(zeros.index_put(at, logp), zeros.index_put(at, entropy))


CHUNK_BYTES = 256 << 20


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_BYTES // (4 * vocabulary))
    return [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]


class TokenLogprob(torch.autograd.Function):
    """Map states (N, H), weight (V, H), targets (N,) to logp (N,) and entropy (N,), float32.

    The distribution is softmax(states weight^T / temperature) without the forbidden ids. Entropy has no gradient.
    exact: see `_logits`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        forbidden: Tensor,
        temperature: float,
        exact: bool = True,
    ) -> tuple[Tensor, Tensor]:
        n = len(targets)
        logp, entropy, norm = (torch.empty(n, dtype=torch.float32, device=states.device) for _ in range(3))
        for c in _chunks(n, len(weight)):
            logits = _logits(states[c], weight, forbidden, temperature, exact)
            norm[c] = logits.logsumexp(-1)
            logp[c] = logits.gather(-1, targets[c, None])[:, 0] - norm[c]
            p = (logits - norm[c, None]).exp()
            entropy[c] = norm[c] - (p * logits.index_fill_(-1, forbidden, 0.0)).sum(-1)  # 0 x -inf is NaN
        ctx.save_for_backward(states, weight, targets, forbidden, norm)
        ctx.temperature, ctx.exact = temperature, exact
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        states, weight, targets, forbidden, norm = ctx.saved_tensors
        grad, t = grads[0], ctx.temperature
        d_states = torch.empty_like(states)
        total = None  # at least float32: in lower precision late chunks would be rounded away
        if ctx.needs_input_grad[1]:
            total = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for c in _chunks(len(targets), len(weight)):
            d = _logits(states[c], weight, forbidden, t, ctx.exact).sub_(norm[c, None]).exp_().neg_()
            d[torch.arange(len(d), device=d.device), targets[c]] += 1
            d = d.mul_(grad[c, None] / t).to(states.dtype)
            d_states[c] = d @ weight
            if total is not None and total.dtype == d.dtype:
                total.addmm_(d.T, states[c])
            elif total is not None:
                total += d.T @ states[c]
        return d_states, None if total is None else total.to(weight.dtype), None, None, None, None


def _logits(states: Tensor, weight: Tensor, forbidden: Tensor, temperature: float, exact: bool) -> Tensor:
    """Return (n, V) float32 logits, -inf where an id is forbidden.

    `exact`: sums are not rounded to the weight's dtype.
    """
    if not exact or weight.dtype == torch.float32:
        logits = (states @ weight.T).float()
    elif weight.device.type == "cpu":
        logits = states.float() @ weight.T.float()
    else:
        logits = torch.mm(states, weight.T, out_dtype=torch.float32)
    if temperature != 1.0:
        logits /= temperature
    return logits.index_fill_(-1, forbidden, float("-inf"))


def install_head(head: nn.Linear, temperature: float, exact: bool = True) -> None:
    """Make `TokenLogprob` the forward of `head`, so that ZeRO-3 gathers its weight like others'."""

    def forward(self: Any, states: Tensor, targets: Tensor, forbidden: Tensor) -> Any:
        return TokenLogprob.apply(states, self.weight, targets, forbidden, temperature, exact)

    head.forward = types.MethodType(forward, head)
