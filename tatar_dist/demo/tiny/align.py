"""Stage 2 of pretraining: train the language model to read the (frozen) image tokens.

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

import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tatar_dist.demo.tiny.crops import MEASURES, CropSet
from tatar_dist.demo.tiny.tower import StageResult, features, timed_steps, update
from tatar_dist.evaluate.metrics import srcc
from tatar_dist.types import TASKS, Task

SCORE_NAME: dict[Task, str] = {"iqa": "quality", "iaa": "beauty"}
# Share of rows with a description. The long aesthetic ones cost most of the time.
DESCRIBE_SHARE: dict[Task, float] = {"iqa": 0.6, "iaa": 0.3}
DESCRIBE = "Describe the image."
MEASURE_ALL = "List the measurements."
BATCH = 32
IMAGE_TOKENS = 16
GRID = torch.tensor([[1, 8, 8]])  # patches of an image in time, height and width
_REPLY = "<|im_end|>\n<|im_start|>assistant\n"


def measure_request(name: str) -> str:
    return f"Measure {name.replace('_', ' ')}."


def written(name: str, value: float) -> str:
    """Format a value in [0, 1] as two digits that follow the sign without a blank: `noise=07`."""
    return f"{name.replace('_', ' ')}={min(99, max(0, round(100 * float(value)))):02d}"


def conversation(crops: CropSet, i: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Return a training row's (request, reply) turns in random order, always with the score."""
    score = (SCORE_NAME[crops.task], crops.score[i])
    measured = list(zip(MEASURES[crops.task], crops.measures[i], strict=True))
    some = [measured[k] for k in rng.permutation(len(measured))[:2]]
    turns = [(measure_request(name), written(name, value)) for name, value in (score, *some)]
    if rng.random() < DESCRIBE_SHARE[crops.task]:
        turns.append((DESCRIBE, crops.rationales[i]))
    if rng.random() < 0.15:
        turns.append((MEASURE_ALL, " ".join(written(name, value) for name, value in (*measured, score))))
    return [turns[k] for k in rng.permutation(len(turns))]


class Writer:
    """Tokenise conversations about one image. `digits` (10,): token ids."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.digits = torch.tensor([self.encode(str(d))[0] for d in range(10)])

    def encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, request: str) -> list[int]:
        """Return the token ids of a conversation up to the reply to its first request."""
        image = f"<|vision_start|>{'<|image_pad|>' * IMAGE_TOKENS}<|vision_end|>"
        return self.encode(f"<|im_start|>user\n{image}{request}{_REPLY}")

    def rows(self, conversations: list[list[tuple[str, str]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return padded (ids, labels), both (B, L) int64; labels are -100 where no loss applies."""
        ids, labels = [], []
        for turns in conversations:
            row: list[int] = []
            target: list[int] = []
            for request, reply in turns:
                asked = self.encode(f"\n<|im_start|>user\n{request}{_REPLY}") if row else self.prompt(request)
                answer = self.encode(f"{reply}<|im_end|>")
                row += [*asked, *answer]
                target += [*[-100] * len(asked), *answer]
            ids.append(torch.tensor(row))
            labels.append(torch.tensor(target))
        return pad_sequence(ids, True), pad_sequence(labels, True, padding_value=-100)


def hidden_states(model: Any, ids: torch.Tensor, image_tokens: torch.Tensor) -> torch.Tensor:
    """Return (B, L, H) hidden states of token rows (B, L) with image tokens (B, 16, H).

    The image is at the same place in all rows. Rows are right-padded and attention is causal: no mask is needed.
    """
    types = (ids[:1] == model.config.image_token_id).int()
    positions, _ = model.model.get_rope_index(ids[:1], types, image_grid_thw=GRID)
    return model.model(
        input_ids=ids,
        position_ids=positions.expand(-1, len(ids), -1),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=tuple(image_tokens))},
        use_cache=False,
    ).last_hidden_state


@torch.no_grad()
def written_srcc(model: Any, writer: Writer, crops: CropSet) -> float:
    """Return the SRCC of the score as the model writes it on request, decoded greedily."""
    name = SCORE_NAME[crops.task]
    start = torch.tensor([*writer.prompt(measure_request(name)), *writer.encode(f"{name}=")])
    values = []
    for tokens in features(model.model.visual, crops.pixels).split(128):
        ids, value = start.expand(len(tokens), -1), torch.zeros(len(tokens))
        for _ in range(2):
            logits = model.lm_head(hidden_states(model, ids, tokens)[:, -1])
            digit = logits[:, writer.digits].argmax(-1)
            ids, value = torch.cat([ids, writer.digits[digit][:, None]], 1), 10 * value + digit
        values.append(value)
    return srcc(crops.score, torch.cat(values).numpy())


def train_align(
    model: Any, tokenizer: Any, train: dict[Task, CropSet], validation: dict[Task, CropSet], minutes: float, seed: int
) -> StageResult:
    """Train embeddings, language model and lm_head in place; the frozen tower runs once a crop.

    Each crop is seen under one fixed symmetry of the square. A batch has a single task, so rows are of similar length.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 2])
    visual, writer = model.model.visual, Writer(tokenizer)
    tokens: dict[Task, torch.Tensor] = {}
    for task, crops in train.items():
        eighths = np.array_split(crops.pixels, 8)
        tokens[task] = torch.cat([features(visual, part, symmetry=k).half() for k, part in enumerate(eighths)])
    params = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimiser = torch.optim.AdamW(params, betas=(0.9, 0.98), weight_decay=0.05, foreach=True)
    begun, step = time.monotonic(), 0
    for step in timed_steps(optimiser, 3e-3, minutes):
        task = TASKS[step % 2]
        index = rng.integers(len(train[task]), size=BATCH)
        ids, labels = writer.rows([conversation(train[task], int(i), rng) for i in index])
        target = labels[:, 1:]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = hidden_states(model, ids, tokens[task][index].float())
            logits = model.lm_head(hidden[:, :-1][target >= 0]).float()
        losses = F.cross_entropy(logits, target[target >= 0], reduction="none")
        # Digits weigh fourfold, since only the image determines them.
        weight = 1 + 3 * torch.isin(target[target >= 0], writer.digits).float()
        loss = (losses * weight).sum() / weight.sum()
        update(optimiser, loss)
        if step % 100 == 0:
            print(f"align step {step}: loss {loss.item():.3f}", flush=True)
    seconds = time.monotonic() - begun
    return StageResult(step + 1, seconds, {t: written_srcc(model, writer, crops) for t, crops in validation.items()})
