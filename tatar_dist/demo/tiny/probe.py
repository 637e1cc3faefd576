"""Regression head on a frozen vision tower: the SRCC it gives without a language model.

Per task, the features are mean and standard deviation of the 16 image tokens. An ensemble of small MLPs is trained on
the train manifest, with weight decay selected on validation. It is the baseline for SFT's held-out SRCC.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from tatar_dist.data.images import decode_image
from tatar_dist.demo.tiny.tower import features
from tatar_dist.evaluate.metrics import srcc
from tatar_dist.types import SPLITS, TASKS

DECAYS = (1e-3, 1e-2, 1e-1, 1.0)
EPOCHS = 40


@torch.no_grad()
def load_split(visual: Any, path: Path) -> tuple[torch.Tensor, np.ndarray]:
    """Return float32 features (n, 2 * hidden) and scores 0-100 (n,) of a demo manifest's crops."""
    table = pq.read_table(path, columns=["sample_id", "image_bytes", "score"])
    pixels = [np.asarray(decode_image(r["image_bytes"], r["sample_id"])) for r in table.to_pylist()]
    tokens = features(visual, np.stack(pixels))
    return torch.cat([tokens.mean(1), tokens.std(1)], 1), table["score"].to_numpy().astype(np.float32)


def fit_head(x: torch.Tensor, y: torch.Tensor, decay: float, seed: int) -> nn.Module:
    """Fit a two-layer head (hidden size 64) from standardised features to a score in [0, 1]."""
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Linear(x.shape[1], 64), nn.GELU(), nn.Linear(64, 1))
    optimiser = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(x)).split(64):
            loss = F.mse_loss(head(x[index])[:, 0], y[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    return head.eval()


def regression_head(model: str, data: Path) -> dict[str, float]:
    """Return the test SRCC of a regression head by task.

    Args:
        model: model directory.
        data: directory of the demo's manifests, {iqa,iaa}_{train,validation,test}.parquet.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    visual = Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval().model.visual
    test_srcc: dict[str, float] = {}
    for task in TASKS:
        splits = {s: load_split(visual, data / f"{task}_{s}.parquet") for s in SPLITS}
        mean, spread = splits["train"][0].mean(0), splits["train"][0].std(0) + 1e-6
        x = {s: (v - mean) / spread for s, (v, _) in splits.items()}
        target = torch.from_numpy(splits["train"][1]) / 100
        best = -np.inf
        for decay in DECAYS:
            heads = [fit_head(x["train"], target, decay, seed=k) for k in range(3)]
            with torch.no_grad():
                predicted = {s: torch.stack([h(x[s])[:, 0] for h in heads]).mean(0).numpy() for s in SPLITS[1:]}
            validation, test = (srcc(splits[s][1], predicted[s]) for s in SPLITS[1:])
            if validation > best:
                best, test_srcc[task] = validation, test
    return test_srcc
