"""Read manifests, the Parquet files with the data of all stages; writing.py writes them.

`read_manifest` takes a path and returns a `Manifest`. It lists pools (pools.py), returns one `Sample` at a time with
its encoded image, or streams columns by row group, without a list entry per row. The image is in the row
(`image_bytes`) or in a file (`image`, relative to the manifest's image root, never outside it). Faults of a manifest
raise `UserError` naming file, row and column; an image file that cannot be read raises `UnreadableImage`.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tatar_dist.assets import looked_in
from tatar_dist.data.images import UnreadableImage
from tatar_dist.data.pools import Pool, index_pools
from tatar_dist.data.schema import (
    REQUIRED,
    SCHEMA,
    IdCheck,
    Stamp,
    check_columns,
    check_pool,
    check_table,
    groups_checksum,
    json_object,
    read_stamp,
    stored_ids,
)
from tatar_dist.errors import UserError
from tatar_dist.types import Sample

# Larger files with the writer's stamp are not read as a whole at every start: the writer checked every row.
TRUSTED_ROWS = 200_000
WINDOW = 8  # row groups whose rows are mixed; a reader caches as many
# Cache of row groups: with embedded images WINDOW groups of every pool, which a sampler visits together.
GROUP_BYTES = 16 << 20  # of a group, as the writer makes them
CACHE_BYTES = 32 << 20  # of groups without pictures


@dataclass(eq=False)
class Manifest:
    """A checked manifest: `len`, `pools`, `get(i)` for a sample, `tables(columns)` for a stream.

    Pickles without its open file and cache, so that Ray can send it.
    """

    path: Path
    pools: tuple[Pool, ...]  # rows by data set, task and split
    starts: np.ndarray  # (groups + 1,) int64: first row of each row group, and the number of rows
    columns: tuple[str, ...]  # of SCHEMA, in the file
    image_root: Path  # base of image paths
    embedded: bool  # whether images are in the rows
    fingerprint: str  # of the footer; equal for equal files
    _file: pq.ParquetFile | None = field(default=None, init=False)
    _cache: OrderedDict[int, pa.Table] = field(default_factory=OrderedDict, init=False)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None, "_cache": OrderedDict()}

    def of_split(self, split: str) -> Manifest:
        """Return a view of the same file with the pools of one split only."""
        return replace(self, pools=tuple(p for p in self.pools if p.split == split))

    def tables(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        """Yield (first row, columns of one row group) for every group; absent columns are null."""
        there = [c for c in columns if c in self.columns]
        with pq.ParquetFile(self.path) as file:
            for g in range(file.metadata.num_row_groups):
                table = file.read_row_group(g, columns=there)
                for name in columns:
                    if name not in there:
                        table = table.append_column(name, pa.nulls(table.num_rows, SCHEMA.field(name).type))
                yield int(self.starts[g]), table.select(list(columns))

    def _row(self, i: int) -> pa.Table:
        """Return a table of row i alone, from its row group, which is cached."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path}: row {i} of {len(self)}")
        g = int(np.searchsorted(self.starts, i, side="right")) - 1
        if g in self._cache:
            self._cache.move_to_end(g)
        else:
            if self._file is None:
                self._file = pq.ParquetFile(self.path)
            self._cache[g] = self._file.read_row_group(g, columns=list(self.columns))
            most = (WINDOW + 1) * GROUP_BYTES * len(self.pools) if self.embedded else CACHE_BYTES
            while len(self._cache) > 1 and sum(t.nbytes for t in self._cache.values()) > most:
                self._cache.popitem(last=False)
        return self._cache[g].slice(i - int(self.starts[g]), 1)

    def row(self, i: int) -> dict[str, Any]:
        """Return all columns of row i: absent ones None, `attributes` and `meta` parsed to dicts."""
        try:
            values = self._row(i).to_pylist()[0]
        except UnicodeDecodeError:
            raise UserError(f"{self.path}: row {i}: a text column is not UTF-8") from None
        row = {name: values.get(name) for name in SCHEMA.names}
        for name in ("attributes", "meta"):
            try:
                row[name] = json_object(row[name]) if row[name] else {}
            except ValueError as e:
                raise UserError(f"{self.path}: row {i}, column {name}: {e}") from None
        return row

    def sample_id(self, i: int) -> str:
        return str(self._row(i).column("sample_id")[0].as_py())

    def get(self, i: int) -> Sample:
        """Return row i with encoded image. Raises UserError; UnreadableImage for an unreadable file."""
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
            score_std=row["score_std"],
        )

    def image(self, row: dict[str, Any], i: int) -> bytes:
        """Return row i's encoded image from `image` or `image_bytes` of `row`. Raises like `get`."""
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
            return file_bytes(target)
        except (OSError, ValueError) as e:  # ValueError: a NUL in the name
            raise UnreadableImage(f"{where}: {name!r}: {getattr(e, 'strerror', None) or e}") from None


