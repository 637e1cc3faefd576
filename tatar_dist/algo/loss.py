"""SFT and GRPO losses: pure torch on right-padded (B, C) tensors, additive over any split.

GRPO (arXiv 2402.03300), per completion token t of row b, with r = exp(logp - old_logp):

    pg_t  = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
    kl_t  = exp(ref - logp) - (ref - logp) - 1                  k3 estimator
    loss  = sum_b weight_b sum_t (c_t pg_t + kl_beta kl_t)

The weights are those of algo/aggregation.py, normalised over the global batch, so that the sum over micro-batches and
ranks is the global loss whatever the split; a learner whose framework averages gradients over ranks multiplies by the
number of ranks. `ratio: sequence` is GSPO (arXiv 2507.18071): r = exp(mean_t(logp - old_logp)) for all tokens of a row.

`clip_delta` also bounds r where A < 0 (arXiv 2505.07291): pg = -min(min(r, clip_delta) A, clip(r) A). Other objectives:

    cispo   pg = -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logp      no token loses its gradient (arXiv 2506.13585)
    sapo    pg = -4/tau sigmoid(tau (r - 1)) A                         tau_positive where A > 0, else tau_negative
                                                                       (arXiv 2511.20347)

c_t corrects for an engine that is not the learner: with w = exp(old_logp - engine_logp), of the token, or of the
sequence (the product over its tokens), `truncate` takes c = min(w, cap), `mask` takes c = w where floor <= w <= cap and
0 elsewhere; floor is 1/cap unless `importance_floor` says otherwise (arXiv 2510.18855 has 0.5 and 5). c is detached; it
does not touch the KL, and what it masks still counts in the normaliser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLoss:
    """Form of the loss: keys of `grpo` (config/schema.py), explained in algo/README.md."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio: Literal["token", "sequence"] = "token"
    importance: Literal["none", "token", "sequence"] = "none"
    importance_mode: Literal["truncate", "mask"] = "truncate"
    importance_cap: float = 2.0
    importance_floor: float | None = None
    objective: Literal["clip", "cispo", "sapo"] = "clip"
    clip_delta: float | None = None
    tau_positive: float = 1.0
    tau_negative: float = 1.05


@dataclass(frozen=True)
class LossParts:
    """`loss`: scalar with gradient. `sums`: floats that add up over micro-batches and ranks.

    policy, kl: weighted like the loss (kl without beta), so their global sums are the reported values. tokens, entropy:
    sums over all tokens. trained, clipped, importance_*: sums over the tokens of rows with a weight; importance_cut
    counts those that the importance correction capped or masked. `ratio_max` reduces by max.
    """

    loss: Tensor
    sums: dict[str, float] = field(default_factory=dict)
    ratio_max: float = 0.0


