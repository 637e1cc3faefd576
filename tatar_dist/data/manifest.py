"""Manifests: the Parquet files in which all stages read their data. This room reads them; writing.py writes them.

In: a path. Out: a `Manifest`, which knows its pools (pools.py) and gives one `Sample` at a time with its encoded image,
or streams columns a row group at a time; it never holds a list with an entry per row. The image lies in the row itself
(`image_bytes`) or in a file (`image`, relative to the manifest's image root, never outside it). Every fault of a file
is a `UserError` that names file, row and column.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tatar_dist.data.images import UnreadableImage
from tatar_dist.data.orders import WINDOW
from tatar_dist.data.pools import Pool, index_pools
from tatar_dist.errors import UserError
from tatar_dist.records import TASKS, Sample

VERSION = 1
STAMP = b"tatar_dist.manifest"  # the footer's key under which `write_manifest` leaves a `Stamp`
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
# Larger files that bear the stamp of the writer, which checked every row, are not read again as a whole at every start.
TRUSTED_ROWS = 200_000
# Row groups kept once read. Embedded pictures: WINDOW groups at the writer's limit, through which a sampler walks.
CACHE_BYTES = {True: WINDOW * (64 << 20), False: 32 << 20}


@dataclass(frozen=True)
class Stamp:
    """What the writer leaves in the footer. `groups`: checksum of the row groups' sizes, so that a file cut or merged
    by another program does not pass for checked."""

    version: int
    rows: int
    groups: int
    image_root: str | None

    def to_json(self) -> bytes:
        return json.dumps(self.__dict__, sort_keys=True).encode()


def groups_checksum(sizes: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(sizes, "<i8").tobytes())


class Manifest:
    """A checked manifest: `len`, `pools`, `get(i)` for a whole sample, `tables(columns)` for a stream.

    Attributes: `path`; `pools` (its rows by data set, task and split); `image_root` (where image paths start);
    `embedded` (whether images lie in the rows). Pickles (open file and cache stay behind), so that Ray may carry it.
    """

    def __init__(
        self,
        path: Path,
        pools: tuple[Pool, ...],
        group_sizes: Sequence[int],
        columns: tuple[str, ...],
        image_root: Path,
        embedded: bool,
    ) -> None:
        self.path, self.pools, self.image_root, self.embedded = path, pools, image_root, embedded
        self.starts = np.concatenate([[0], np.cumsum(group_sizes)]).astype(np.int64)  # first row of each row group
        self._columns = columns
        self._file: pq.ParquetFile | None = None
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_cache": OrderedDict()}

    def of_split(self, split: str) -> Manifest:
        """The same file with the pools of one split only."""
        view: Manifest = object.__new__(Manifest)
        view.__dict__.update(self.__getstate__())
        view.pools = tuple(p for p in self.pools if p.split == split)
        return view

    def group_of(self, i: int) -> int:
        """The row group that row i lies in."""
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def tables(self, columns: Sequence[str], groups: Sequence[int] | None = None) -> Iterator[tuple[int, pa.Table]]:
        """(first row, columns of one row group) for every group, or for `groups`; absent columns are null."""
        there = [c for c in columns if c in self._columns]
        with pq.ParquetFile(self.path) as file:
            for g in range(file.metadata.num_row_groups) if groups is None else groups:
                table = file.read_row_group(g, columns=there)
                for name in columns:
                    if name not in there:
                        table = table.append_column(name, pa.nulls(table.num_rows, SCHEMA.field(name).type))
                yield int(self.starts[g]), table.select(list(columns))

    def _group(self, g: int) -> pa.Table:
        if g in self._cache:
            self._cache.move_to_end(g)
            return self._cache[g]
        if self._file is None:
            self._file = pq.ParquetFile(self.path)
        table = self._file.read_row_group(g, columns=list(self._columns))
        self._cache[g] = table
        while len(self._cache) > 1 and sum(t.nbytes for t in self._cache.values()) > CACHE_BYTES[self.embedded]:
            self._cache.popitem(last=False)
        return table

    def row(self, i: int) -> dict[str, Any]:
        """All columns of row i as Python values; absent columns are None, `attributes` and `meta` parsed to dicts."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: row {i} of {len(self)}")
        g = self.group_of(i)
        values = self._group(g).slice(i - int(self.starts[g]), 1).to_pylist()[0]
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

    def sample_id(self, i: int) -> str:
        g = self.group_of(i)
        return str(self._group(g).column("sample_id")[i - int(self.starts[g])].as_py())

    def has_rationales(self) -> bool:
        """Whether any row holds one; reads no other column, and no further than the first."""
        texts = (t for _, table in self.tables(["rationale"]) for t in table.column(0).to_pylist())
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
            image=self.image(row, i),
            score=float(row["score"]),
            rationale=row["rationale"],
            split=row["split"],
            meta=row["meta"],
        )

    def image(self, row: dict[str, Any], i: int) -> bytes:
        """The encoded image of row i, whose columns `image` and `image_bytes` are in `row`. Raises like `get`."""
        if row["image_bytes"] is not None:
            return row["image_bytes"]
        name = row["image"]
        where = f"{self.path}: row {i}, column image"
        if not name:
            raise UserError(f"{where}: neither a path nor image_bytes")
        target = image_path(self.image_root, name)
        if target is None:
            raise UserError(f"{where}: {name!r} leads outside {self.image_root}")
        try:
            return target.read_bytes()
        except (OSError, ValueError) as e:  # ValueError: a NUL in the name
            raise UnreadableImage(f"{where}: {name!r}: {getattr(e, 'strerror', None) or e}") from None


