"""`tatar-dist rationale template`: rationales without a teacher, from each row's `meta`.

The manifest's `meta` holds `distortions` ([{family, strength 0-1}]: the demo set, KADID-10k) for IQA rows or numeric
`attributes` (0-1, by name: the demo set) for IAA rows. Each row gets a text grounded in them, which passes the hard
checks for a teacher's text. A row without them is an error. The choice of words depends on (seed, sample id) alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Le
from pydantic import AfterValidator, Strict

from tatar_dist.config.validate import validated
from tatar_dist.data.manifest import Manifest, read_manifest
from tatar_dist.data.writing import write_manifest
from tatar_dist.demo.data.distortions import Distortion
from tatar_dist.demo.data.photos import PHOTOS
from tatar_dist.demo.data.texts import FAMILY_NAMES, iaa_rationale, iqa_rationale
from tatar_dist.errors import UserError

# attributes that the IAA sentences describe
ATTRIBUTES = "colour contrast placement simplicity exposure sharpness separation harmony warmth brightness".split()
SCENES = {photo.name: photo.category for photo in PHOTOS}  # a word that fits before "photo"
Share = Annotated[float, Strict(), Ge(0), Le(1)]


def _with_words(family: str) -> str:
    if family not in FAMILY_NAMES:
        raise ValueError(f"there are no words for family {family!r}; known are {', '.join(sorted(FAMILY_NAMES))}")
    return family


@dataclass(frozen=True)
class KnownDistortion:
    """An entry of `meta.distortions`."""

    family: Annotated[str, AfterValidator(_with_words)]
    strength: Share


MeasuredAttributes = make_dataclass("MeasuredAttributes", [(name, Share) for name in ATTRIBUTES])


def _known(row: dict[str, Any], key: str, schema: Any, where: str) -> Any:
    """Return the row's meta at `key` as a `schema`. Raises UserError if it is missing or wrong."""
    value = row["meta"].get(key)
    if not value:
        raise UserError(
            f"{where}: {row['sample_id']!r} has no {key} in meta, so nothing can be said of it without looking; have a "
            "teacher look: tatar-dist rationale build"
        )
    return validated(schema, value, f"{where}, column meta.{key}")


def rationale_of(row: dict[str, Any], seed: int, where: str) -> str:
    """Describe a row's two strongest distortions (IQA) or attributes (IAA), or raise UserError."""
    digest = hashlib.blake2b(f"{seed}/{row['sample_id']}".encode(), digest_size=16).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "big"))
    scene = SCENES.get(str(row["meta"].get("photo")), "given")
    if row["task"] == "iaa":
        return iaa_rationale(vars(_known(row, "attributes", MeasuredAttributes, where)), scene, row["score"], rng)
    distortions = _known(row, "distortions", list[KnownDistortion], where)
    strongest = sorted(distortions, key=lambda d: -d.strength)[:2]
    return iqa_rationale(tuple(Distortion(d.family, d.strength) for d in strongest), scene, row["score"], rng)


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
