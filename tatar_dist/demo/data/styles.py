"""Rewrite the demo's rationales in the other task's style for the controlled probes: slow for IQA, fast for IAA.

Reads the demo's training manifests and writes `iqa_train_slow.parquet` and `iaa_train_fast.parquet` beside them, with
rationales generated from the distortions or measurements in each row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tatar_dist.data.writing import write_manifest
from tatar_dist.demo.data.distortions import Distortion
from tatar_dist.demo.data.photos import PHOTOS
from tatar_dist.demo.data.texts import iaa_fast_rationale, iqa_slow_rationale

OTHER = {"iqa": "slow", "iaa": "fast"}


def restyle(data: Path) -> None:
    """Write the two training manifests in the other style to `data`, unless they exist."""
    for task, style in OTHER.items():
        target = data / f"{task}_train_{style}.parquet"
        if not target.exists():
            write_manifest(target, _rows(data / f"{task}_train.parquet"))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    category = {p.name: p.category for p in PHOTOS}
    with pq.ParquetFile(file) as manifest:
        number = 0
        for batch in manifest.iter_batches(256):
            for row in batch.to_pylist():
                meta, rng = json.loads(row["meta"]), np.random.default_rng(number)
                scene, score = category[meta["photo"]], row["score"]
                if row["task"] == "iqa":
                    drawn = tuple(Distortion(d["family"], d["strength"]) for d in meta["distortions"])
                    text = iqa_slow_rationale(drawn, scene, score, rng)
                else:
                    text = iaa_fast_rationale(meta["attributes"], scene, score, rng)
                yield {**row, "rationale": text}
                number += 1
