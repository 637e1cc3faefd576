"""Write a manifest from rows or Arrow tables: one Parquet file, complete or not at all.

A row group holds one pool (data set, task, split), so that a reader finds its pools in the footer. It has at most
`GROUP_ROWS` rows (`EMBEDDED_ROWS` with embedded images) and about `GROUP_BYTES` bytes, the cost of reading one random
row. Memory: one unfinished group per pool, and eight bytes per row to find repeated ids.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tatar_dist.data.manifest import GROUP_BYTES
from tatar_dist.data.pools import KEYS, Key
from tatar_dist.data.schema import SCHEMA, STAMP, VERSION, IdCheck, Stamp, check_table, groups_checksum, stored_ids
from tatar_dist.errors import UserError
from tatar_dist.run.files import sync, written_whole

GROUP_ROWS = 2048  # 10 million rows: a footer of 6 MB, read in 0.1 s; a row costs a millisecond or two
EMBEDDED_ROWS = 256
BATCH, BATCH_BYTES = 1024, 16 << 20  # dict rows that become one table


class ManifestWriter:
    """Writes tables of SCHEMA's columns, pools in any order; made by `manifest_writer`."""

    def __init__(self, path: Path, file: pq.ParquetWriter) -> None:
        self.path = path
        self.rows = 0
        self._file = file
        self._ids = IdCheck()
        self._sizes: list[int] = []
        self._waiting: dict[Key, pa.Table] = {}

    def write(self, table: pa.Table) -> None:
        """Add rows. Absent columns are null."""
        if unknown := sorted(set(table.column_names) - set(SCHEMA.names)):
            raise KeyError(f"{self.path}: no manifest column {unknown}")
        columns = {
            f.name: table.column(f.name).cast(f.type) if f.name in table.column_names else pa.nulls(len(table), f.type)
            for f in SCHEMA
        }
        table = pa.table(columns, schema=SCHEMA)
        check_table(self.path, self.rows, table, self._ids)
        self.rows += len(table)
        for key, part in _by_pool(table):
            waiting = pa.concat_tables([self._waiting[key], part]) if key in self._waiting else part
            while size := self._full_group(waiting):
                self._flush(waiting.slice(0, size))
                waiting = waiting.slice(size)
            self._waiting[key] = waiting

    def _full_group(self, table: pa.Table) -> int:
        """Return the row count of the first group that `table` fills, or 0 if it fills none yet."""
        embedded = table.column("image_bytes").null_count < len(table)
        limit = EMBEDDED_ROWS if embedded else GROUP_ROWS
        if table.nbytes >= GROUP_BYTES:
            sizes = pc.fill_null(pc.binary_length(table.column("image_bytes")), 0)
            for name in ("rationale", "attributes", "meta"):
                sizes = pc.add(sizes, pc.fill_null(pc.binary_length(table.column(name)), 0))
            within = pc.sum(pc.less(pc.cumulative_sum(sizes.cast(pa.int64())), GROUP_BYTES)).as_py()
            if within < len(table):
                limit = min(limit, max(1, within))
        return limit if len(table) >= limit else 0

    def _flush(self, table: pa.Table) -> None:
        self._file.write_table(table, row_group_size=len(table))
        self._sizes.append(len(table))

    def finish(self, image_root: str | None) -> None:
        """Write the groups that are not full, and the stamp."""
        for table in self._waiting.values():
            if len(table):
                self._flush(table)
        stamp = Stamp(VERSION, self.rows, groups_checksum(self._sizes), image_root)
        self._file.add_key_value_metadata({STAMP.decode(): json.dumps(asdict(stamp), sort_keys=True)})

    def check_ids(self, written: Path) -> None:
        """Raise UserError for a sample id that is twice in the finished file."""
        with pq.ParquetFile(written) as file:
            for name, *_ in self._ids.repeats(stored_ids(file)):
                raise UserError(f"{self.path}: column sample_id: {name!r} comes twice; nothing was written")


@contextmanager
def manifest_writer(path: str | Path, image_root: str | Path | None = None) -> Iterator[ManifestWriter]:
    """Yield a writer; the file appears, complete, when the block ends without an error.

    image_root: directory that `image` paths are relative to; None: the manifest's own.
    Raises UserError for a row that `read_manifest` would reject, KeyError for a column that is not in SCHEMA.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Pictures are compressed already: only the text columns profit from zstd.
    compression = {n: "none" if n == "image_bytes" else "zstd" for n in SCHEMA.names}
    with written_whole(path) as place:
        with pq.ParquetWriter(place, SCHEMA, compression=compression) as file:
            writer = ManifestWriter(path, file)
            yield writer
            writer.finish(_relative_root(path, image_root))
        writer.check_ids(place)
        sync(place)


def _relative_root(path: Path, image_root: str | Path | None) -> str | None:
    """Return the stamp's image root, relative to the manifest, by resolved paths if not below."""
    if image_root is None:
        return None
    root, home = os.path.abspath(image_root), os.path.abspath(path.parent)
    if Path(root).is_relative_to(home):
        return os.path.relpath(root, home)
    return os.path.relpath(os.path.realpath(root), os.path.realpath(home))


def _by_pool(table: pa.Table) -> Iterator[tuple[Key, pa.Table]]:
    """Split the table into (pool, its rows), keeping the order of rows."""
    for values in table.select(KEYS).group_by(list(KEYS), use_threads=False).aggregate([]).to_pylist():
        of_pool = reduce(pc.and_, (pc.equal(table[name], values[name]) for name in KEYS))
        yield (values["dataset"], values["task"], values["split"]), table.filter(of_pool)


def write_table(path: str | Path, table: pa.Table, image_root: str | Path | None = None) -> int:
    """Write a manifest from a table. Returns the number of rows; raises like `manifest_writer`."""
    with manifest_writer(path, image_root) as writer:
        for start in range(0, len(table), 64 * BATCH):
            writer.write(table.slice(start, 64 * BATCH))
    return writer.rows


def write_manifest(path: str | Path, rows: Iterable[Mapping[str, Any]], image_root: str | Path | None = None) -> int:
    """Write a manifest from dicts of SCHEMA's columns.

    Absent columns are null; `attributes` and `meta` may be dicts. Returns the row count; raises as `manifest_writer`.
    """
    with manifest_writer(path, image_root) as writer:
        pending: list[Mapping[str, Any]] = []
        size = 0
        for row in rows:
            if unknown := sorted(set(row) - set(SCHEMA.names)):
                raise KeyError(f"{path}: no manifest column {unknown}")
            objects = {k: json.dumps(v, ensure_ascii=False) for k, v in row.items() if isinstance(v, dict)}
            pending.append({**row, **objects})
            size += len(row.get("image_bytes") or b"")
            if len(pending) == BATCH or size >= BATCH_BYTES:
                writer.write(pa.Table.from_pylist(pending, SCHEMA))
                pending, size = [], 0
        writer.write(pa.Table.from_pylist(pending, SCHEMA))
    return writer.rows
