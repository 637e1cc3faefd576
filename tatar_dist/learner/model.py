"""The policy as the losses see it: log-probabilities and entropies at completion positions, nothing else.

`PolicyModel` wraps a transformers model so that one module forward does vision once per image, the language model,
and the head at completion positions only (never logits over the prompt). SFT and GRPO use the same forward; ZeRO-3
wraps it whole. Needs torch and transformers alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tatar_dist.learner.batch import MicroBatch


@dataclass(frozen=True)
class TokenLogprobs:
    """logp: (B, C) float32 natural-log probability of each completion token (0 at padding);
    entropy: (B, C) float32 nats of the sampled distribution, detached (0 at padding)."""

    logp: torch.Tensor
    entropy: torch.Tensor


class PolicyModel(nn.Module):
    """`backbone` is the transformers model (its parameter names stay those of the checkpoint, see `clean_name`).

    The distribution is the one the engine samples from: logits / temperature, forbidden ids removed.
    """

    PREFIX = "backbone."

    def __init__(self, model: nn.Module, family: Any, forbidden_ids: list[int], temperature: float = 1.0) -> None:
        super().__init__()
        self.backbone = model
        self.family = family
        self.temperature = temperature
        self.register_buffer("forbidden", torch.tensor(forbidden_ids, dtype=torch.long), persistent=False)

    @classmethod
    def clean_name(cls, name: str) -> str:
        """The checkpoint's name of a parameter of this module."""
        return name.removeprefix(cls.PREFIX)

    def forward(self, batch: MicroBatch) -> TokenLogprobs:
        model: Any = self.backbone
        features = self.family.vision(model, batch.pixel_values, batch.grids)  # once per image, not per row
        rows = batch.image_of_row.tolist()
        hidden = self.family.hidden_states(
            model,
            batch.ids,
            batch.attention_mask,
            batch.type_ids,
            batch.grids[batch.image_of_row],
            tuple(features[i] for i in rows),
        )
        row, column = batch.mask.nonzero(as_tuple=True)
        # the token at position t is predicted by the state at t - 1
        states = hidden[row, batch.first[row] + column - 1]
        logits = model.lm_head(states).float() / self.temperature
        logits = logits.index_fill(-1, self.forbidden, float("-inf"))
        logp_all = logits.log_softmax(-1)
        target = batch.completion_ids[row, column]
        logp = logp_all.gather(-1, target[:, None])[:, 0]
        with torch.no_grad():
            p = logp_all.exp()
            entropy = -(p * logp_all.masked_fill(p == 0, 0.0)).sum(-1)
        shape = batch.mask.shape
        zeros = torch.zeros(shape, device=logp.device)
        return TokenLogprobs(zeros.index_put((row, column), logp), zeros.index_put((row, column), entropy))
