"""Turns learner rows into padded tensors, each image decoded and preprocessed once per step.

In: `LearnerRow`s of one micro-batch. Out: a `MicroBatch` of CPU tensors. Labels come from token spans: the loss
covers the completion's own tokens, its end-of-turn token included, and nothing of the prompt, for either padding side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from tatar_dist.backbones.qwen2_5_vl import Backbone, EncodedPrompt
from tatar_dist.data.images import decode_image
from tatar_dist.errors import RunError
from tatar_dist.records import LearnerRow


@dataclass(frozen=True)
class MicroBatch:
    """B padded rows over n_images distinct images.

    ids, attention_mask, type_ids: (B, L) int64; pixel_values: (patches, dim) float32 of the distinct images;
    grids: (n_images, 3); image_of_row: (B,) int64; completion_ids: (B, C) right-padded; mask: (B, C) bool;
    first: (B,) index in ids of each completion's first token; advantage: (B,) float32;
    weight: (B,) float32; sampled_logprobs: (B, C) float32 (0 where absent).
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor
    type_ids: torch.Tensor
    pixel_values: torch.Tensor
    grids: torch.Tensor
    image_of_row: torch.Tensor
    completion_ids: torch.Tensor
    mask: torch.Tensor
    first: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor
    sampled_logprobs: torch.Tensor

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


class PromptMismatch(RunError):
    """Engine and learner tokenised one prompt differently: the log-probabilities would be of different texts."""


class Collator:
    """Encodes prompts (cached for one step) and pads rows. `padding_side` moves the padding, never the loss."""

    def __init__(self, backbone: Backbone, padding_side: str = "right") -> None:
        self.backbone, self.padding_side = backbone, padding_side
        self._encoded: dict[str, EncodedPrompt] = {}

    def new_step(self) -> None:
        self._encoded.clear()

    def encode(self, row: LearnerRow) -> EncodedPrompt:
        found = self._encoded.get(row.image_id)
        if found is None:
            image = decode_image(row.image, row.image_id)
            found = self._encoded[row.image_id] = self.backbone.encode_prompt(row.prompt_text, image)
        if row.prompt_token_ids is not None and tuple(found.ids.tolist()) != row.prompt_token_ids:
            raise PromptMismatch(
                f"{row.image_id}: the engine read {len(row.prompt_token_ids)} prompt tokens, the learner "
                f"{len(found.ids)}; model.min_pixels/max_pixels and the tokenizer must be the same for both"
            )
        return found

    def __call__(self, rows: Sequence[LearnerRow]) -> MicroBatch:
        index: dict[str, int] = {}
        encoded: list[EncodedPrompt] = []
        for row in rows:
            if row.image_id not in index:
                index[row.image_id] = len(encoded)
                encoded.append(self.encode(row))
        image_of_row = [index[row.image_id] for row in rows]
        width = max(len(encoded[i].ids) + len(row.completion_ids) for i, row in zip(image_of_row, rows, strict=True))
        longest = max(len(row.completion_ids) for row in rows)
        n = len(rows)
        pad = self.backbone.tokenizer.pad_token_id
        ids = torch.full((n, width), pad, dtype=torch.long)
        attention = torch.zeros((n, width), dtype=torch.long)
        types = torch.zeros((n, width), dtype=torch.long)
        completion = torch.full((n, longest), pad, dtype=torch.long)
        mask = torch.zeros((n, longest), dtype=torch.bool)
        sampled = torch.zeros((n, longest))
        first = torch.zeros(n, dtype=torch.long)
        for r, row in enumerate(rows):
            prompt = encoded[image_of_row[r]]
            p, c = len(prompt.ids), len(row.completion_ids)
            start = 0 if self.padding_side == "right" else width - p - c
            answer = torch.tensor(row.completion_ids, dtype=torch.long)
            ids[r, start : start + p], ids[r, start + p : start + p + c] = prompt.ids, answer
            attention[r, start : start + p + c] = 1
            types[r, start : start + p] = prompt.type_ids
            completion[r, :c], mask[r, :c], first[r] = answer, True, start + p
            if row.sampled_logprobs is not None:
                sampled[r, :c] = torch.tensor(row.sampled_logprobs)
        return MicroBatch(
            ids=ids,
            attention_mask=attention,
            type_ids=types,
            pixel_values=torch.cat([e.pixel_values for e in encoded]),
            grids=torch.cat([e.grid for e in encoded]),
            image_of_row=torch.tensor(image_of_row),
            completion_ids=completion,
            mask=mask,
            first=first,
            advantage=torch.tensor([row.advantage for row in rows], dtype=torch.float32),
            weight=torch.tensor([row.weight for row in rows], dtype=torch.float32),
            sampled_logprobs=sampled,
        )
