"""Stage 1 of pretraining: train the vision tower and its merger to measure, by linear heads.

Trains the tower of a randomly initialised Qwen2.5-VL on crops (crops.py) and reports SRCC on the validation
photographs. The heads are discarded: as they are linear on the mean image token, measurements stay readable for the
language model.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.fft import dct
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from tatar_dist.demo.tiny.build import image_processor
from tatar_dist.demo.tiny.crops import MEASURES, CropSet
from tatar_dist.evaluate.metrics import srcc
from tatar_dist.types import TASKS, Task

PATCH = 14
BATCH = 32  # crops per task in a step
PROCESSOR = image_processor()


def image_tokens(visual: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Map (B, 112, 112, 3) uint8 crops to (B, 16, text hidden), the model's image features."""
    inputs = PROCESSOR(images=list(pixels.permute(0, 3, 1, 2)), return_tensors="pt")
    tokens = visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    return tokens.view(len(pixels), -1, tokens.shape[-1])


def dct_filters(width: int) -> torch.Tensor:
    """Return (width, 3, 14, 14) orthonormal DCT-II filters: 3/4 on luma, 1/4 on two colour axes.

    Luma has all of the lowest frequencies and a sample of higher ones, which show noise and blur, up to the top.
    """
    basis = torch.from_numpy(dct(np.eye(PATCH, dtype=np.float32), norm="ortho", axis=0))
    order = sorted(((u, v) for u in range(PATCH) for v in range(PATCH)), key=lambda f: (math.hypot(*f), f))
    n_chroma = width // 8
    n_luma = width - 2 * n_chroma
    low, rest = order[: n_luma // 2], order[n_luma // 2 :]
    high = [rest[i] for i in np.linspace(0, len(rest) - 1, n_luma - len(low)).round().astype(int)]
    axes = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]])
    axes = axes / axes.norm(dim=1, keepdim=True)
    plan = [(0, f) for f in low + high] + [(a, f) for a in (1, 2) for f in order[:n_chroma]]
    return torch.stack([axes[a][:, None, None] * torch.outer(basis[u], basis[v]) for a, (u, v) in plan])


