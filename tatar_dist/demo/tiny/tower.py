"""Stage 1 of pretraining: train the vision tower and its merger to measure, by pooled linear heads.

Trains the tower of a randomly initialised Qwen2.5-VL on crops (crops.py) and reports SRCC on the validation
photographs. The heads are discarded: as they are linear on the mean image token, measurements stay readable for the
language model.

`tower_tokens` is the tower's forward for square 112-pixel images in one batch. Hugging Face's version loops over images
in Python; a test checks that both give equal results.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from tatar_dist.demo.tiny.crops import CropSet, measure_names
from tatar_dist.types import TASKS, Task

# OpenAI CLIP's channel statistics, which the Qwen2-VL image processor normalises with.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
GRID, PATCH = 8, 14


def patchify(pixels: torch.Tensor) -> torch.Tensor:
    """Map (B, 112, 112, 3) uint8 to the processor's `pixel_values` (B, 64, 3, 196) float32, one of two equal frames."""
    x = pixels.reshape(len(pixels), GRID // 2, 2, PATCH, GRID // 2, 2, PATCH, 3)
    # (merged row, merged column, row and column in the 2x2 merge, channel, y, x)
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(len(pixels), GRID * GRID, 3, PATCH * PATCH)
    return x.float().mul_((1 / (255 * STD))[:, None]).sub_((MEAN / STD)[:, None])


def _rotary(visual: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin (64, head_dim) of the grid positions, in merge-block order."""
    rows = torch.arange(GRID).view(GRID // 2, 1, 2, 1).expand(-1, GRID // 2, -1, 2).reshape(-1)
    cols = torch.arange(GRID).view(1, GRID // 2, 1, 2).expand(GRID // 2, -1, 2, -1).reshape(-1)
    cos, sin = visual.rotary_pos_emb(visual.patch_embed.proj.weight, torch.stack([rows, cols], dim=1))
    return cos, sin


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def tower_tokens(visual: Any, patches: torch.Tensor, drop_path: float = 0.0) -> torch.Tensor:
    """Map (B, 64, 3, 196) patches to (B, 16, text hidden), the model's image features for 112x112 images.

    `drop_path` in [0, 1): share of images that skip a residual branch (stochastic depth, Huang et al., ECCV 2016).
    """
    weight = visual.patch_embed.proj.weight
    # A still image fills both frames of a temporal patch, so the two halves of the kernel add up.
    x = F.linear(patches.flatten(2), weight.sum(2).flatten(1))
    cos, sin = (t.to(x.dtype) for t in _rotary(visual))

    def branch(y: torch.Tensor) -> torch.Tensor:
        if not drop_path:
            return y
        keep = (torch.rand(len(y), 1, 1) >= drop_path).to(y.dtype)
        return y * keep / (1 - drop_path)

    for block in visual.blocks:
        heads = block.attn.num_heads
        b, n, _ = x.shape
        q, k, v = block.attn.qkv(block.norm1(x)).view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        # Spelt out: the CPU kernel of scaled_dot_product_attention spends a third of the step in its backward.
        mixing = (_rotate(q, cos, sin) * block.attn.scaling) @ _rotate(k, cos, sin).transpose(-1, -2)
        y = mixing.softmax(-1).to(v.dtype) @ v
        x = x + branch(block.attn.proj(y.transpose(1, 2).reshape(b, n, -1)))
        x = x + branch(block.mlp(block.norm2(x)))
    return visual.merger(x).view(len(x), GRID * GRID // 4, -1)


def dct_filters(width: int) -> torch.Tensor:
    """Return (width, 3, 14, 14) orthonormal 2-D DCT-II filters: three quarters on luma, the rest on two colour axes.

    Luma has all of the lowest frequencies and a sample of higher ones, which show noise and blur, up to the top.
    """
    n = torch.arange(PATCH, dtype=torch.float32)
    basis = torch.cos(math.pi * (n[None] + 0.5) * n[:, None] / PATCH) * math.sqrt(2 / PATCH)
    basis[0] /= math.sqrt(2)
    order = sorted(((u, v) for u in range(PATCH) for v in range(PATCH)), key=lambda f: (math.hypot(*f), f))
    n_chroma = width // 8
    n_luma = width - 2 * n_chroma
    low, rest = order[: n_luma // 2], order[n_luma // 2 :]
    count = n_luma - len(low)
    high = [rest[round(i * (len(rest) - 1) / max(count - 1, 1))] for i in range(count)]
    axes = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]])
    axes = axes / axes.norm(dim=1, keepdim=True)
    plan = [(0, f) for f in low + high] + [(a, f) for a in (1, 2) for f in order[:n_chroma]]
    return torch.stack([axes[a][:, None, None] * torch.outer(basis[u], basis[v]) for a, (u, v) in plan])


@torch.no_grad()
def dct_init(visual: Any, pixels: torch.Tensor) -> None:
    """Initialise the patch embedding with DCT filters, scaled to equal typical responses on `pixels`, and the branches.

    Without the scaling, a patch's mean masks the fine detail that blur, noise and compression affect. Every other
    matrix has standard deviation 1/sqrt(inputs): the large models' 0.02 leaves a narrow tower's branches close to zero.
    The first MLP starts as an energy detector: unit pairs (j, -j) give silu(2c)c + silu(-2c)(-c), which is about 2c²
    once |c| > 1. Distortions show in energies, which a linear embedding lacks.
    """
    weight = visual.patch_embed.proj.weight
    filters = dct_filters(weight.shape[0])
    response = (patchify(pixels).flatten(2) @ filters.flatten(1).T).flatten(0, 1)
    typical = (response.abs() + 1e-3).log().mean(0).exp() * 2  # a geometric mean: noisy crops would own any other
    # Both frames of a temporal patch hold the same image: half the weight each.
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
    """Linear heads on the mean image token: per task a score and its measures; for IQA also which families occur."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.score = nn.ModuleDict({t: nn.Linear(width, 1) for t in TASKS})
        self.measures = nn.ModuleDict({t: nn.Linear(width, len(measure_names(t))) for t in TASKS})
        self.present = nn.Linear(width, len(measure_names("iqa")))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(tokens.mean(1))


def dihedral(pixels: torch.Tensor, k: int) -> torch.Tensor:
    """Apply symmetry `k` of the 8 of the square to (B, H, W, C); it changes no target."""
    if k & 1:
        pixels = pixels.flip(1)
    if k & 2:
        pixels = pixels.flip(2)
    return pixels.transpose(1, 2) if k & 4 else pixels


def batches(sets: dict[Task, CropSet], size: int, rng: np.random.Generator) -> Iterator[dict[Task, np.ndarray]]:
    """Yield index batches without end, half of each task, each crop at most once per pass."""
    orders: dict[Task, np.ndarray] = {t: rng.permutation(len(s)) for t, s in sets.items()}
    at = dict.fromkeys(sets, 0)
    half = size // 2
    while True:
        batch = {}
        for t in sets:
            if at[t] + half > len(orders[t]):
                orders[t], at[t] = rng.permutation(len(sets[t])), 0
            batch[t] = np.sort(orders[t][at[t] : at[t] + half])
            at[t] += half
        yield batch


def _loss(
    heads: Heads, pooled: torch.Tensor, crops: CropSet, index: np.ndarray, spread: dict[Task, Any]
) -> torch.Tensor:
    task = crops.task
    score = torch.from_numpy(crops.score[index])
    measures = torch.from_numpy(crops.measures[index])
    loss = 2 * F.smooth_l1_loss((heads.score[task](pooled)[:, 0] - score) / 0.27, torch.zeros_like(score), beta=0.5)
    error = (heads.measures[task](pooled) - measures) / spread[task]
    loss = loss + F.smooth_l1_loss(error, torch.zeros_like(error), beta=0.5)
    if task == "iqa":
        present = (measures > 0.04).float()
        loss = loss + F.binary_cross_entropy_with_logits(heads.present(pooled), present) * 2
    return loss


@torch.no_grad()
def features(visual: Any, pixels: np.ndarray, batch: int = 128, symmetry: int = 0) -> torch.Tensor:
    """Compute image tokens (n, 16, hidden) float32 of (n, 112, 112, 3) uint8 crops."""
    out = []
    for i in range(0, len(pixels), batch):
        x = dihedral(torch.from_numpy(np.array(pixels[i : i + batch])), symmetry)
        out.append(tower_tokens(visual, patchify(x)))
    return torch.cat(out)


@torch.no_grad()
def validation_srcc(visual: Any, heads: Heads, sets: dict[Task, CropSet]) -> dict[Task, float]:
    """Spearman correlation of the linear head's scores on (validation) crops, per task."""
    return {
        t: float(spearmanr(heads.score[t](heads(features(visual, s.pixels)))[:, 0].numpy(), s.score).statistic)
        for t, s in sets.items()
    }


@dataclass(frozen=True)
class TowerRun:
    """Result of a tower run: steps, seconds, and the validation SRCC of the averaged weights by step."""

    steps: int
    seconds: float
    history: tuple[tuple[int, dict[Task, float]], ...]


def train_tower(
    model: Any,
    train: dict[Task, CropSet],
    validation: dict[Task, CropSet],
    *,
    minutes: float,
    steps: int | None = None,
    batch: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    drop_path: float = 0.05,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> TowerRun:
    """Train `model.model.visual` in place; it ends with the exponential moving average of its weights.

    The cosine schedule runs over `steps`, or over `minutes`, in which case the result depends on the machine's speed.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    visual = model.model.visual
    first = [train[t].pixels[: min(len(train[t]), 256)] for t in train]
    dct_init(visual, torch.from_numpy(np.concatenate(first)))
    heads = Heads(visual.config.out_hidden_size)
    spread = {t: torch.from_numpy(s.measures.std(0) + 1e-3) for t, s in train.items()}
    both = nn.ModuleList([visual, heads])
    decayed = [p for p in both.parameters() if p.dim() > 1]
    plain = [p for p in both.parameters() if p.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.98), foreach=True,
    )  # fmt: skip
    params = list(both.parameters())
    average = [p.detach().clone() for p in params]
    history: list[tuple[int, dict[Task, float]]] = []
    parts: dict[Task, float] = {}
    begun = time.monotonic()
    source, step, running, done = batches(train, batch, rng), 0, 0.0, 0.0
    while done < 1:
        index = next(source)
        pixels = torch.from_numpy(np.concatenate([train[t].pixels[i] for t, i in index.items()]))
        pixels = dihedral(pixels, int(rng.integers(8)))
        scale = min((step + 1) / 100, 1.0) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        for group in optimiser.param_groups:
            group["lr"] = lr * scale
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = tower_tokens(visual, patchify(pixels), drop_path)
        pooled = heads(tokens.float())
        at, loss = 0, torch.zeros(())
        for t, i in index.items():
            part = _loss(heads, pooled[at : at + len(i)], train[t], i, spread)
            loss, parts[t], at = loss + part, 0.98 * parts.get(t, part.item()) + 0.02 * part.item(), at + len(i)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
        optimiser.step()
        keep = min(0.998, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in params], 1 - keep)
        step += 1
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        seconds = time.monotonic() - begun
        done = step / steps if steps else seconds / (60 * minutes)
        if step % 250 == 0 or done >= 1:
            live = [p.detach().clone() for p in params]
            _assign(params, average)
            srcc = validation_srcc(visual, heads, validation)
            history.append((step, srcc))
            if done < 1:
                _assign(params, live)
            figures = ", ".join(f"{t} {v:.3f}" for t, v in srcc.items())
            figures += ", last losses " + ", ".join(f"{t} {v:.2f}" for t, v in parts.items())
            say(f"tower step {step} ({seconds:.0f} s): loss {running:.3f}, validation SRCC {figures}")
    return TowerRun(step, time.monotonic() - begun, tuple(history))


@torch.no_grad()
def _assign(params: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for p, v in zip(params, values, strict=True):
        p.copy_(v)
