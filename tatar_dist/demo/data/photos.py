"""Source photographs of the demo set, listed in photos.yaml: location, split, subject box and provenance.

All are image files installed by ordinary Python packages. A package is located by its import spec and never imported
(imgaug, thumbor, mahotas and gradio are installed without their dependencies, see launch/photos.txt).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from PIL import Image, ImageOps

from tatar_dist.errors import UserError

Category = Literal["landscape", "object", "portrait", "animal"]
Box = tuple[float, float, float, float]


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


def _listed() -> tuple[Photo, ...]:
    entries = yaml.safe_load(Path(__file__).with_name("photos.yaml").read_text(encoding="utf-8"))
    return tuple(Photo(**{**entry, "box": tuple(entry["box"])}) for entry in entries)


PHOTOS = _listed()


def photos_of(split: str) -> tuple[Photo, ...]:
    """Return the photographs of a split in listed order, on which the reproducibility of a seed depends."""
    return tuple(p for p in PHOTOS if p.split == split)


def locate(photo: Photo) -> Path:
    """Return the path of the picture file. Raises UserError naming package and remedy if it is missing."""
    spec = importlib.util.find_spec(photo.package)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(root) / photo.path
        if path.is_file():
            return path
    problem = "is not installed" if spec is None else f"holds no {photo.path}"
    raise UserError(f"demo photograph {photo.name!r}: package {photo.package} {problem}; run `make setup`")


@cache
def load_photo(photo: Photo) -> Image.Image:
    """Load the photograph as RGB; cached, since a process cuts thousands of crops from each."""
    with Image.open(locate(photo)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")
