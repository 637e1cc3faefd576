"""Make the demo set, six manifests: photograph crops, computed targets, grounded rationales.

A seed and sizes give `{iqa,iaa}_{train,validation,test}.parquet`. Distortions and grading are applied to real pixels,
and targets follow published measures and documented formulas. There are no human opinions: figures on this set do not
transfer to KonIQ-10k or AVA. Each sample depends on (seed, split, task, index) alone, so any number of processes gives
the same bytes. The base model's pretraining draws its crops from here too, with other seeds.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from tatar_dist.data.writing import write_manifest
from tatar_dist.demo.data import aesthetics, distortions, texts
from tatar_dist.demo.data.distortions import Distortion
from tatar_dist.demo.data.photos import PHOTOS, Scene, grade, locate, make_scene
from tatar_dist.run.files import write_whole
from tatar_dist.types import SPLITS, TASKS, Task

VERSION = 2  # raise it when the same seed gives other bytes
PASTE_SHARE: dict[Task, float] = {"iqa": 0.15, "iaa": 0.2}  # crops with the subject of another photograph
OTHER_STYLE: dict[Task, str] = {"iqa": "slow", "iaa": "fast"}


@dataclass(frozen=True)
class DemoCrop:
    """Demo sample: `pixels` (112, 112, 3) uint8; `score` 0-100, from the index `raw` in [0, 1]."""

    pixels: np.ndarray
    score: float
    raw: float
    rationale: str
    attributes: dict[str, str]
    meta: dict[str, Any]


def crop_of(task: Task, scene: Scene, rng: np.random.Generator, spread: float = 1.0) -> DemoCrop:
    """Distort (IQA) or grade (IAA) a scene and score it. `spread` scales the grading for IQA."""
    category = scene.photo.category
    meta: dict[str, Any] = {"photo": scene.photo.name, "pasted": scene.pasted}
    if task == "iaa":
        pixels = distortions.to_uint8(aesthetics.vary(scene, rng))
        attributes = aesthetics.measure(pixels, scene.box)
        raw = sum(weight * attributes[name] for name, weight in aesthetics.WEIGHTS.items())
        score = round(aesthetics.aesthetic_score(raw), 2)
        text = texts.iaa_rationale(attributes, category, score, rng)
        meta["attributes"] = {k: round(v, 4) for k, v in attributes.items()}
        return DemoCrop(pixels, score, raw, text, texts.attribute_texts(attributes, score), meta)
    # Mild grading only, so that the distortion dominates what there is to see.
    clean = grade(
        scene.pixels,
        stops=float(rng.normal(0, 0.15 * spread)),
        contrast=float(1 + rng.normal(0, 0.05 * spread)),
        saturation=float(1 + rng.normal(0, 0.10 * spread)),
        tint=(float(rng.normal(0, 0.02 * spread)), 0.0),
        vignette=0.0,
    )
    drawn = distortions.draw_distortions(rng)
    pixels = distortions.distort(clean, drawn, rng)
    quality = distortions.full_reference(distortions.to_uint8(clean), pixels)
    score = round(distortions.quality_score(quality), 2)
    text = texts.iqa_rationale(drawn, category, score, rng)
    meta["distortions"] = [{"family": d.family, "strength": round(d.strength, 4)} for d in drawn]
    return DemoCrop(pixels, score, quality, text, {}, meta)


def make_crop(task: Task, split: str, index: int, seed: int) -> DemoCrop:
    """Return sample `index` of a split, a function of the arguments alone."""
    rng = np.random.default_rng([seed, SPLITS.index(split), TASKS.index(task), index])
    return crop_of(task, make_scene(split, rng, PASTE_SHARE[task]), rng)


def _row(index: int, task: Task, split: str, seed: int) -> dict[str, Any]:
    crop, png = make_crop(task, split, index, seed), io.BytesIO()
    Image.fromarray(crop.pixels).save(png, "PNG", compress_level=1)  # low, for speed
    return {
        "sample_id": f"demo-{task}-{split}-{seed}-{index:06d}",
        "dataset": f"demo-{task}",
        "task": task,
        "image_bytes": png.getvalue(),
        "score": crop.score,
        "score_raw": crop.raw,
        "split": split,
        "rationale": crop.rationale,
        "attributes": crop.attributes or None,
        "meta": crop.meta,
    }


def _end_with_parent() -> None:
    """End this worker when its parent is killed; otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def crop_workers(number: int | None = None) -> ProcessPoolExecutor:
    """Return a pool of processes, one per core by default.

    They are spawned: the caller may hold threads (torch, Ray) that a forked child would inherit dead.
    """
    number = number or len(os.sched_getaffinity(0))
    return ProcessPoolExecutor(number, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def make_demo(
    output: Path, seed: int = 0, train: int = 2000, validation: int = 300, test: int = 1000, workers: int | None = None
) -> dict[str, int]:
    """Write the six manifests to `output` and return their row counts, keyed like "iqa_train".

    Sizes are samples per task. An existing set of the same seed, sizes and version is kept. `workers` processes
    (default: this machine's cores) share the work; their number does not change the bytes.

    Raises:
        UserError: a source photograph is not installed.
    """
    output = Path(output)
    sizes = {"train": train, "validation": validation, "test": test}
    counts = {f"{task}_{split}": n for task in TASKS for split, n in sizes.items()}
    recipe = {"version": VERSION, "seed": seed, "rows": counts}
    stamp = output / "demo.json"
    complete = stamp.is_file() and all((output / f"{name}.parquet").is_file() for name in counts)
    if complete and stamp.read_bytes() == json.dumps(recipe).encode():
        return counts
    for photo in PHOTOS:  # fail before the work, not in the middle of it
        locate(photo)
    output.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)  # files of two recipes may lie together until the end
    with crop_workers(workers) as pool:
        for task in TASKS:
            for split, n in sizes.items():
                rows = pool.map(partial(_row, task=task, split=split, seed=seed), range(n), chunksize=64)
                write_manifest(output / f"{task}_{split}.parquet", rows)
    write_whole(stamp, json.dumps(recipe))
    return counts


def restyle(data: Path) -> None:
    """Write the demo's training rows with rationales of the other style, unless the files exist.

    `iqa_train_slow.parquet` and `iaa_train_fast.parquet`, beside the training manifests.
    """
    category = {p.name: p.category for p in PHOTOS}
    for task, style in OTHER_STYLE.items():
        target = data / f"{task}_train_{style}.parquet"
        if target.exists():
            continue
        rows = pq.read_table(data / f"{task}_train.parquet").to_pylist()
        for number, row in enumerate(rows):
            meta = json.loads(row["meta"])
            facts = (category[meta["photo"]], row["score"], np.random.default_rng(number))
            if task == "iqa":
                drawn = tuple(Distortion(**d) for d in meta["distortions"])
                row["rationale"] = texts.iqa_slow_rationale(drawn, *facts)
            else:
                row["rationale"] = texts.iaa_fast_rationale(meta["attributes"], *facts)
        write_manifest(target, rows)
