"""The policy as the losses see it: log-probabilities and entropies at completion positions, nothing else.

`PolicyModel` wraps a transformers model so that one module forward does vision once per image, the language model
once per prompt and completion (shared_prefix.py), and the head at completion positions only, in chunks (head.py). SFT
and GRPO use the same forward; ZeRO-3 wraps it whole. Needs torch and transformers alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tatar_dist.learner import head, shared_prefix
from tatar_dist.learner.batch import MicroBatch


@dataclass(frozen=True)
class TokenLogprobs:
    """logp: (B, C) float32 natural-log probability of each completion token (0 at padding);
    entropy: (B, C) float32 nats of the sampled distribution, detached (0 at padding)."""

    logp: torch.Tensor
    entropy: torch.Tensor


class PolicyModel(nn.Module):
    """`backbone` is the transformers model (its parameter names stay those of the checkpoint, see `clean_name`); its
    attention and its head's forward are exchanged.

    The distribution is the one the engine samples from: logits / temperature, forbidden ids removed.
    """

    PREFIX = "backbone."

    def __init__(self, model: nn.Module, family: Any, forbidden_ids: list[int], temperature: float = 1.0) -> None:
        super().__init__()
        shared_prefix.install(model)
        head.install(model.lm_head, temperature)
        self.backbone = model
        self.family = family
        self.register_buffer("forbidden", torch.tensor(forbidden_ids, dtype=torch.long), persistent=False)

    @classmethod
    def clean_name(cls, name: str) -> str:
        """The checkpoint's name of a parameter of this module."""
        return name.removeprefix(cls.PREFIX)

    def forward(self, batch: MicroBatch) -> TokenLogprobs:
        model: Any = self.backbone
        features = self.family.vision(model, batch.pixel_values, batch.grids)
        hidden = self.family.hidden_states(model, batch.ids, batch.positions, batch.layout, features)
        logp, entropy = model.lm_head(hidden[batch.source], batch.target, self.forbidden)
        at = batch.row, batch.column
        zeros = torch.zeros(batch.mask.shape, device=logp.device)
        return TokenLogprobs(zeros.index_put(at, logp), zeros.index_put(at, entropy))