@torch.no_grad()
def dct_init(visual: Any, pixels: torch.Tensor) -> None:
    """Initialise branches; embed patches by DCT filters of equal typical response on `pixels`.

    Without the scaling, a patch's mean masks the fine detail that blur, noise and compression affect. Every other
    matrix has standard deviation 1/sqrt(inputs): the large models' 0.02 leaves a narrow tower's branches close to zero.
    The first MLP starts as an energy detector: unit pairs (j, -j) give silu(2c)c + silu(-2c)(-c), which is about 2c²
    once |c| > 1. Distortions show in energies, which a linear embedding lacks.
    """
    weight = visual.patch_embed.proj.weight
    filters = dct_filters(weight.shape[0])
    patches = PROCESSOR(images=list(pixels.permute(0, 3, 1, 2)), return_tensors="pt")["pixel_values"]
    # (patches, channel, frame, y, x): both frames of a temporal patch hold the same image
    response = patches.view(-1, 3, 2, PATCH * PATCH)[:, :, 0].flatten(1) @ filters.flatten(1).T
    typical = (response.abs() + 1e-3).log().mean(0).exp() * 2  # a geometric mean: noisy crops would own any other
    weight.copy_((filters / typical[:, None, None, None])[:, :, None].expand_as(weight) / 2)
    shrink = (2 * len(visual.blocks)) ** -0.5
    for name, p in visual.named_parameters():
        if p.dim() == 2:
            out = name.endswith(("attn.proj.weight", "down_proj.weight"))
            nn.init.normal_(p, std=p.shape[1] ** -0.5 * (shrink if out else 1.0))
    mlp, width = visual.blocks[0].mlp, weight.shape[0]
    n = min(width, mlp.gate_proj.weight.shape[0] // 2)
    for sign, rows in ((1.0, slice(0, n)), (-1.0, slice(n, 2 * n))):
        eye = sign * torch.eye(width)[:n]
        mlp.gate_proj.weight[rows] = 2 * eye + 0.02 * torch.randn(n, width)
        mlp.up_proj.weight[rows] = eye + 0.02 * torch.randn(n, width)
    mlp.down_proj.weight[:, n : 2 * n] = mlp.down_proj.weight[:, :n]


class Heads(nn.Module):
    """Linear heads on the mean image token: score, measures per task; families present in IQA."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.score = nn.ModuleDict({t: nn.Linear(width, 1) for t in TASKS})
        self.measures = nn.ModuleDict({t: nn.Linear(width, len(MEASURES[t])) for t in TASKS})
        self.present = nn.Linear(width, len(MEASURES["iqa"]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(tokens.mean(1))

    def loss(self, pooled: torch.Tensor, crops: CropSet, index: np.ndarray) -> torch.Tensor:
        """Return the loss of a task's scores and measures, errors relative to their typical spread."""
        score, measures = torch.from_numpy(crops.score[index]), torch.from_numpy(crops.measures[index])
        spread = torch.from_numpy(crops.measures.std(0) + 1e-3)
        predicted = self.score[crops.task](pooled)[:, 0]
        loss = 2 * F.smooth_l1_loss(predicted / 0.27, score / 0.27, beta=0.5)
        loss = loss + F.smooth_l1_loss(self.measures[crops.task](pooled) / spread, measures / spread, beta=0.5)
        if crops.task == "iqa":
            present = (measures > 0.04).float()
            loss = loss + 2 * F.binary_cross_entropy_with_logits(self.present(pooled), present)
        return loss


def dihedral(pixels: torch.Tensor, k: int) -> torch.Tensor:
    """Apply symmetry `k` of the 8 of the square to (B, H, W, C); it changes no target."""
    turned = pixels.rot90(k, (1, 2))
    return turned.flip(1) if k & 4 else turned


@torch.no_grad()
def features(visual: Any, pixels: np.ndarray, symmetry: int = 0) -> torch.Tensor:
    """Compute image tokens (n, 16, hidden) float32 of (n, 112, 112, 3) uint8 crops."""
    return torch.cat([image_tokens(visual, dihedral(x, symmetry)) for x in torch.from_numpy(pixels).split(128)])


@dataclass(frozen=True)
class StageResult:
    """Result of a pretraining stage: steps, seconds, SRCC of the scores on validation crops."""

    steps: int
    seconds: float
    srcc: dict[Task, float]


def timed_steps(optimiser: torch.optim.Optimizer, lr: float, minutes: float) -> Iterator[int]:
    """Yield steps for `minutes`, setting the learning rate: 100 steps of warm-up, then cosine."""
    begun = time.monotonic()
    for step in itertools.count():
        done = (time.monotonic() - begun) / (60 * minutes)
        if done >= 1:
            return
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2
        for group in optimiser.param_groups:
            group["lr"] = lr * min((step + 1) / 100, 1.0) * cosine
        yield step


def update(optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """Take one optimiser step with gradients clipped to norm 1."""
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0, foreach=True)
    optimiser.step()


def _moving_average(average: torch.Tensor, value: torch.Tensor, n: torch.Tensor | int) -> torch.Tensor:
    """Compute an exponential moving average of decay 0.998 that forgets faster in first steps."""
    return average.lerp(value, 1 - min(0.998, (1 + int(n)) / (10 + int(n))))


def train_tower(
    model: Any, train: dict[Task, CropSet], validation: dict[Task, CropSet], minutes: float, seed: int
) -> StageResult:
    """Train `model.model.visual` in place; its final weights are an exponential moving average."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    visual = model.model.visual
    dct_init(visual, torch.from_numpy(np.concatenate([crops.pixels[:256] for crops in train.values()])))
    heads = Heads(visual.config.out_hidden_size)
    trained = nn.ModuleList([visual, heads])
    average = AveragedModel(trained, avg_fn=_moving_average)
    matrices = [p for p in trained.parameters() if p.dim() > 1]
    vectors = [p for p in trained.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), foreach=True)
    begun, step = time.monotonic(), 0
    for step in timed_steps(optimiser, 2e-3, minutes):
        index = {t: rng.integers(len(crops), size=BATCH) for t, crops in train.items()}
        pixels = torch.from_numpy(np.concatenate([train[t].pixels[i] for t, i in index.items()]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = image_tokens(visual, dihedral(pixels, int(rng.integers(8))))
        pooled = heads(tokens.float()).split(BATCH)
        losses = [heads.loss(p, train[t], i) for p, (t, i) in zip(pooled, index.items(), strict=True)]
        update(optimiser, torch.stack(losses).sum())
        average.update_parameters(trained)
        if step % 100 == 0:
            print(f"tower step {step}: loss {sum(losses).item():.3f}", flush=True)
    trained.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        scores = {t: heads.score[t](heads(features(visual, s.pixels)))[:, 0].numpy() for t, s in validation.items()}
    return StageResult(step + 1, time.monotonic() - begun, {t: srcc(validation[t].score, scores[t]) for t in scores})
