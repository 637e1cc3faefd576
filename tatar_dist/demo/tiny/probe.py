"""Regression head on a frozen vision tower: the SRCC that the tower gives without a language model.

    python -m tatar_dist.demo.tiny.probe --model DIR --data data/demo [--json]

Takes a model directory (112x112 images) and the demo's manifests. Per task, the features are mean and standard
deviation of the 16 image tokens. An ensemble of small MLPs is trained on the train manifest, with weight decay selected
on validation; SRCC is reported on validation and test. It is the baseline for SFT's held-out SRCC.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from tatar_dist.demo.tiny.tower import features
from tatar_dist.evaluate.metrics import srcc
from tatar_dist.types import SPLITS, TASKS

DECAYS = (1e-3, 1e-2, 1e-1, 1.0)


def load_split(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Load (n, 112, 112, 3) uint8 pixels and (n,) float32 scores 0-100 of a demo manifest."""
    table = pq.read_table(path, columns=["image_bytes", "score"])
    pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in table["image_bytes"].to_pylist()]
    return np.stack(pixels), table["score"].to_numpy().astype(np.float32)


def pooled(visual: Any, pixels: np.ndarray) -> torch.Tensor:
    """Return (n, 2 * hidden) float32: mean and standard deviation over the image tokens."""
    tokens = features(visual, pixels)
    return torch.cat([tokens.mean(1), tokens.std(1)], 1)


def fit_head(x: torch.Tensor, y: torch.Tensor, decay: float, seed: int, epochs: int = 40) -> nn.Module:
    """Fit a two-layer head (hidden size 64) from standardised features to a score in [0, 1]."""
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Linear(x.shape[1], 64), nn.GELU(), nn.Linear(64, 1))
    optimiser = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            loss = F.mse_loss(head(x[index])[:, 0], y[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    return head.eval()


def probe(model: Any, data: Path) -> dict[str, dict[str, float]]:
    """Return {task: {"validation": SRCC, "test": SRCC, "decay": selected, "n_test"}} of a loaded model."""
    figures: dict[str, dict[str, float]] = {}
    for task in TASKS:
        x, y = {}, {}
        for split in SPLITS:
            pixels, scores = load_split(data / f"{task}_{split}.parquet")
            x[split], y[split] = pooled(model.model.visual, pixels), scores
        mean, spread = x["train"].mean(0), x["train"].std(0) + 1e-6
        x = {s: (v - mean) / spread for s, v in x.items()}
        target = torch.from_numpy(y["train"]) / 100
        best: dict[str, float] = {}
        for decay in DECAYS:
            heads = [fit_head(x["train"], target, decay, seed=k) for k in range(3)]
            with torch.no_grad():
                predicted = {s: torch.stack([h(x[s])[:, 0] for h in heads]).mean(0).numpy() for s in SPLITS[1:]}
            result = {s: srcc(y[s], p) for s, p in predicted.items()}
            if not best or result["validation"] > best["validation"]:
                best = {**result, "decay": decay, "n_test": len(y["test"])}
        figures[task] = best
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="SRCC of a regression head on the frozen tower, per task.")
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument(
        "--data", type=Path, default="data/demo", help="directory with {iqa,iaa}_{train,validation,test}.parquet"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    figures = probe(model, args.data)
    if args.json:
        print(json.dumps(figures))
        return
    for task, f in figures.items():
        print(f"{task}: SRCC validation {f['validation']:.3f}, test {f['test']:.3f} (n {f['n_test']})")


if __name__ == "__main__":
    main()
