"""Compute log-probabilities with one padded row per completion and all its logits.

This is the reference in tests of the packed forward and the baseline of `tatar-dist bench learner`; no run uses it. It
calls an unmodified transformers model and none of our modules but the collator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tatar_dist.learner.batch import Collator
from tatar_dist.types import LearnerRow


def pad(collate: Collator, rows: Sequence[LearnerRow]) -> dict[str, Tensor]:
    """Return inputs of right-padded rows, each with its own copy of its image's patches."""
    prompts = [collate.encode(row) for row in rows]
    answers = [torch.tensor(row.completion_ids) for row in rows]
    ids = [torch.cat([p.ids, a]) for p, a in zip(prompts, answers, strict=True)]
    types = [torch.cat([p.type_ids, torch.zeros_like(a)]) for p, a in zip(prompts, answers, strict=True)]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=collate.backbone.tokenizer.pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "mm_token_type_ids": pad_sequence(types, batch_first=True),
        "pixel_values": torch.cat([p.pixel_values for p in prompts]),
        "image_grid_thw": torch.cat([p.grid for p in prompts]),
    }


def token_logprobs(
    model: nn.Module,
    collate: Collator,
    rows: Sequence[LearnerRow],
    forbidden: Sequence[int],
    temperature: float = 1.0,
    padded: dict[str, Tensor] | None = None,
) -> Tensor:
    """Return (B, C) float32 logprobs of completion tokens, 0 at padding. `padded`: `pad(rows)`."""
    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in (padded or pad(collate, rows)).items()}
    module: Any = model
    module.model.rope_deltas = None  # kept between calls
    longest = max(len(row.completion_ids) for row in rows)
    first = [len(collate.encode(row).ids) for row in rows]
    skipped = min(first) - 1  # before the first completion token no logits are asked for
    keep = inputs["input_ids"].shape[1] - skipped
    logits = module(**inputs, use_cache=False, logits_to_keep=keep).logits.float() / temperature
    logits = logits.index_fill(-1, torch.tensor(forbidden, dtype=torch.long, device=device), float("-inf"))
    target = inputs["input_ids"][:, skipped + 1 :, None]
    logp = logits[:, :-1].log_softmax(-1).gather(-1, target)[..., 0]
    out = torch.zeros(len(rows), longest, device=device)
    for r, row in enumerate(rows):
        start, n = first[r] - 1 - skipped, len(row.completion_ids)
        out[r, :n] = logp[r, start : start + n]
    return out
