"""The losses of SFT and GRPO: pure torch on right-padded (B, C) tensors, additive over micro-batches and ranks.

GRPO (arXiv 2402.03300), per completion token t of row b, with r = exp(logp - old_logp):

    pg_t  = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
    kl_t  = exp(ref - logp) - (ref - logp) - 1                  k3 estimator
    loss  = sum_b row_weight_b * mean_t(pg_t + kl_beta kl_t)

With row_weight = 1 / (rows of the global batch) this is the mean over sequences of per-sequence token means, and the
sum over micro-batches and ranks is the global loss whatever the split; a learner whose framework averages gradients
over ranks multiplies by the number of ranks. `reduction="sum"` takes the token sum instead of the mean: with
row_weight = 1 / global tokens that is the token-mean loss, with 1 / (global rows * max tokens) Dr. GRPO's constant
normaliser. `ratio="sequence"` is GSPO: r = exp(mean_t(logp - old_logp)), the same for all tokens of a row.
Where the engine that sampled is not the learner, `engine_logp` and `importance_cap` weigh pg_t by
min(exp(old_logp - engine_logp), cap), detached (truncated importance sampling).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossParts:
    """`loss`: scalar tensor with gradient. `sums`: detached floats that add up over micro-batches and ranks.

    policy, kl: normalised like the loss (kl without beta), so their global sums are the reported values. entropy,
    clipped, importance: sums over tokens, to divide by `tokens`. rows: rows with at least one token. `ratio_max`
    reduces by max.
    """

    loss: Tensor
    sums: dict[str, float] = field(default_factory=dict)
    ratio_max: float = 0.0


def k3_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 estimate of KL(policy || reference) per token, >= 0, in nats: exp(r) - r - 1, r = ref_logp - logp."""
    r = ref_logp - logp
    return torch.expm1(r) - r  # expm1: no cancellation near r = 0, where training spends its time


def policy_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_beta: float,
    row_weight: float | Tensor,
    reduction: str = "mean",
    ratio: str = "token",
    engine_logp: Tensor | None = None,
    importance_cap: float | None = None,
    importance: str = "token",
    entropy: Tensor | None = None,
) -> LossParts:
    """The clipped policy loss with k3 KL; formulas in the file's docstring.

    Args:
        logp: (B, C) natural-log probabilities of the sampled tokens under the policy, with gradient. Values at masked
            positions are never used, not even NaN.
        old_logp: (B, C) the same before the first inner iteration; None = logp.detach() (one inner iteration).
        ref_logp: (B, C) under the frozen reference; None needs kl_beta = 0.
        advantage: (B,).
        mask: (B, C) bool or 0/1, True at completion tokens, the end-of-turn token included.
        row_weight: what each row counts, 1 / global rows; or (B,) to drop rows by a 0.
        engine_logp: (B, C) as sampled; with `importance_cap` turns the truncated correction on.
        importance: token, or sequence (the product of the row's token ratios, capped).
        entropy: (B, C) of the policy, only measured.

    Raises:
        ValueError: kl_beta > 0 without ref_logp; importance_cap without engine_logp; an unknown variant.
    """
    if kl_beta > 0 and ref_logp is None:
        raise ValueError("kl_beta > 0 needs ref_logp")
    if importance_cap is not None and engine_logp is None:
        raise ValueError("importance_cap needs engine_logp")
    for name, value, allowed in (
        ("reduction", reduction, ("mean", "sum")),
        ("ratio", ratio, ("token", "sequence")),
        ("importance", importance, ("token", "sequence")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
    mask = mask.bool()
    logp = _at_tokens(logp, mask)
    old = logp.detach() if old_logp is None else _at_tokens(old_logp, mask)
    advantage = advantage.to(logp)[:, None]
    lengths = mask.sum(dim=1)
    per_row = 1.0 / lengths.clamp(min=1).to(logp) if reduction == "mean" else torch.ones_like(lengths).to(logp)
    weight = torch.as_tensor(row_weight, dtype=logp.dtype, device=logp.device) * per_row

    log_ratio = logp - old
    if ratio == "sequence":
        log_ratio = (log_ratio.sum(dim=1) / lengths.clamp(min=1))[:, None].expand_as(logp)
    r = log_ratio.exp()
    pg = -torch.minimum(r * advantage, r.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage)

    sums: dict[str, float] = {}
    if importance_cap is not None and engine_logp is not None:
        off = old.detach() - _at_tokens(engine_logp, mask)
        if importance == "sequence":
            off = off.sum(dim=1, keepdim=True).expand_as(logp)
        correction = off.exp().clamp(max=importance_cap)
        pg = pg * correction
        sums["importance"] = float((correction * mask).sum())

    policy = ((pg * mask).sum(dim=1) * weight).sum()
    loss = policy
    if ref_logp is not None:
        kl = ((k3_kl(logp, _at_tokens(ref_logp, mask)) * mask).sum(dim=1) * weight).sum()
        loss = loss + kl_beta * kl if kl_beta > 0 else loss
        sums["kl"] = float(kl.detach())
    # Only the side that the min really cuts: below for negative advantages, above for positive ones.
    clipped = ((r < 1.0 - clip_low) & (advantage < 0)) | ((r > 1.0 + clip_high) & (advantage > 0))
    sums |= {
        "policy": float(policy.detach()),
        "clipped": float((clipped & mask).sum()),
        "tokens": float(mask.sum()),
        "rows": float((lengths > 0).sum()),
    }
    if entropy is not None:
        sums["entropy"] = float(_at_tokens(entropy.detach(), mask).sum())
    ratio_max = float(torch.where(mask, r.detach(), torch.zeros_like(r)).max()) if r.numel() else 0.0
    return LossParts(loss, sums, ratio_max)


def sft_loss(logp: Tensor, mask: Tensor, global_tokens: int) -> Tensor:
    """-sum(logp at mask) / global_tokens: mean cross-entropy over the global batch's assistant tokens, in nats.

    logp, mask: (B, C). Additive over micro-batches and ranks, like `policy_loss`. Raises ValueError without tokens.
    """
    if global_tokens < 1:
        raise ValueError("global_tokens must be at least 1: a batch without a trained token has no loss")
    return -_at_tokens(logp, mask.bool()).sum() / global_tokens


def _at_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """x in at least float32, 0 at masked positions: a NaN of the padding would poison the sum, and its gradient too."""
    x = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
