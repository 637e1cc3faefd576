"""Make the demo data set: crops of real photographs with computed targets and grounded rationales, as six manifests.

A seed and sizes give `{iqa,iaa}_{train,validation,test}.parquet`. Pixels are real, distortions and grading are applied
to them, and targets follow published measures and documented formulas, so that the whole pipeline can be seen to learn
on a laptop, on photographs unseen in training. There are no human opinions: figures on this set do not transfer to
KonIQ-10k or AVA.

Each sample depends on (seed, split, task, index) alone, so any number of processes gives the same bytes. The base
model's pretraining draws its crops from `make_crop` too, with other seeds.
"""

from __future__ import annotations

import ctypes
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tatar_dist.data.writing import write_manifest
from tatar_dist.demo.data import aesthetics, distortions
from tatar_dist.demo.data import texts as templates
from tatar_dist.demo.data.photos import PHOTOS, locate
from tatar_dist.demo.data.scenes import grade, make_scene
from tatar_dist.run.files import write_whole
from tatar_dist.types import SPLITS, TASKS, Task

VERSION = 2  # raise it when the same seed gives other bytes
DATASETS: dict[Task, str] = {"iqa": "demo-iqa", "iaa": "demo-iaa"}


@dataclass(frozen=True)
class DemoCrop:
    """One demo sample. `pixels` (112, 112, 3) uint8; `score` 0-100; `raw`: the underlying index in [0, 1]."""

    pixels: np.ndarray
    score: float
    raw: float
    rationale: str
    attributes: dict[str, str]
    meta: dict[str, Any]


def _iqa_crop(split: str, rng: np.random.Generator) -> DemoCrop:
    scene = make_scene(split, rng, paste_share=0.15)
    # Mild grading only, so that the distortion dominates what there is to see.
    clean = grade(
        scene.pixels,
        stops=float(rng.normal(0, 0.15)),
        contrast=float(1 + rng.normal(0, 0.05)),
        saturation=float(1 + rng.normal(0, 0.10)),
        tint=(float(rng.normal(0, 0.02)), 0.0),
        vignette=0.0,
    )
    drawn = distortions.draw_distortions(rng)
    pixels = distortions.distort(clean, drawn, rng)
    q = distortions.full_reference(distortions.to_uint8(clean), pixels)
    score = round(distortions.quality_score(q), 2)
    text = templates.iqa_rationale(drawn, scene.photo.category, score, rng)
    measures = [{"family": d.family, "strength": round(d.strength, 4)} for d in drawn]
    meta = {"photo": scene.photo.name, "pasted": scene.pasted, "distortions": measures}
    return DemoCrop(pixels, score, q, text, {}, meta)


def _iaa_crop(split: str, rng: np.random.Generator) -> DemoCrop:
    scene = make_scene(split, rng, paste_share=0.2)
    pixels = distortions.to_uint8(aesthetics.vary(scene, rng))
    attributes = aesthetics.measure(pixels, scene.box)
    raw = aesthetics.raw_score(attributes)
    score = round(aesthetics.aesthetic_score(raw), 2)
    text = templates.iaa_rationale(attributes, scene.photo.category, score, rng)
    meta = {
        "photo": scene.photo.name,
        "pasted": scene.pasted,
        "attributes": {k: round(v, 4) for k, v in attributes.items()},
    }
    return DemoCrop(pixels, score, raw, text, templates.attribute_texts(attributes, score), meta)


def make_crop(task: Task, split: str, index: int, seed: int) -> DemoCrop:
    """Return sample `index` of a split, a function of the arguments alone."""
    rng = np.random.default_rng([seed, SPLITS.index(split), TASKS.index(task), index])
    return _iqa_crop(split, rng) if task == "iqa" else _iaa_crop(split, rng)


def sample_crops(
    task: Task, split: str, n: int, seed: int, start: int = 0
) -> Iterator[tuple[np.ndarray, float, dict[str, Any], str]]:
    """Yield crops `start` ... `start + n - 1` as (pixels (112, 112, 3) uint8, score 0-100, meta, rationale)."""
    for i in range(start, start + n):
        crop = make_crop(task, split, i, seed)
        yield crop.pixels, crop.score, crop.meta, crop.rationale


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode (H, W, 3) uint8 as PNG, at a low compression level for speed."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _rows(span: tuple[Task, str, int, int], seed: int) -> list[dict[str, Any]]:
    task, split, start, stop = span
    rows = []
    for i in range(start, stop):
        crop = make_crop(task, split, i, seed)
        rows.append(
            {
                "sample_id": f"{DATASETS[task]}-{split}-{seed}-{i:06d}",
                "dataset": DATASETS[task],
                "task": task,
                "image_bytes": encode_png(crop.pixels),
                "score": crop.score,
                "score_raw": crop.raw,
                "split": split,
                "rationale": crop.rationale,
                "attributes": crop.attributes or None,
                "meta": crop.meta,
            }
        )
    return rows


def _end_with(parent: int) -> None:
    """Make Linux kill this worker when its parent dies; otherwise it would wait for work for ever."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before this was asked for
        os._exit(1)


def make_demo(
    output: Path,
    seed: int = 0,
    train: int = 2000,
    validation: int = 300,
    test: int = 1000,
    workers: int | None = None,
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
    if stamp.is_file() and all((output / f"{name}.parquet").is_file() for name in counts):
        try:
            if json.loads(stamp.read_text()) == recipe:
                return counts
        except ValueError:
            pass  # a broken stamp proves nothing: make the set again
    for photo in PHOTOS:  # a missing one is better said before the work than in the middle
        locate(photo)
    output.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)  # while files of two recipes may lie together, nothing may say "complete"
    workers = workers or len(os.sched_getaffinity(0))
    # spawn: the caller may hold threads (torch, Ray) that a forked child would inherit dead.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        for task in TASKS:
            for split, n in sizes.items():
                spans = [(task, split, a, min(a + 64, n)) for a in range(0, n, 64)]
                parts = pool.map(partial(_rows, seed=seed), spans)
                write_manifest(output / f"{task}_{split}.parquet", chain.from_iterable(parts))
    write_whole(stamp, json.dumps(recipe))
    return counts
