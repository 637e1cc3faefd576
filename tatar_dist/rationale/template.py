"""`tatar-dist rationale template`: write rationales without a teacher, from each row's `meta`.

The manifest's `meta` holds `distortions` ([{family, strength 0-1}]: the demo set, KADID-10k) for IQA rows or numeric
`attributes` (0-1, by name: the demo set) for IAA rows. Each row gets a text grounded in them, which passes the hard
checks for a teacher's text. A row without them is an error. The choice of words depends on (seed, sample id) alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tatar_dist.data.manifest import Manifest, read_manifest
from tatar_dist.data.writing import write_manifest
from tatar_dist.demo.data.distortions import Distortion
from tatar_dist.demo.data.photos import PHOTOS
from tatar_dist.demo.data.texts import FAMILY_NAMES, iaa_rationale, iqa_rationale
from tatar_dist.errors import UserError

ATTRIBUTES = (  # attributes that the IAA sentences describe
    "colour",
    "contrast",
    "placement",
    "simplicity",
    "exposure",
    "sharpness",
    "separation",
    "harmony",
    "warmth",
    "brightness",
)


def _generator(seed: int, sample_id: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}/{sample_id}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _share(value: Any, where: str) -> float:
    """Check that a value is a number in [0, 1]. Raises UserError with `where`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 <= value <= 1 and math.isfinite(value)):
        raise UserError(f"{where}: {value!r} must be a number from 0 to 1")
    return float(value)


def distortions_of(meta: dict[str, Any], where: str) -> tuple[Distortion, ...]:
    """Distortions of a row from its meta, at most the two strongest; empty if meta has none.

    Raises UserError for a family without words, a strength outside [0, 1], or a wrong format.
    """
    listed = meta.get("distortions")
    if listed is None:
        return ()
    if not isinstance(listed, list):
        raise UserError(f"{where}.distortions: must be a list of {{family, strength}}")
    found = []
    for i, item in enumerate(listed):
        at = f"{where}.distortions[{i}]"
        if not isinstance(item, dict) or not {"family", "strength"} <= set(item):
            raise UserError(f"{at}: must hold family and strength")
        if item["family"] not in FAMILY_NAMES:
            known = ", ".join(sorted(FAMILY_NAMES))
            raise UserError(f"{at}: there are no words for family {item['family']!r}; known are {known}")
        found.append(Distortion(item["family"], _share(item["strength"], at)))
    return tuple(sorted(found, key=lambda d: -d.strength)[:2])


def attributes_of(meta: dict[str, Any], where: str) -> dict[str, float] | None:
    """Measured attributes of a row by name, None if meta has none. Raises UserError if one is missing or invalid."""
    measured = meta.get("attributes")
    if measured is None:
        return None
    if not isinstance(measured, dict):
        raise UserError(f"{where}.attributes: must be an object of numbers by name")
    if missing := [name for name in ATTRIBUTES if name not in measured]:
        raise UserError(f"{where}.attributes: {missing[0]} is missing, the sentences need {', '.join(ATTRIBUTES)}")
    return {name: _share(measured[name], f"{where}.attributes.{name}") for name in ATTRIBUTES}


def scene_of(meta: dict[str, Any]) -> str:
    """Category of the photograph as a word that fits before "photo"; "given" if unknown."""
    kinds = {photo.name: photo.category for photo in PHOTOS}
    return kinds.get(str(meta.get("photo")), "given")


def rationale_of(row: dict[str, Any], seed: int, where: str) -> str:
    """Text of one row. Raises UserError if its meta holds neither distortions nor attributes for its task."""
    meta, rng = row["meta"], _generator(seed, row["sample_id"])
    at = f"{where}, column meta"
    scene = scene_of(meta)
    if row["task"] == "iqa":
        if found := distortions_of(meta, at):
            return iqa_rationale(found, scene, row["score"], rng)
        unknown = "distortions"
    else:
        if (measured := attributes_of(meta, at)) is not None:
            return iaa_rationale(measured, scene, row["score"], rng)
        unknown = "measured attributes"
    raise UserError(
        f"{where}: {row['sample_id']!r} has no {unknown} in meta, so nothing can be said of it without looking; have a "
        "teacher look: tatar-dist rationale build"
    )


def _rows(manifest: Manifest, seed: int) -> Iterator[dict[str, Any]]:
    for i in range(len(manifest)):
        row = manifest.row(i)
        note = {"teacher": "template", "seed": seed}
        text = rationale_of(row, seed, f"{manifest.path}: row {i}")
        yield {**row, "rationale": text, "meta": {**row["meta"], "rationale": note}}


def run(source: Path, output: Path, seed: int = 0) -> dict[str, Any]:
    """Write `output`: all rows of `source`, each with a text. Returns {"rows", "output"}.

    Raises UserError for a bad manifest, or a row without the needed meta; then nothing is written.
    """
    if Path(output).resolve() == Path(source).resolve():
        raise UserError(f"--output {output}: is the input itself")
    manifest = read_manifest(source)
    count = write_manifest(Path(output), _rows(manifest, seed), image_root=manifest.image_root)
    return {"rows": count, "output": str(output)}
