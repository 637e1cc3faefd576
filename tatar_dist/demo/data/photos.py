"""Photographs of the demo and scenes from them: 112x112 crops, pasted subjects, grading.

photos.yaml lists the photographs: location, split, subject box and provenance. All are image files installed by
ordinary Python packages. A package is located by its import spec and never imported (imgaug, thumbor, mahotas and
gradio are installed without their dependencies, see launch/photos.txt).

A split and a random generator determine the pixels of a `Scene`. Framing, subject, light and colour vary, so that the
aesthetic score varies within a photograph.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from PIL import Image, ImageOps
from scipy import ndimage

from tatar_dist.errors import UserError

Category = Literal["landscape", "object", "portrait", "animal"]
Box = tuple[float, float, float, float]
SIZE = 112
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
MIN_SIDE = 150  # source pixels a crop spans at least, so that a clean crop is sharp


@dataclass(frozen=True)
class Photo:
    """One photograph; photos.yaml explains the fields."""

    name: str
    package: str
    path: str
    split: str
    category: Category
    box: Box
    provenance: str


_ENTRIES = yaml.safe_load(Path(__file__).with_name("photos.yaml").read_text(encoding="utf-8"))
PHOTOS = tuple(Photo(**entry | {"box": tuple(entry["box"])}) for entry in _ENTRIES)


def photos_of(split: str) -> tuple[Photo, ...]:
    """Return a split's photographs in listed order, on which the result of a seed depends."""
    return tuple(p for p in PHOTOS if p.split == split)


def locate(photo: Photo) -> Path:
    """Return the picture file's path. Raises UserError naming package and remedy if missing."""
    spec = importlib.util.find_spec(photo.package)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(root) / photo.path
        if path.is_file():
            return path
    raise UserError(f"demo photograph {photo.name!r}: no {photo.path} in package {photo.package}; run `make setup`")


@cache
def load_photo(photo: Photo) -> Image.Image:
    """Load the photograph as RGB; cached, since a process cuts thousands of crops from each."""
    with Image.open(locate(photo)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


@dataclass(frozen=True)
class Scene:
    """`pixels` (112, 112, 3) float32 0-255; `box` x0, y0, x1, y1 in [0, 1], None if not visible."""

    pixels: np.ndarray
    photo: Photo
    box: Box | None
    pasted: str | None = None


def _visible(box: Box) -> Box | None:
    """Clip a box to the unit square; None if less than 15 % of its area remains."""
    x0, y0, x1, y1 = box
    cx0, cy0, cx1, cy1 = max(x0, 0.0), max(y0, 0.0), min(x1, 1.0), min(y1, 1.0)
    if cx1 <= cx0 or cy1 <= cy0 or (cx1 - cx0) * (cy1 - cy0) < 0.15 * (x1 - x0) * (y1 - y0):
        return None
    return cx0, cy0, cx1, cy1


def cut(photo: Photo, rng: np.random.Generator) -> Scene:
    """Cut a random square, from tight to full, mostly near the subject, randomly mirrored."""
    image, subject = load_photo(photo), np.array(photo.box).reshape(2, 2)  # corners as fractions of (width, height)
    size = np.array(image.size)
    low = max(MIN_SIDE, 0.38 * size.min())
    side = low + (size.min() - low) * rng.random()
    near = rng.random() < 0.75
    jitter, anywhere = rng.normal(0, 0.28, 2), rng.random(2)
    corner = subject.sum(0) / 2 * size + jitter * side - side / 2 if near else anywhere * (size - side)
    corner = np.clip(corner, 0, size - side)
    tile = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(*corner, *(corner + side)))
    (x0, y0), (x1, y1) = ((subject * size - corner) / side).tolist()
    pixels = np.asarray(tile, dtype=np.float32)
    if rng.random() < 0.5:
        pixels, x0, x1 = pixels[:, ::-1], 1 - x1, 1 - x0
    return Scene(np.ascontiguousarray(pixels), photo, _visible((x0, y0, x1, y1)))


def paste(scene: Scene, subject: Photo, rng: np.random.Generator) -> Scene:
    """Paste another photograph's subject, feathered, at a random place and size, as the new one."""
    image = load_photo(subject)
    (x0, y0), (x1, y1) = (np.array(subject.box).reshape(2, 2) * image.size).tolist()
    scale = SIZE * rng.uniform(0.35, 0.7) / max(x1 - x0, y1 - y0)
    tw, th = max(16, round((x1 - x0) * scale)), max(16, round((y1 - y0) * scale))
    patch = np.asarray(image.resize((tw, th), Image.Resampling.BICUBIC, box=(x0, y0, x1, y1)), dtype=np.float32)
    if rng.random() < 0.5:
        patch = patch[:, ::-1]
    left, top = int(rng.integers(0, SIZE - tw + 1)), int(rng.integers(0, SIZE - th + 1))
    yy = np.abs(np.linspace(-1, 1, th, dtype=np.float32))[:, None]
    xx = np.abs(np.linspace(-1, 1, tw, dtype=np.float32))[None]
    # A super-ellipse: opaque in the middle, fading over the outer fifth, so no straight seam gives the paste away.
    alpha = np.clip((1.0 - (xx**4 + yy**4) ** 0.25) / 0.2, 0, 1)[..., None]
    pixels = scene.pixels.copy()
    area = pixels[top : top + th, left : left + tw]
    pixels[top : top + th, left : left + tw] = area + alpha * (patch - area)
    box = (left / SIZE, top / SIZE, (left + tw) / SIZE, (top + th) / SIZE)
    return replace(scene, pixels=pixels, box=box, pasted=subject.name)


_AXIS = np.linspace(-1, 1, SIZE, dtype=np.float32)
_RADIUS2 = (_AXIS[:, None] ** 2 + _AXIS[None] ** 2) / 2


def grade(
    pixels: np.ndarray, stops: float, contrast: float, saturation: float, tint: tuple[float, float], vignette: float
) -> np.ndarray:
    """Apply photographic grading to (112, 112, 3) float32 on 0-255, clipped to that range.

    `stops` scales light (doubling per stop, applied in the gamma domain with exponent 1/2.2); `contrast` stretches
    about mid grey; `saturation` stretches about luma; `tint` = (warm, green) channel gains; `vignette` in [0, 1].
    """
    x: np.ndarray = pixels * np.float32(2.0 ** (stops / 2.2))
    warm, green = tint
    x = x * np.array([1 + warm, 1 + green, 1 - warm], dtype=np.float32)
    luma = (x @ LUMA)[..., None]
    x = luma + np.float32(saturation) * (x - luma)
    x = 118 + np.float32(contrast) * (x - 118)
    if vignette > 0:
        x = x * (1 - np.float32(vignette) * _RADIUS2)[..., None]
    return np.clip(x, 0, 255)


def make_scene(split: str, rng: np.random.Generator, paste_share: float) -> Scene:
    """Crop a random photograph; with probability `paste_share` paste another's subject into it."""
    pool = photos_of(split)
    photo = pool[int(rng.integers(len(pool)))]
    scene = cut(photo, rng)
    if rng.random() < paste_share:
        others = [p for p in pool if p.name != photo.name]
        scene = paste(scene, others[int(rng.integers(len(others)))], rng)
    return scene


def soften(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Apply a Gaussian blur over the two image axes."""
    return ndimage.gaussian_filter(pixels, sigma=(sigma, sigma, 0), mode="nearest", truncate=3.0)
