"""Registry of the source photographs of the demo set: location, split, subject box and provenance.

All are image files installed by ordinary Python packages. A package is located by its import spec and never imported
(imgaug, thumbor, mahotas and gradio are installed without their dependencies, see launch/photos.txt). The split belongs
to the photograph: no part of a test photograph may be used in training or pretraining.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps

from tatar_dist.errors import UserError
from tatar_dist.types import SPLITS

Category = Literal["landscape", "object", "portrait", "animal"]


@dataclass(frozen=True)
class Photo:
    """One photograph. `box`: main subject (x0, y0, x1, y1) as fractions of width and height, set by hand.

    `provenance` states the known author and licence, or that the package has no separate statement for the file. Such
    files are read from the installed package and never redistributed by this repository.
    """

    name: str
    package: str
    path: str
    split: str
    category: Category
    box: tuple[float, float, float, float]
    provenance: str


_SKI = "scikit-image's data set (docstrings of skimage.data): "
_GRADIO = "picture of gradio's media assets (package Apache-2.0), no separate statement"
_THUMBOR = "test fixture of thumbor (package MIT), no separate statement in the package"
_COMMONS = "test fixture of thumbor; the file names its source: commons.wikimedia.org/wiki/File:"
_F = "fixtures/filters/"

PHOTOS: tuple[Photo, ...] = (
    Photo(
        "astronaut",
        "skimage",
        "data/astronaut.png",
        "train",
        "portrait",
        (0.06, 0.02, 0.75, 1.0),
        _SKI + "NASA, public domain",
    ),
    Photo(
        "chelsea",
        "skimage",
        "data/chelsea.png",
        "train",
        "animal",
        (0.12, 0.0, 0.84, 0.95),
        _SKI + "Stéfan van der Walt, CC0",
    ),
    Photo(
        "rocket",
        "skimage",
        "data/rocket.jpg",
        "train",
        "landscape",
        (0.40, 0.28, 0.60, 1.0),
        _SKI + "SpaceX, public domain",
    ),
    Photo(
        "motorcycle",
        "skimage",
        "data/motorcycle_left.png",
        "train",
        "object",
        (0.14, 0.16, 0.92, 0.90),
        _SKI + "Middlebury 2014 stereo benchmark (Scharstein et al., GCPR 2014), no licence stated",
    ),
    Photo(
        "flower",
        "sklearn",
        "datasets/images/flower.jpg",
        "train",
        "object",
        (0.26, 0.16, 0.71, 0.86),
        "scikit-learn sample image, CC BY 2.0 (vultilion on Flickr)",
    ),
    Photo("tower", "gradio", "media_assets/images/tower.jpg", "train", "landscape", (0.24, 0.12, 0.92, 1.0), _GRADIO),
    Photo(
        "cheetah_running",
        "gradio",
        "media_assets/images/cheetah.jpg",
        "train",
        "animal",
        (0.16, 0.34, 0.77, 0.69),
        _GRADIO,
    ),
    Photo(
        "cheetah_face",
        "gradio",
        "media_assets/images/cheetah1.jpg",
        "train",
        "animal",
        (0.08, 0.10, 0.90, 1.0),
        _GRADIO,
    ),
    Photo(
        "maher",
        "thumbor",
        _F + "source.jpg",
        "train",
        "portrait",
        (0.28, 0.09, 0.78, 1.0),
        _COMMONS + "Katherine_Maher.jpg",
    ),
    Photo(
        "giunchedi",
        "thumbor",
        _F + "Giunchedi%2C_Filippo_January_2015_01.jpg",
        "train",
        "portrait",
        (0.28, 0.07, 0.74, 1.0),
        "test fixture of thumbor; its metadata says Myleen Hollero / Wikimedia Foundation / CC BY-SA 3.0",
    ),
    Photo("eyes", "thumbor", _F + "redeye_applied.png", "train", "portrait", (0.10, 0.25, 0.92, 0.85), _THUMBOR),
    Photo(
        "luispedro",
        "mahotas",
        "demos/data/luispedro.jpg",
        "validation",
        "portrait",
        (0.13, 0.05, 0.93, 1.0),
        "demo picture of mahotas (package MIT), a portrait of its author",
    ),
    Photo("lion", "gradio", "media_assets/images/lion.jpg", "validation", "animal", (0.12, 0.02, 0.75, 0.88), _GRADIO),
    Photo(
        "china",
        "sklearn",
        "datasets/images/china.jpg",
        "test",
        "landscape",
        (0.12, 0.10, 0.60, 0.88),
        "scikit-learn sample image, CC BY 2.0 (danielbuechele on Flickr)",
    ),
    Photo(
        "coffee",
        "skimage",
        "data/coffee.png",
        "test",
        "object",
        (0.14, 0.03, 0.81, 0.99),
        _SKI + "Rachel Michetti, CC0",
    ),
    Photo(
        "grace_hopper",
        "matplotlib",
        "mpl-data/sample_data/grace_hopper.jpg",
        "test",
        "portrait",
        (0.07, 0.03, 1.0, 1.0),
        "matplotlib sample data; the file names its source: commons.wikimedia.org/wiki/File:Grace_Hopper.jpg",
    ),
    Photo(
        "quokka",
        "imgaug",
        "quokka.jpg",
        "test",
        "animal",
        (0.14, 0.06, 0.57, 1.0),
        "example picture of imgaug (package MIT), no separate statement in the package",
    ),
    Photo(
        "guido",
        "thumbor",
        _F + "800px-Guido-portrait-2014.jpg",
        "test",
        "portrait",
        (0.21, 0.04, 0.84, 1.0),
        _COMMONS + "Guido-portrait-2014.jpg",
    ),
    Photo(
        "henner",
        "thumbor",
        _F + "800px-Christophe_Henner_-_June_2016.jpg",
        "test",
        "portrait",
        (0.03, 0.0, 0.66, 1.0),
        _COMMONS + "Christophe_Henner_-_June_2016.jpg",
    ),
)


def photos_of(split: str) -> tuple[Photo, ...]:
    """Return the photographs of a split in registry order, on which the reproducibility of a seed depends."""
    found = tuple(p for p in PHOTOS if p.split == split)
    if not found:
        raise UserError(f"no photographs for split {split!r}: must be one of {', '.join(SPLITS)}")
    return found


def locate(photo: Photo) -> Path:
    """Return the path of the picture file. Raises UserError naming package and remedy if it is missing."""
    spec = importlib.util.find_spec(photo.package)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(root) / photo.path
        if path.is_file():
            return path
    what = "is not installed" if spec is None else f"holds no {photo.path}"
    raise UserError(f"demo photograph {photo.name!r}: package {photo.package} {what}; run `make setup`")


@cache
def load_photo(photo: Photo) -> Image.Image:
    """Load the photograph as RGB; cached, since a process cuts thousands of crops from each."""
    with Image.open(locate(photo)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")
