"""Stage 2 of pretraining: train the language model to read the (frozen) image tokens, in the base model's own words.

Takes a model with a trained tower and crops, and trains it in place to describe an image in the demo's sentences and to
write single measurements as two digits. The TASK prompts, the <think>/<answer> tags and scores inside a description
never occur in this data: SFT and GRPO teach scoring in that format.

A training row is one conversation of several turns about one image, so that the image is encoded once:

    user: [image]Measure noise.   assistant: noise=43
    user: Describe the image.     assistant: I notice strong random noise ...
    user: Measure quality.        assistant: quality=37

The order of turns is random; the loss is on the assistant's turns with their end-of-turn token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from tatar_dist.demo.tiny.crops import CropSet, measure_names
from tatar_dist.demo.tiny.tower import features
from tatar_dist.types import TASKS, Task

SCORE_NAME: dict[Task, str] = {"iqa": "quality", "iaa": "beauty"}
DESCRIBE = "Describe the image."
MEASURE_ALL = "List the measurements."
IMAGE_TOKENS, IMAGE_SIDE = 16, 4
_PREFIX = "<|im_start|>user\n<|vision_start|>"


def measure_request(name: str) -> str:
    return f"Measure {name}."


def written(name: str, value: float) -> str:
    """Format a value in [0, 1] as two digits, `noise=07`, without a blank so that a digit follows the sign."""
    return f"{name.replace('_', ' ')}={min(99, max(0, round(100 * float(value)))):02d}"


def caption(crops: CropSet, i: int) -> str:
    """All measurements of crop `i`, the score last."""
    parts = [written(n, v) for n, v in zip(measure_names(crops.task), crops.measures[i], strict=True)]
    return " ".join([*parts, written(SCORE_NAME[crops.task], crops.score[i])])


def conversation(
    crops: CropSet, i: int, rng: np.random.Generator, describe_share: float = 0.5
) -> list[tuple[str, str]]:
    """Return the (request, reply) turns of one training row in random order; the score is always among them."""
    names = measure_names(crops.task)
    turns = [(measure_request(SCORE_NAME[crops.task]), written(SCORE_NAME[crops.task], crops.score[i]))]
    for k in rng.permutation(len(names))[:2]:
        turns.append((measure_request(names[k].replace("_", " ")), written(names[k], crops.measures[i, k])))
    if rng.random() < describe_share:
        turns.append((DESCRIBE, crops.rationales[i]))
    if rng.random() < 0.15:
        turns.append((MEASURE_ALL, caption(crops, i)))
    return [turns[k] for k in rng.permutation(len(turns))]


@dataclass(frozen=True)
class AlignmentRows:
    """A padded batch: `ids` (B, L) int64; `labels` (B, L) int64, -100 where no loss applies; `positions` (3, B, L)."""

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


def row_positions(prefix: int, length: int) -> torch.Tensor:
    """Return (3, length) rotary positions of a row with its image after `prefix` tokens, as the model numbers them."""
    cell = torch.arange(IMAGE_TOKENS)
    image = prefix + torch.stack([torch.zeros_like(cell), cell // IMAGE_SIDE, cell % IMAGE_SIDE])
    before = torch.arange(prefix).expand(3, -1)
    after = prefix + IMAGE_SIDE + torch.arange(length - prefix - IMAGE_TOKENS).expand(3, -1)
    return torch.cat([before, image, after], 1)


class Writer:
    """Tokenise conversations to rows; encodings of short, recurring texts are cached."""

    def __init__(self, tokenizer: Any):
        self._encode_text: Callable[[str], list[int]] = lambda t: tokenizer(t, add_special_tokens=False)["input_ids"]
        self._kept: dict[str, list[int]] = {}
        self.image_id = int(tokenizer.convert_tokens_to_ids("<|image_pad|>"))
        self.prefix = self._encode_text(_PREFIX)

    def _encode(self, text: str) -> list[int]:
        if len(text) > 60:
            return self._encode_text(text)
        if text not in self._kept:
            self._kept[text] = self._encode_text(text)
        return self._kept[text]

    def prompt(self, request: str) -> list[int]:
        """Return the token ids of a conversation up to the reply to its first request."""
        head = [*self.prefix, *[self.image_id] * IMAGE_TOKENS, *self._encode("<|vision_end|>")]
        return [*head, *self._encode(request), *self._encode("<|im_end|>\n<|im_start|>assistant\n")]

    def rows(self, conversations: list[list[tuple[str, str]]]) -> AlignmentRows:
        made: list[tuple[list[int], list[int]]] = []
        for turns in conversations:
            ids: list[int] = []
            labels: list[int] = []
            for k, (request, reply) in enumerate(turns):
                asked = self.prompt(request) if k == 0 else [
                    *self._encode("\n<|im_start|>user\n"), *self._encode(request),
                    *self._encode("<|im_end|>\n<|im_start|>assistant\n"),
                ]  # fmt: skip
                said = [*self._encode(reply), *self._encode("<|im_end|>")]
                ids += [*asked, *said]
                labels += [*[-100] * len(asked), *said]
            made.append((ids, labels))
        length = max(len(ids) for ids, _ in made)
        ids_out = torch.zeros(len(made), length, dtype=torch.long)
        labels_out = torch.full((len(made), length), -100)
        for r, (ids, labels) in enumerate(made):
            ids_out[r, : len(ids)] = torch.tensor(ids)
            labels_out[r, : len(labels)] = torch.tensor(labels)
        positions = row_positions(len(self.prefix), length)[:, None].expand(-1, len(made), -1)
        return AlignmentRows(ids_out, labels_out, positions)


def hidden_states(model: Any, rows: AlignmentRows, image_tokens: torch.Tensor, prefix: int) -> torch.Tensor:
    """Return (B, L, H) hidden states. Rows are right-padded and attention is causal, so no mask is needed."""
    text = model.model.language_model
    embeds = text.embed_tokens(rows.ids)
    embeds = torch.cat([embeds[:, :prefix], image_tokens.to(embeds.dtype), embeds[:, prefix + IMAGE_TOKENS :]], 1)
    return text(inputs_embeds=embeds, position_ids=rows.positions, use_cache=False).last_hidden_state


@torch.no_grad()
def measured_srcc(model: Any, writer: Writer, crops: CropSet, tokens: torch.Tensor) -> tuple[float, float]:
    """Return the SRCC of the score decoded greedily (two digits), and of the mean of its digit distribution."""
    request = measure_request(SCORE_NAME[crops.task])
    start = [*writer.prompt(request), *writer._encode(f"{SCORE_NAME[crops.task]}=")]
    digits = torch.tensor([writer._encode(str(d))[0] for d in range(10)])
    greedy, mean = [], []
    for i in range(0, len(crops), 128):
        t = tokens[i : i + 128]
        ids = torch.tensor([start] * len(t))
        value, expected = torch.zeros(len(t)), torch.zeros(len(t))
        for weight in (10, 1):
            positions = row_positions(len(writer.prefix), ids.shape[1])[:, None].expand(-1, len(t), -1)
            h = hidden_states(model, AlignmentRows(ids, ids, positions), t, len(writer.prefix))[:, -1]
            p = model.lm_head(h)[:, digits].float().softmax(-1)
            best = p.argmax(-1)
            value += weight * best
            expected += weight * (p * torch.arange(10)).sum(-1)
            ids = torch.cat([ids, digits[best][:, None]], 1)
        greedy.append(value)
        mean.append(expected)
    return tuple(float(spearmanr(torch.cat(x).numpy(), crops.score).statistic) for x in (greedy, mean))  # type: ignore[return-value]


@dataclass(frozen=True)
class AlignRun:
    """Steps, seconds, and by step the validation SRCC of the greedily decoded score, per task."""

    steps: int
    seconds: float
    history: tuple[tuple[int, dict[Task, float]], ...]


def train_align(
    model: Any,
    tokenizer: Any,
    train: dict[Task, CropSet],
    validation: dict[Task, CropSet],
    *,
    minutes: float,
    steps: int | None = None,
    batch: int = 32,
    lr: float = 3e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> AlignRun:
    """Train embeddings, language model and lm_head in place; the tower is frozen and its features are computed once.

    Each crop is seen under one fixed symmetry of the square. A batch has a single task, so rows are of similar length.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2])
    visual, writer = model.model.visual, Writer(tokenizer)
    held = {t: features(visual, s.pixels) for t, s in validation.items()}
    seen: dict[Task, torch.Tensor] = {}
    for t, s in train.items():
        eighth = -(-len(s) // 8)
        spans = [features(visual, s.pixels[k * eighth : (k + 1) * eighth], symmetry=k).half() for k in range(8)]
        seen[t] = torch.cat(spans)
    params = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimiser = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay, foreach=True)
    history: list[tuple[int, dict[Task, float]]] = []
    begun, step, running, done = time.monotonic(), 0, 0.0, 0.0
    while done < 1:
        task = TASKS[step % 2]
        index = rng.integers(len(train[task]), size=batch)
        # The long aesthetic descriptions cost most of the time: they are asked for half as often.
        share = 0.6 if task == "iqa" else 0.3
        rows = writer.rows([conversation(train[task], int(i), rng, share) for i in index])
        scale = min((step + 1) / 100, 1.0) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        for group in optimiser.param_groups:
            group["lr"] = lr * scale
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = hidden_states(model, rows, seen[task][index].float(), len(writer.prefix))
            target = rows.labels[:, 1:]
            loss = F.cross_entropy(model.lm_head(h[:, :-1][target >= 0]).float(), target[target >= 0], reduction="none")
        loss = _weighted(loss, target[target >= 0], writer)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimiser.step()
        step += 1
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        seconds = time.monotonic() - begun
        done = step / steps if steps else seconds / (60 * minutes)
        if step % 250 == 0 or done >= 1:
            srcc = {t: measured_srcc(model, writer, validation[t], held[t]) for t in validation}
            history.append((step, {t: v[0] for t, v in srcc.items()}))
            figures = ", ".join(f"{t} {v[0]:.3f} (mean of digits {v[1]:.3f})" for t, v in srcc.items())
            say(f"align step {step} ({seconds:.0f} s): loss {running:.3f}, validation SRCC as written: {figures}")
    return AlignRun(step, time.monotonic() - begun, tuple(history))


def _weighted(losses: torch.Tensor, targets: torch.Tensor, writer: Writer) -> torch.Tensor:
    """Mean loss with digits weighted fourfold, since only the image determines them."""
    digits = torch.tensor([writer._encode(str(d))[0] for d in range(10)])
    weight = 1 + 3 * torch.isin(targets, digits).float()
    return (losses * weight).sum() / weight.sum()
