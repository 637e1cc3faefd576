"""Make the demo's base model: build, train the tower, align the language model, save as bf16 with a model card.

    python -m tatar_dist.demo.tiny.pretrain --output DIR
    python -m tatar_dist.demo.tiny.pretrain --output DIR --minutes-tower 1 --minutes-align 1

Train crops come from photographs of the train split. Every second one is remixed (channels permuted, two photographs
blended, turned) *before* distortion or grading, so every target is computed from the final pixels. Validation crops are
the demo's own, never remixed. Test photographs are never opened. Writes a model directory for transformers and vLLM.
The result depends on the machine's speed, since stages are limited by time.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from tatar_dist.demo.data.make import MEASURES, PASTE_SHARE, DemoCrop, crop_of, crop_workers, make_crop
from tatar_dist.demo.data.photos import SIZE, Scene, make_scene
from tatar_dist.demo.tiny.align import train_align
from tatar_dist.demo.tiny.build import default_corpus, make_model, make_processor, train_tokenizer
from tatar_dist.demo.tiny.tower import train_tower
from tatar_dist.types import TASKS, Task

VALIDATION_CROPS = 1_000


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
    """Randomly permute channels, blend in another photograph of the split, turn pixels and box by quarter turns."""
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
    """Generate `n` crops on all cores of this machine; about 38 kB of memory each."""
    pixels = np.empty((n, SIZE, SIZE, 3), np.uint8)
    score, measures, rationales = [], [], []
    with crop_workers() as pool:
        crops = pool.map(partial(_crop, task=task, split=split, seed=seed), range(n), chunksize=256)
        for i, crop in enumerate(crops):
            pixels[i] = crop.pixels
            score.append(crop.score / 100)
            measures.append(_measures(crop, task))
            rationales.append(crop.rationale)
            if (i + 1) % 5_000 == 0:
                print(f"{task} {split}: {i + 1} of {n} crops", flush=True)
    return CropSet(task, pixels, np.array(score, np.float32), np.array(measures, np.float32), tuple(rationales))


def pretrain(output: Path, *, minutes_tower: float, minutes_align: float, crops: int, seed: int) -> None:
    """Run both stages on `crops` train crops per task and write the model directory."""
    # Seeds apart from the demo's default 0, so that the base has not seen the very crops it is fine-tuned on.
    train = {t: crop_set(t, "train", crops, seed + 11) for t in TASKS}
    validation = {t: crop_set(t, "validation", VALIDATION_CROPS, seed + 7) for t in TASKS}
    tokenizer = train_tokenizer(default_corpus(), 1024)
    model = make_model(tokenizer, seed=seed)
    tower = train_tower(model, train, validation, minutes=minutes_tower, seed=seed)
    # What is saved is bf16: the language model is aligned to the tower as it will be loaded.
    model.model.visual.to(torch.bfloat16).to(torch.float32)
    align = train_align(model, tokenizer, train, validation, minutes=minutes_align, seed=seed)

    model.to(torch.bfloat16).save_pretrained(output)
    make_processor(tokenizer).save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)
    options = f"--minutes-tower {minutes_tower:g} --minutes-align {minutes_align:g} --crops {crops}"
    environment = Environment(loader=PackageLoader(__package__, "."), undefined=StrictUndefined, autoescape=False)
    card = environment.get_template("model_card.md.j2").render(
        command=f"python -m tatar_dist.demo.tiny.pretrain --output DIR {options}",
        seed=seed,
        crops=crops,
        validation_crops=VALIDATION_CROPS,
        millions=sum(p.numel() for p in model.parameters()) / 1e6,
        tower=tower,
        align=align,
    )
    (output / "README.md").write_text(card + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="model directory to write")
    parser.add_argument("--minutes-tower", type=float, default=24.0)
    parser.add_argument("--minutes-align", type=float, default=8.0)
    parser.add_argument("--crops", type=int, default=30_000, help="train crops per task")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    pretrain(**vars(args))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