def image_path(root: Path, name: str) -> Path | None:
    """The file of an `image` column; None when the name leads outside `root`, by `..` or as an absolute path.

    Links inside may lead elsewhere: the user made those, whereas the name comes with the file.
    """
    target = os.path.normpath(root / name)
    return Path(target) if not os.path.isabs(name) and Path(target).is_relative_to(root) else None


def read_manifest(path: str | Path, image_root: str | Path | None = None, check_all: bool = False) -> Manifest:
    """Open a manifest and check its rows; a large one that bears its writer's stamp by its footer alone.

    Args:
        image_root: where image paths start, instead of what the file says (its own directory, if it says nothing).
        check_all: read and check every row whatever the stamp says.

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
        raise UserError(f"{path}: not a Parquet file, or half of one: {str(e).splitlines()[0]}") from None
    with file:
        check_columns(path, found)
        sizes = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
        stamp = read_stamp(path, file)
        trusted = stamp is not None and (stamp.rows, stamp.groups) == (sum(sizes), groups_checksum(sizes))
        try:
            if check_all or not trusted or sum(sizes) <= TRUSTED_ROWS:
                _check_rows(path, file)
            pools = index_pools(file)
            embedded = _is_embedded(file)
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{path}: damaged Parquet file: {str(e).splitlines()[0]}") from None
    for pool in pools:
        _check_values(path, pool.runs[0, 0], pool.task, pool.score_min, pool.score_max)
    root = Path(image_root) if image_root else path.parent / ((stamp and stamp.image_root) or "")
    columns = tuple(n for n in SCHEMA.names if n in found)
    return Manifest(path, pools, sizes, columns, Path(os.path.abspath(root)), embedded)


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


def _is_embedded(file: pq.ParquetFile) -> bool:
    """Whether the first row holds its image."""
    if "image_bytes" not in file.schema_arrow.names or not file.metadata.num_rows:
        return False
    column = file.schema_arrow.names.index("image_bytes")
    statistics = file.metadata.row_group(0).column(column).statistics
    if statistics is not None and statistics.has_null_count:
        return statistics.null_count < file.metadata.row_group(0).num_rows
    return next(file.iter_batches(1, columns=["image_bytes"])).column(0)[0].is_valid


def check_columns(path: Path, found: dict[str, pa.DataType]) -> None:
    for name in REQUIRED:
        if name not in found:
            raise UserError(f"{path}: column {name} is missing")
    if "image" not in found and "image_bytes" not in found:
        raise UserError(f"{path}: neither column image nor column image_bytes is there")
    for name in SCHEMA.names:
        if name in found and not _fits(found[name], SCHEMA.field(name).type):
            raise UserError(f"{path}: column {name} is {found[name]}, must be {SCHEMA.field(name).type}")


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


def _check_values(path: Path, row: int, task: str, low: float, high: float) -> None:
    if task not in TASKS:
        raise UserError(f"{path}: row {row}, column task: {task!r} is neither {TASKS[0]} nor {TASKS[1]}")
    if not 0 <= low <= high <= 100:
        bad = high if high > 100 else low
        raise UserError(f"{path}: data set at row {row}, column score: {bad} is not a number from 0 to 100")


def _check_rows(path: Path, file: pq.ParquetFile) -> None:
    """Every row's index columns, a row group at a time; then that no sample_id comes twice."""
    ids = IdCheck()
    first = 0
    for g in range(file.metadata.num_row_groups):
        check_table(path, first, file.read_row_group(g, columns=list(REQUIRED)), ids)
        first += file.metadata.row_group(g).num_rows
    repeat = ids.first_repeat(partial(_all_ids, file))
    if repeat is not None:
        name, row, before = repeat
        raise UserError(f"{path}: row {row}, column sample_id: {name!r} was used in row {before}")


def _all_ids(file: pq.ParquetFile) -> Iterator[str]:
    return (i for batch in file.iter_batches(columns=["sample_id"]) for i in batch.column(0).to_pylist())


def check_table(path: Path, first: int, table: pa.Table, ids: IdCheck) -> None:
    """Check rows `first` ... of a manifest and note their sample ids. Raises UserError naming row and column."""
    for name in REQUIRED:
        column = table.column(name)
        if column.null_count:
            row = first + pc.index(column.is_null(), True).as_py()
            raise UserError(f"{path}: row {row}, column {name}: no value")
    tasks = table.column("task").cast(pa.string())
    wrong = pc.invert(pc.is_in(tasks, value_set=pa.array(TASKS)))
    if pc.any(wrong).as_py():
        i = pc.index(wrong, True).as_py()
        _check_values(path, first + i, tasks[i].as_py(), 0, 0)
    scores = table.column("score").cast(pa.float64()).to_numpy()
    bad = ~((scores >= 0) & (scores <= 100))  # true for NaN as well
    if bad.any():
        i = int(np.argmax(bad))
        raise UserError(f"{path}: row {first + i}, column score: {scores[i]} is not a number from 0 to 100")
    ids.add(table.column("sample_id").to_pylist())


class IdCheck:
    """Finds a repeated id among millions: eight bytes each, and a second look only at what may be one."""

    def __init__(self) -> None:
        self._hashes: list[np.ndarray] = []

    def add(self, ids: Sequence[str]) -> None:
        self._hashes.append(np.fromiter(map(hash, ids), np.int64, len(ids)))

    def first_repeat(self, again: Callable[[], Iterable[str]]) -> tuple[str, int, int] | None:
        """(id, its row, the earlier row) of the first id that comes twice; `again()` gives all ids once more."""
        hashes = np.sort(np.concatenate(self._hashes or [np.zeros(0, np.int64)]))
        suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        if not suspects:
            return None
        seen: dict[str, int] = {}
        for row, name in enumerate(again()):
            if hash(name) in suspects and seen.setdefault(name, row) != row:
                return name, row, seen[name]
        return None