def image_path(root: Path, name: str) -> Path | None:
    """Return the file of an `image` column; None if the name leaves `root` (`..` or absolute).

    Links inside may lead elsewhere: the user made those, whereas the name comes with the file.
    """
    target = os.path.normpath(root / name)
    return Path(target) if not os.path.isabs(name) and Path(target).is_relative_to(root) else None


def file_bytes(path: Path) -> bytes:
    """Read a regular file. Raises OSError for anything else: reading a pipe would wait for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    return path.read_bytes()


def existing(path: str | Path) -> Path:
    """Return `path` if a file is there. Raises UserError naming the directory that was searched."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such manifest{looked_in(path)}")
    return Path(path)


def read_manifest(path: str | Path, image_root: str | Path | None = None) -> Manifest:
    """Open and check a manifest: its rows, or the footer alone if large and writer-stamped.

    image_root: base of image paths, instead of the one in the file (its own directory, if it has none).
    Raises UserError: no such file, not Parquet, a column missing or of another type, no image column, and by row: null
    values, a task other than iqa/iaa, a score that is not a number in [0, 100], a repeated sample_id.
    """
    path = Path(path)
    file, stamp, root = open_parquet(path, image_root)
    with file:
        sizes = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
        trusted = stamp is not None and (stamp.rows, stamp.groups) == (sum(sizes), groups_checksum(sizes))
        try:
            if not trusted or sum(sizes) <= TRUSTED_ROWS:
                _check_rows(path, file)
            pools = index_pools(file)
            embedded = _is_embedded(file)
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{path}: damaged Parquet file: {str(e).splitlines()[0]}") from None
    for pool in pools:
        check_pool(path, pool)
    starts = np.cumsum([0, *sizes])
    columns = tuple(n for n in SCHEMA.names if n in file.schema_arrow.names)
    return Manifest(path, pools, starts, columns, root, embedded, _fingerprint(file))


def open_parquet(path: Path, image_root: str | Path | None = None) -> tuple[pq.ParquetFile, Stamp | None, Path]:
    """Open a manifest, reading no row. Returns (file, writer's stamp or None, image base).

    The base is `image_root`, else the stamp's, from the resolved file, else the manifest's directory.
    Raises UserError for a file that is not a manifest.
    """
    existing(path)
    try:
        # not a whole row group at once: that of another program's file may be larger than memory
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path}: not a Parquet file, or half of one: {str(e).splitlines()[0]}") from None
    check_columns(path, schema)
    stamp = read_stamp(path, file)
    if image_root is None and stamp is not None and stamp.image_root is not None:
        return file, stamp, Path(os.path.normpath(Path(os.path.realpath(path)).parent / stamp.image_root))
    return file, stamp, Path(os.path.abspath(image_root or path.parent))


def _fingerprint(file: pq.ParquetFile) -> str:
    """Hash the footer: row groups with their sizes and the range of their ids."""
    digest = hashlib.blake2b(digest_size=12)
    ids = file.schema_arrow.names.index("sample_id")
    for g in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(g)
        statistics = group.column(ids).statistics
        ends = (statistics.min, statistics.max) if statistics is not None and statistics.has_min_max else ()
        digest.update(repr((group.num_rows, group.total_byte_size, *ends)).encode())
    return digest.hexdigest()


def _is_embedded(file: pq.ParquetFile) -> bool:
    """Return whether the first row group has image bytes; without statistics, the first row."""
    if "image_bytes" not in file.schema_arrow.names or not file.metadata.num_rows:
        return False
    column = file.schema_arrow.names.index("image_bytes")
    statistics = file.metadata.row_group(0).column(column).statistics
    if statistics is not None and statistics.has_null_count:
        return statistics.null_count < file.metadata.row_group(0).num_rows
    return next(file.iter_batches(1, columns=["image_bytes"])).column(0)[0].is_valid


def _check_rows(path: Path, file: pq.ParquetFile) -> None:
    """Check the required columns of every row, by row group; then that no sample_id is repeated."""
    ids, first = IdCheck(), 0
    for g in range(file.metadata.num_row_groups):
        table = file.read_row_group(g, columns=list(REQUIRED))
        check_table(path, first, table, ids)
        first += len(table)
    for name, row, before in ids.repeats(stored_ids(file)):
        raise UserError(f"{path}: row {row}, column sample_id: {name!r} was used in row {before}")