def k3_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Return the k3 estimate of KL(policy || reference) per token: >= 0, in nats."""
    r = ref_logp - logp
    return torch.expm1(r) - r  # expm1: no cancellation near r = 0, where training spends its time


def policy_loss(
    form: PolicyLoss,
    logp: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    weight: Tensor,
    *,
    kl_beta: float = 0.0,
    engine_logp: Tensor | None = None,
    entropy: Tensor | None = None,
) -> LossParts:
    """Return the clipped policy loss with k3 KL; formulas in the file's docstring.

    Args:
        logp: (B, C) natural-log probabilities of the sampled tokens under the policy, with gradient. Values at masked
            positions are never used, not even NaN.
        old_logp: (B, C) the same before the first inner iteration; None = logp.detach() (one inner iteration).
        ref_logp: (B, C) under the frozen reference; None needs kl_beta = 0.
        advantage: (B,).
        mask: (B, C) bool or 0/1, True at completion tokens, the end-of-turn token included.
        weight: (B,) what each token of the row counts (algo/aggregation.py); 0 leaves the row out.
        engine_logp: (B, C) as sampled; needed for an importance correction.
        entropy: (B, C) of the policy, only measured.

    Raises:
        ValueError: kl_beta > 0 without ref_logp; an importance correction without engine_logp.
    """
    if kl_beta > 0 and ref_logp is None:
        raise ValueError("kl_beta > 0 needs ref_logp")
    if form.importance != "none" and engine_logp is None:
        raise ValueError(f"importance={form.importance!r} needs engine_logp")
    mask = mask.bool()
    logp = _at_tokens(logp, mask)
    old = logp.detach() if old_logp is None else _at_tokens(old_logp, mask)
    advantage, weight = advantage.to(logp)[:, None], weight.to(logp)
    trained = mask & (weight > 0)[:, None]

    log_ratio = logp - old
    if form.ratio == "sequence":
        log_ratio = (log_ratio.sum(dim=1) / mask.sum(dim=1).clamp(min=1))[:, None].expand_as(logp)
    r = log_ratio.exp()
    pg, clipped = _objective(form, r, logp, advantage)

    sums: dict[str, float] = {}
    if engine_logp is not None and form.importance != "none":
        correction, cut = _importance(form, old.detach(), _at_tokens(engine_logp, mask))
        pg = pg * correction
        sums["importance_mean"] = float((correction * trained).sum())
        sums["importance_cut"] = float((cut & trained).sum())

    policy = ((pg * mask).sum(dim=1) * weight).sum()
    loss = policy
    if ref_logp is not None:
        kl = ((k3_kl(logp, _at_tokens(ref_logp, mask)) * mask).sum(dim=1) * weight).sum()
        loss = loss + kl_beta * kl if kl_beta > 0 else loss
        sums["kl"] = float(kl.detach())
    sums |= {
        "policy": float(policy.detach()),
        "clipped": float((clipped & trained).sum()),
        "trained": float(trained.sum()),
        "tokens": float(mask.sum()),
    }
    if entropy is not None:
        sums["entropy"] = float(_at_tokens(entropy.detach(), mask).sum())
    ratio_max = float(torch.where(trained, r.detach(), torch.zeros_like(r)).max()) if r.numel() else 0.0
    return LossParts(loss, sums, ratio_max)


def _objective(form: PolicyLoss, r: Tensor, logp: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, C) token losses and where a bound acts. r, logp: (B, C); advantage: (B, 1)."""
    low, high = 1.0 - form.clip_low, 1.0 + form.clip_high
    if form.objective == "sapo":
        tau = torch.full_like(advantage, form.tau_negative).masked_fill(advantage > 0, form.tau_positive)
        return -4.0 / tau * torch.sigmoid(tau * (r - 1.0)) * advantage, torch.zeros_like(r, dtype=torch.bool)
    if form.objective == "cispo":
        return -r.clamp(low, high).detach() * advantage * logp, ((r < low) | (r > high)) & (advantage != 0)
    delta = math.inf if form.clip_delta is None else form.clip_delta
    # Only the side that is really cut: below low and above delta for negative advantages, above high for positive ones.
    clipped = (((r < low) | (r > delta)) & (advantage < 0)) | ((r > high) & (advantage > 0))
    return -torch.minimum(r.clamp(max=delta) * advantage, r.clamp(low, high) * advantage), clipped


def _importance(form: PolicyLoss, old: Tensor, engine: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, C) corrections c and where they cut the ratio; old, engine are 0 where masked."""
    off = old - engine
    if form.importance == "sequence":
        off = off.sum(dim=1, keepdim=True).expand_as(off)
    ratio, cap = off.exp(), form.importance_cap
    if form.importance_mode == "truncate":
        return ratio.clamp(max=cap), ratio > cap
    floor = 1.0 / cap if form.importance_floor is None else form.importance_floor
    outside = (ratio > cap) | (ratio < floor)
    return torch.where(outside, torch.zeros_like(ratio), ratio), outside


def sft_loss(logp: Tensor, mask: Tensor, global_tokens: int) -> Tensor:
    """Return -sum(logp at mask) / global_tokens: mean cross-entropy of assistant tokens, nats.

    logp, mask: (B, C). Mean over the global batch; additive like `policy_loss`. Raises ValueError without tokens.
    """
    if global_tokens < 1:
        raise ValueError("global_tokens must be at least 1: a batch without a trained token has no loss")
    return -_at_tokens(logp, mask.bool()).sum() / global_tokens


def _at_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """Return x as float32 or wider, 0 where masked: padding NaNs would poison sum and gradient."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
