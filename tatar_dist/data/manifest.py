"""Manifests: one Parquet file per data set and split, the form in which all stages read their data.

In: a path. Out: light index columns in memory, and one `Sample` at a time with its encoded image. The image lies in
the row itself (`image_bytes`) or in a file beside the manifest (`image`, relative, never outside that directory).
Every fault of a file is a `UserError` that names file, row and column; a picture that does not decode is an
`UnreadableImage`, which callers may quarantine.
"""

from __future__ import annotations

import io
import json
import os
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from tatar_dist.errors import UserError
from tatar_dist.records import TASKS, Sample

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
INDEX = REQUIRED
ROW_GROUP = 256  # rows; with embedded 112-pixel crops about 6 MB, which is what reading one sample may cost
CACHED_GROUPS = 4


class UnreadableImage(Exception):
    """The bytes are no image that can be decoded; the message says whose and why."""


def decode_image(data: bytes, where: str) -> Image.Image:
    """Encoded bytes -> RGB image, upright by its EXIF orientation. `where` names the sample in the error.

    Raises:
        UnreadableImage: not an image, truncated, or larger than Pillow accepts as safe.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        raise UnreadableImage(f"{where}: cannot decode image: {e}") from None


def write_manifest(path: Path, rows: Iterable[dict[str, Any]], row_group: int = ROW_GROUP) -> int:
    """Write rows (dicts of SCHEMA's columns; absent ones are null; `attributes` and `meta` may be dicts).

    Written beside and renamed, so that a reader never sees half a file. Returns the number of rows.
    Raises KeyError for a column that the schema lacks.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    names = set(SCHEMA.names)
    count = 0
    pending: list[dict[str, Any]] = []

    def flush(writer: pq.ParquetWriter) -> None:
        columns = {n: [r.get(n) for r in pending] for n in SCHEMA.names}
        writer.write_table(pa.table(columns, schema=SCHEMA), row_group_size=row_group)
        pending.clear()

    try:
        # Pictures are compressed already: only the text columns profit from zstd.
        compression = {n: "none" if n == "image_bytes" else "zstd" for n in SCHEMA.names}
        with pq.ParquetWriter(beside, SCHEMA, compression=compression) as writer:
            for row in rows:
                unknown = set(row) - names
                if unknown:
                    raise KeyError(f"{path}: no manifest column {sorted(unknown)}")
                objects = {k: v for k, v in row.items() if isinstance(v, dict)}
                pending.append({**row, **{k: json.dumps(v, ensure_ascii=False) for k, v in objects.items()}})
                count += 1
                if len(pending) == row_group:
                    flush(writer)
            if pending:
                flush(writer)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return count


@dataclass(frozen=True)
class _Index:
    sample_id: list[str]
    dataset: list[str]
    task: list[str]
    score: np.ndarray


class Manifest:
    """A checked manifest: `len`, index columns as attributes, `get(i)` for a whole sample.

    Attributes: `path`, `sample_ids`, `datasets`, `tasks` (lists of str) and `scores` ((n,) float64, 0-100).
    Pickles (open file and cache stay behind), so that Ray may carry it.
    """

    def __init__(self, path: Path, index: _Index, group_starts: np.ndarray, columns: tuple[str, ...]):
        self.path = path
        self.sample_ids, self.datasets, self.tasks = index.sample_id, index.dataset, index.task
        self.scores = index.score
        self._starts = group_starts
        self._columns = columns
        self._file: pq.ParquetFile | None = None
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_cache": OrderedDict()}

    def _group(self, g: int) -> pa.Table:
        if g in self._cache:
            self._cache.move_to_end(g)
            return self._cache[g]
        if self._file is None:
            self._file = pq.ParquetFile(self.path)
        table = self._file.read_row_group(g, columns=list(self._columns))
        self._cache[g] = table
        while len(self._cache) > CACHED_GROUPS:
            self._cache.popitem(last=False)
        return table

    def row(self, i: int) -> dict[str, Any]:
        """All columns of row i as Python values; absent columns are None, `attributes` and `meta` parsed to dicts."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: row {i} of {len(self)}")
        g = int(np.searchsorted(self._starts, i, side="right")) - 1
        values = self._group(g).slice(i - int(self._starts[g]), 1).to_pylist()[0]
        row = {name: values.get(name) for name in SCHEMA.names}
        for name in ("attributes", "meta"):
            row[name] = self._parse(row[name], i, name)
        return row

    def _parse(self, text: str | None, i: int, column: str) -> dict[str, Any]:
        if not text:
            return {}
        try:
            value = json.loads(text)
        except ValueError as e:
            raise UserError(f"{self.path}: row {i}, column {column}: not JSON: {e}") from None
        if not isinstance(value, dict):
            raise UserError(f"{self.path}: row {i}, column {column}: must be a JSON object")
        return value

    def has_rationales(self) -> bool:
        """Whether any row holds one; reads no other column, and no further than the first."""
        if "rationale" not in self._columns:
            return False
        with pq.ParquetFile(self.path) as file:
            texts = (t for batch in file.iter_batches(columns=["rationale"]) for t in batch.column(0).to_pylist())
            return any(t and t.strip() for t in texts)

    def get(self, i: int) -> Sample:
        """Row i with its encoded image.

        Raises UserError for a row that is wrong (row, column), UnreadableImage when the image file cannot be read.
        """
        row = self.row(i)
        return Sample(
            sample_id=row["sample_id"],
            dataset=row["dataset"],
            task=row["task"],
            image=self._image(row, i),
            score=float(row["score"]),
            rationale=row["rationale"],
            split=row["split"],
            meta=row["meta"],
        )

    def _image(self, row: dict[str, Any], i: int) -> bytes:
        if row["image_bytes"] is not None:
            return row["image_bytes"]
        name = row["image"]
        where = f"{self.path}: row {i}, column image"
        if not name:
            raise UserError(f"{where}: neither a path nor image_bytes")
        root = self.path.parent.resolve()
        # Links inside the directory may lead elsewhere on purpose; `..` and absolute paths in the file may not.
        target = Path(os.path.normpath(root / name))
        if Path(name).is_absolute() or not target.is_relative_to(root):
            raise UserError(f"{where}: {name!r} leads outside the manifest's directory")
        try:
            return target.read_bytes()
        except OSError as e:
            raise UnreadableImage(f"{where}: {name!r}: {e.strerror or e}") from None


def read_manifest(path: str | Path) -> Manifest:
    """Open a manifest and check its index columns.

    Raises:
        UserError: no such file, not Parquet, a column missing or of another type, no image column, and by row: null
            values, a task other than iqa/iaa, a score that is not a number in [0, 100], a repeated sample_id.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such manifest")
    try:
        file = pq.ParquetFile(path)
        found = {f.name: f.type for f in file.schema_arrow}
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path}: not a Parquet file: {str(e).splitlines()[0]}") from None
    with file:
        for name in REQUIRED:
            if name not in found:
                raise UserError(f"{path}: column {name} is missing")
        if "image" not in found and "image_bytes" not in found:
            raise UserError(f"{path}: neither column image nor column image_bytes is there")
        for name in SCHEMA.names:
            if name in found and not _fits(found[name], SCHEMA.field(name).type):
                raise UserError(f"{path}: column {name} is {found[name]}, must be {SCHEMA.field(name).type}")
        sizes = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
        try:
            table = file.read(columns=list(INDEX))
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{path}: damaged Parquet file: {str(e).splitlines()[0]}") from None
    index = _check_rows(path, table)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64) if sizes else np.zeros(1, np.int64)
    return Manifest(path, index, starts, tuple(n for n in SCHEMA.names if n in found))


