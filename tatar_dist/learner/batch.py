"""Pack learner rows without padding; decode and preprocess each image once per step.

`LearnerRow`s of one micro-batch become a `MicroBatch` of CPU tensors: every prompt once, then its completions
(shared_prefix.py). The last token of a completion is left out, because nothing is predicted from it. The loss covers
the completion's tokens, its end-of-turn token included, and nothing of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from tatar_dist.data.images import decode_image
from tatar_dist.errors import RunError
from tatar_dist.learner.shared_prefix import Layout
from tatar_dist.models.base import EncodedPrompt, QwenVL
from tatar_dist.types import LearnerRow


@dataclass(frozen=True)
class MicroBatch:
    """B rows of n distinct images packed into T tokens; N completion tokens, at most C in a row.

    ids: (T,) int64; positions: (3, T) int64, of rotary embeddings; layout: segments of the packed row;
    pixel_values: (patches, dim) float32 of the distinct images; grids: (n, 3) int64;
    target: (N,) int64 completion tokens; source: (N,) position in the packed row of the state that predicts each;
    row, column: (N,) int64 place in the right-padded tensors; mask: (B, C) bool; advantage, weight: (B,) float32;
    sampled_logprobs: (B, C) float32 (0 where absent).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    layout: Layout
    pixel_values: torch.Tensor
    grids: torch.Tensor
    target: torch.Tensor
    source: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    mask: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor
    sampled_logprobs: torch.Tensor

    def to(self, device: torch.device) -> MicroBatch:
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return MicroBatch(**{k: v if k == "layout" else v.to(device, non_blocking=True) for k, v in moved.items()})


class PromptMismatch(RunError):
    """Engine and learner tokenised a prompt differently; log-probabilities cannot be compared."""


class Collator:
    """Encodes prompts (cached for one step) and packs rows."""

    def __init__(self, backbone: QwenVL) -> None:
        self.backbone = backbone
        self._encoded: dict[str, EncodedPrompt] = {}

    def new_step(self) -> None:
        self._encoded.clear()

    def encode(self, row: LearnerRow) -> EncodedPrompt:
        prompt = self._encoded.get(row.image_id)
        if prompt is None:
            image = decode_image(row.image, row.image_id)
            prompt = self._encoded[row.image_id] = self.backbone.encode_prompt(row.prompt_text, image)
        if row.prompt_token_ids is not None and tuple(prompt.ids.tolist()) != row.prompt_token_ids:
            raise PromptMismatch(
                f"{row.image_id}: the engine read {len(row.prompt_token_ids)} prompt tokens, the learner "
                f"{len(prompt.ids)}; model.min_pixels/max_pixels and the tokenizer must be the same for both"
            )
        return prompt

    def __call__(self, rows: Sequence[LearnerRow]) -> MicroBatch:
        encoded: dict[str, EncodedPrompt] = {}
        members: dict[str, list[int]] = {}
        for r, row in enumerate(rows):
            if not row.completion_ids:
                raise RunError(f"{row.image_id}: a completion has no tokens, so there is nothing to learn from it")
            encoded[row.image_id] = self.encode(row)
            members.setdefault(row.image_id, []).append(r)
        prompts = list(encoded.values())
        ids = [p.ids for p in prompts]
        positions = [self.backbone.positions(p) for p in prompts]
        target, source, row_of, column = [], [], [], []
        lengths, ends, at = [], [], 0
        for p in prompts:
            at += len(p.ids)
            ends.append(at - 1)
        for group, last, before in zip(members.values(), ends, list(positions), strict=True):
            lengths.append(tuple(len(rows[r].completion_ids) - 1 for r in group))
            start = before.max() + 1  # an image takes fewer positions than tokens
            for r, n in zip(group, lengths[-1], strict=True):
                answer = torch.tensor(rows[r].completion_ids, dtype=torch.long)
                ids.append(answer[:-1])
                positions.append((start + torch.arange(n)).expand(3, n))
                target.append(answer)
                source.append(torch.cat([torch.tensor([last]), at + torch.arange(n)]))
                row_of.append(torch.full((n + 1,), r))
                column.append(torch.arange(n + 1))
                at += n
        longest = max(len(row.completion_ids) for row in rows)
        mask = torch.zeros((len(rows), longest), dtype=torch.bool)
        sampled = torch.zeros((len(rows), longest))
        for r, row in enumerate(rows):
            mask[r, : len(row.completion_ids)] = not row.filler
            if row.sampled_logprobs is not None:
                sampled[r, : len(row.completion_ids)] = torch.tensor(row.sampled_logprobs)
        return MicroBatch(
            ids=torch.cat(ids),
            positions=torch.cat(positions, dim=1),
            layout=Layout(tuple(len(p.ids) for p in prompts), tuple(lengths)),
            pixel_values=torch.cat([p.pixel_values for p in prompts]),
            grids=torch.cat([p.grid for p in prompts]),
            target=torch.cat(target),
            source=torch.cat(source),
            row=torch.cat(row_of),
            column=torch.cat(column),
            mask=mask,
            advantage=torch.tensor([row.advantage for row in rows], dtype=torch.float32),
            weight=torch.tensor([row.weight for row in rows], dtype=torch.float32),
            sampled_logprobs=sampled,
        )
