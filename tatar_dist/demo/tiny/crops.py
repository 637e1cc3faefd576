"""Generate and cache pretraining crops: pixels as a memory map, targets as arrays, rationales as lines.

A task, split, count and seed give a `CropSet`. Train-split crops come from the train photographs only. Half of them are
remixed (channels permuted, two photographs blended) *before* distortion or grading, so every target is still computed
from the final pixels. Validation crops are the demo's own, never remixed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tatar_dist.demo.data import aesthetics, distortions
from tatar_dist.demo.data import make as demo
from tatar_dist.demo.data import texts as templates
from tatar_dist.demo.data.scenes import SIZE, Scene, grade, make_scene
from tatar_dist.run.files import write_whole
from tatar_dist.types import Task

FAMILIES = tuple(distortions.FAMILIES)
ATTRIBUTES = (*aesthetics.WEIGHTS, "warmth", "brightness")
VERSION = 2  # raise it when the same arguments give other crops
_SPAN = 256


@dataclass(frozen=True)
class CropSet:
    """n crops of one task, aligned row by row.

    `pixels` (n, 112, 112, 3) uint8; `score` (n,) in [0, 1]; `measures` (n, 9) strengths of `FAMILIES` for "iqa" or
    (n, 10) `ATTRIBUTES` for "iaa", in [0, 1]; `photo` (n,) names.
    """

    task: Task
    pixels: np.ndarray
    score: np.ndarray
    measures: np.ndarray
    photo: np.ndarray
    rationales: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.score)


def measure_names(task: Task) -> tuple[str, ...]:
    return FAMILIES if task == "iqa" else ATTRIBUTES


def remixed(scene: Scene, split: str, rng: np.random.Generator) -> Scene:
    """Randomly permute channels, blend in a second photograph of the split, rotate by quarter turns; keeps `box`."""
    pixels = scene.pixels
    if rng.random() < 0.6:
        pixels = pixels[..., rng.permutation(3)]
    if rng.random() < 0.4:
        other = make_scene(split, rng, paste_share=0.0).pixels
        if rng.random() < 0.5:
            weight = np.full((1, 1, 1), rng.uniform(0.2, 0.5), np.float32)
        else:  # a hard split of the frame keeps full contrast on either side
            axis = np.arange(SIZE) < rng.uniform(0.25, 0.75) * SIZE
            weight = (axis[:, None] if rng.random() < 0.5 else axis[None])[..., None].astype(np.float32)
        pixels = (1 - weight) * pixels + weight * other
    if rng.random() < 0.3:
        pixels = np.rot90(pixels, int(rng.integers(4)))
    return replace(scene, pixels=np.ascontiguousarray(pixels, dtype=np.float32))


def _remixed_crop(task: Task, split: str, rng: np.random.Generator) -> tuple[np.ndarray, float, np.ndarray, str, str]:
    scene = remixed(make_scene(split, rng, paste_share=0.2), split, rng)
    if task == "iqa":
        clean = grade(
            scene.pixels,
            float(rng.normal(0, 0.3)),
            float(1 + rng.normal(0, 0.12)),
            float(np.clip(1 + rng.normal(0, 0.3), 0, 2)),
            (float(rng.normal(0, 0.05)), 0.0),
            0.0,
        )
        drawn = distortions.draw_distortions(rng)
        pixels = distortions.distort(clean, drawn, rng)
        q = distortions.full_reference(distortions.to_uint8(clean), pixels)
        score = distortions.quality_score(q)
        values = np.zeros(len(FAMILIES), np.float32)
        for d in drawn:
            values[FAMILIES.index(d.family)] = d.strength
        text = templates.iqa_rationale(drawn, scene.photo.category, score, rng)
    else:
        pixels = distortions.to_uint8(aesthetics.vary(scene, rng))
        attributes = aesthetics.measure(pixels, scene.box)
        score = aesthetics.aesthetic_score(aesthetics.raw_score(attributes))
        values = np.array([attributes[k] for k in ATTRIBUTES], np.float32)
        text = templates.iaa_rationale(attributes, scene.photo.category, score, rng)
    return pixels, score, values, scene.photo.name, text


def _plain_crop(task: Task, split: str, index: int, seed: int) -> tuple[np.ndarray, float, np.ndarray, str, str]:
    crop = demo.make_crop(task, split, index, seed)
    if task == "iqa":
        values = np.zeros(len(FAMILIES), np.float32)
        for d in crop.meta["distortions"]:
            values[FAMILIES.index(d["family"])] = d["strength"]
    else:
        values = np.array([crop.meta["attributes"][k] for k in ATTRIBUTES], np.float32)
    return crop.pixels, crop.score, values, crop.meta["photo"], crop.rationale


def _fill(span: tuple[str, Task, str, int, int, int, int]) -> list[tuple[float, list[float], str, str]]:
    path, task, split, start, stop, n, seed = span
    out = np.lib.format.open_memmap(path, mode="r+")
    rows = []
    for i in range(start, stop):
        rng = np.random.default_rng([seed, i, n, 0 if task == "iqa" else 1])
        if split == "train" and i % 2:
            pixels, score, values, photo, text = _remixed_crop(task, split, rng)
        else:
            pixels, score, values, photo, text = _plain_crop(task, split, i, seed)
        out[i] = pixels
        rows.append((score / 100, values.tolist(), photo, text))
    return rows


def crop_set(cache: Path, task: Task, split: str, n: int, seed: int, workers: int | None = None) -> CropSet:
    """Load `n` crops of a split from `cache`, or generate them there with `workers` processes.

    Raises ValueError for the test split, which pretraining must not read.
    """
    if split == "test":
        raise ValueError("pretraining never reads the test photographs")
    stem = Path(cache) / f"v{VERSION}_{task}_{split}_{n}_{seed}"
    pixels_path, rows_path = stem.with_suffix(".npy"), stem.with_suffix(".jsonl")
    if not rows_path.is_file():
        stem.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(pixels_path, mode="w+", dtype=np.uint8, shape=(n, SIZE, SIZE, 3)).flush()
        spans = [(str(pixels_path), task, split, a, min(a + _SPAN, n), n, seed) for a in range(0, n, _SPAN)]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers or len(os.sched_getaffinity(0)), mp_context=context) as pool:
            lines = [json.dumps(row) for part in pool.map(_fill, spans) for row in part]
        write_whole(rows_path, "\n".join(lines) + "\n")  # last: its presence says that the pixels are complete
    rows = [json.loads(line) for line in rows_path.read_text(encoding="utf-8").splitlines()]
    return CropSet(
        task,
        np.load(pixels_path, mmap_mode="r"),
        np.array([r[0] for r in rows], np.float32),
        np.array([r[1] for r in rows], np.float32),
        np.array([r[2] for r in rows]),
        tuple(r[3] for r in rows),
    )
