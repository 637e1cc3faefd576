"""Generate pretraining crops of one task: pixels, targets and rationales.

Train crops come from photographs of the train split. Every second one is remixed (channels permuted, two photographs
blended, turned) *before* distortion or grading, so every target is computed from the final pixels. Validation crops are
the demo's own, never remixed. Pretraining reads no test photograph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from tatar_dist.demo.data import aesthetics, distortions
from tatar_dist.demo.data.make import PASTE_SHARE, DemoCrop, crop_of, crop_workers, make_crop
from tatar_dist.demo.data.photos import SIZE, Scene, make_scene
from tatar_dist.types import TASKS, Task

# Names of the measurements of a crop: strengths of the distortions for IQA, attributes for IAA.
MEASURES: dict[Task, tuple[str, ...]] = {
    "iqa": tuple(distortions.FAMILIES),
    "iaa": (*aesthetics.WEIGHTS, "warmth", "brightness"),
}


@dataclass(frozen=True)
class CropSet:
    """n crops of one task, aligned row by row.

    `pixels` (n, 112, 112, 3) uint8; `score` (n,) float32 in [0, 1]; `measures` (n, 9) for "iqa" or (n, 10) for "iaa",
    float32 in [0, 1], in the order of `MEASURES`.
    """

    task: Task
    pixels: np.ndarray
    score: np.ndarray
    measures: np.ndarray
    rationales: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.score)


def remixed(scene: Scene, split: str, rng: np.random.Generator) -> Scene:
    """Randomly permute channels, blend in another photo of `split`, rotate by multiples of 90°."""
    pixels, box = scene.pixels, scene.box
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
        for _ in range(int(rng.integers(4))):  # counterclockwise: a point (x, y) moves to (y, 1 - x)
            pixels = np.rot90(pixels)
            box = box and (box[1], 1 - box[2], box[3], 1 - box[0])
    return replace(scene, pixels=np.ascontiguousarray(pixels, dtype=np.float32), box=box)


def _crop(index: int, task: Task, split: Literal["train", "validation"], seed: int) -> DemoCrop:
    if split == "validation" or index % 2 == 0:
        return make_crop(task, split, index, seed)
    rng = np.random.default_rng([seed, TASKS.index(task), index])
    scene = remixed(make_scene(split, rng, PASTE_SHARE[task]), split, rng)
    return crop_of(task, scene, rng, spread=2.0)


def _measures(crop: DemoCrop, task: Task) -> list[float]:
    if task == "iqa":
        values = {d["family"]: d["strength"] for d in crop.meta["distortions"]}
    else:
        values = crop.meta["attributes"]
    return [values.get(name, 0.0) for name in MEASURES[task]]


def crop_set(task: Task, split: Literal["train", "validation"], n: int, seed: int) -> CropSet:
    """Generate `n` crops on all cores of this machine; about 80 kB of memory each while it runs."""
    with crop_workers() as pool:
        crops = list(pool.map(partial(_crop, task=task, split=split, seed=seed), range(n), chunksize=256))
    return CropSet(
        task,
        np.stack([crop.pixels for crop in crops]),
        np.array([crop.score / 100 for crop in crops], np.float32),
        np.array([_measures(crop, task) for crop in crops], np.float32),
        tuple(crop.rationale for crop in crops),
    )