def _fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_null(found):
        return True
    if pa.types.is_string(wanted):
        return pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_string_view(found)
    if pa.types.is_binary(wanted):
        return pa.types.is_binary(found) or pa.types.is_large_binary(found) or pa.types.is_binary_view(found)
    return pa.types.is_floating(found) or pa.types.is_integer(found)


def _check_rows(path: Path, table: pa.Table) -> _Index:
    columns = {name: table.column(name).to_pylist() for name in INDEX}
    for name, values in columns.items():
        if None in values:
            raise UserError(f"{path}: row {values.index(None)}, column {name}: no value")
    for i, task in enumerate(columns["task"]):
        if task not in TASKS:
            raise UserError(f"{path}: row {i}, column task: {task!r} is neither {TASKS[0]} nor {TASKS[1]}")
    scores = np.asarray(columns["score"], dtype=np.float64)
    bad = ~((scores >= 0) & (scores <= 100))  # true for NaN as well
    if bad.any():
        i = int(np.argmax(bad))
        raise UserError(f"{path}: row {i}, column score: {scores[i]} is not a number from 0 to 100")
    seen: dict[str, int] = {}
    for i, sample_id in enumerate(columns["sample_id"]):
        if sample_id in seen:
            raise UserError(f"{path}: row {i}, column sample_id: {sample_id!r} was used in row {seen[sample_id]}")
        seen[sample_id] = i
    return _Index(columns["sample_id"], columns["dataset"], columns["task"], scores)
