"""Columns of a manifest, and the stamp that its writer stores in the Parquet footer."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tatar_dist.errors import UserError

VERSION = 1
STAMP = b"tatar_dist.manifest"  # the footer's key for the writer's `Stamp`
SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.string()),
        pa.field("dataset", pa.string()),
        pa.field("task", pa.string()),
        pa.field("image", pa.string()),
        pa.field("image_bytes", pa.binary()),
        pa.field("score", pa.float64()),
        pa.field("score_raw", pa.float64()),
        pa.field("score_std", pa.float64()),
        pa.field("split", pa.string()),
        pa.field("rationale", pa.string()),
        pa.field("attributes", pa.string()),  # JSON object: attribute name -> text
        pa.field("meta", pa.string()),  # JSON object
    ]
)
REQUIRED = ("sample_id", "dataset", "task", "score", "split")


@dataclass(frozen=True)
class Stamp:
    """The writer's entry in the footer.
    `groups` is a checksum of the row-group sizes: a file cut or merged elsewhere must not pass as checked."""

    version: int
    rows: int
    groups: int
    image_root: str | None

    def to_json(self) -> bytes:
        return json.dumps(self.__dict__, sort_keys=True).encode()


def json_object(text: str) -> dict[str, Any]:
    """Parse the JSON object of column `attributes` or `meta`. Raises ValueError with the reason if it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


def groups_checksum(sizes: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(sizes, "<i8").tobytes())


def read_stamp(path: Path, file: pq.ParquetFile) -> Stamp | None:
    text = (file.metadata.metadata or {}).get(STAMP)
    if text is None:
        return None
    try:
        values = json.loads(text)
        version = values["version"]
        if version <= VERSION:
            return Stamp(version, values["rows"], values["groups"], values["image_root"])
    except (ValueError, TypeError, KeyError) as e:
        raise UserError(f"{path}: damaged stamp in the footer: {e!r}; import the data again") from None
    raise UserError(f"{path}: manifest version {version}, this tatar_dist reads up to {VERSION}: update it")
