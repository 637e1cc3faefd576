"""Columns of a manifest, the stamp in its Parquet footer, and rules of reader and writer.

The rules take a schema, a pool or consecutive rows; `UserError` names file, row and column.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tatar_dist.data.pools import Pool
from tatar_dist.errors import UserError
from tatar_dist.types import SPLITS, TASKS

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
    """The writer's entry in the footer."""

    version: int
    rows: int
    groups: int  # checksum of the row-group sizes: a file cut or merged elsewhere must not pass as checked
    image_root: str | None


def json_object(text: str) -> dict[str, Any]:
    """Parse the JSON object of `attributes` or `meta`. Raises ValueError with the reason."""
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


def check_columns(path: Path, schema: pa.Schema) -> None:
    """Raise UserError for a column that is missing, repeated, or of another type than in SCHEMA."""
    types = {field.name: field.type for field in schema}
    for name in SCHEMA.names:
        count = schema.names.count(name)
        if count > 1:
            raise UserError(f"{path}: column {name} is there {count} times")
        if name in REQUIRED and not count:
            raise UserError(f"{path}: column {name} is missing")
        if count and not _fits(types[name], SCHEMA.field(name).type):
            raise UserError(f"{path}: column {name} is {types[name]}, must be {SCHEMA.field(name).type}")
    if "image" not in types and "image_bytes" not in types:
        raise UserError(f"{path}: neither column image nor column image_bytes is there")


def _fits(stored: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_dictionary(stored):
        stored = stored.value_type
    types = {
        pa.string(): (pa.string(), pa.large_string(), pa.string_view()),
        pa.binary(): (pa.binary(), pa.large_binary(), pa.binary_view()),
    }
    if wanted in types:
        return stored in (pa.null(), *types[wanted])
    return pa.types.is_null(stored) or pa.types.is_floating(stored) or pa.types.is_integer(stored)


def check_pool(path: Path, pool: Pool) -> None:
    """Raise UserError if a pool's statistics show invalid keys or scores outside 0-100."""
    for name in ("dataset", "task", "split"):
        if rule := _rule(name, getattr(pool, name)):
            raise UserError(f"{path}: row {int(pool.runs[0, 0])}, column {name}: {rule}")
    if not 0 <= pool.score_min <= pool.score_max <= 100:
        bad = pool.score_max if pool.score_max > 100 else pool.score_min
        raise UserError(f"{path}: data set {pool.dataset!r}, column score: {bad} is not a number from 0 to 100")


def _rule(column: str, text: str) -> str | None:
    """Return what is wrong with a text of a required column, or None."""
    if not text:
        return "is empty"
    if column == "task" and text not in TASKS:
        return f"{text!r} is neither {TASKS[0]} nor {TASKS[1]}"
    if column == "split" and text not in SPLITS:
        return f"{text!r} is none of {', '.join(SPLITS)}"
    return None


def check_table(path: Path, first: int, table: pa.Table, ids: IdCheck) -> None:
    """Check rows from `first` on, add ids to `ids`. Raises UserError naming row and column."""
    try:
        table.validate(full=True)
    except pa.ArrowInvalid as e:
        end = first + len(table) - 1
        raise UserError(f"{path}: rows {first} to {end}: not UTF-8 text: {str(e).splitlines()[0]}") from None
    for name in REQUIRED:
        column = table.column(name)
        if column.null_count:
            row = first + pc.index(column.is_null(), True).as_py()
            raise UserError(f"{path}: row {row}, column {name}: no value")
    for name in ("sample_id", "dataset", "task", "split"):
        column = table.column(name).cast(pa.string())
        for value in [""] if name == "sample_id" else column.unique().to_pylist():
            row = pc.index(column, value).as_py()
            if row >= 0 and (rule := _rule(name, value)):
                raise UserError(f"{path}: row {first + row}, column {name}: {rule}")
    scores = table.column("score").cast(pa.float64(), safe=False).to_numpy()
    bad = ~((scores >= 0) & (scores <= 100))  # true for NaN as well
    if bad.any():
        i = int(np.argmax(bad))
        raise UserError(f"{path}: row {first + i}, column score: {scores[i]} is not a number from 0 to 100")
    ids.add(table.column("sample_id").to_pylist())


class IdCheck:
    """Find repeats among millions of ids by 8-byte hashes; compare ids only if hashes are equal."""

    def __init__(self) -> None:
        self._hashes: list[np.ndarray] = []

    def add(self, ids: Sequence[str | None]) -> None:
        self._hashes.append(np.fromiter(map(hash, ids), np.int64, len(ids)))

    def repeats(self, again: Iterable[Sequence[str | None]]) -> Iterator[tuple[str, int, int]]:
        """Yield (id, its row, first row) of repeated ids; `again` yields once more what was added."""
        hashes = np.sort(np.concatenate(self._hashes or [np.zeros(0, np.int64)]))
        suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        first: dict[str, int] = {}
        for row, name in enumerate(chain.from_iterable(again) if suspects else ()):
            if name is not None and hash(name) in suspects and first.setdefault(name, row) != row:
                yield name, row, first[name]


def stored_ids(file: pq.ParquetFile) -> Iterator[list[str]]:
    """Yield the sample ids of a manifest in pieces."""
    return (batch.column(0).to_pylist() for batch in file.iter_batches(columns=["sample_id"]))
