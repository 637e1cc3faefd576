"""Write a manifest from rows or Arrow tables: one Parquet file, complete or not at all.

A row group holds one pool (data set, task, split), so that a reader finds its pools in the footer. It has at most
`GROUP_ROWS` rows (`EMBEDDED_ROWS` with embedded images) and about `GROUP_BYTES` bytes, the cost of reading one random
row. Memory: one unfinished group per pool, and eight bytes per row to find repeated ids.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tatar_dist.data.manifest import GROUP_BYTES
from tatar_dist.data.pools import KEYS, Key
from tatar_dist.data.schema import SCHEMA, STAMP, VERSION, IdCheck, Stamp, check_table, groups_checksum, stored_ids
from tatar_dist.errors import UserError
from tatar_dist.run.files import beside

GROUP_ROWS = 2048  # 10 million rows: a footer of 6 MB, read in 0.1 s; a row costs a millisecond or two
EMBEDDED_ROWS = 256
BATCH, BATCH_BYTES = 1024, 16 << 20  # dict rows that become one table


class ManifestWriter:
    """Context manager that writes tables of SCHEMA's columns, pools in any order. The file appears once complete.

    Args:
        path: manifest to write.
        image_root: directory that `image` paths are relative to; None: the manifest's own.

    Raises:
        UserError: a row that `read_manifest` would reject.
        KeyError: a column that is not in SCHEMA.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None, group_rows: int | None = None) -> None:
        self.path = Path(path)
        self._root = image_root
        self._limit = group_rows
        self._ids = IdCheck()
        self._sizes: list[int] = []
        self._waiting: dict[Key, list[pa.Table]] = {}
        self.rows = 0

    def __enter__(self) -> ManifestWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._beside = beside(self.path)
        # Pictures are compressed already: only the text columns profit from zstd.
        compression = {n: "none" if n == "image_bytes" else "zstd" for n in SCHEMA.names}
        self._writer = pq.ParquetWriter(self._beside, SCHEMA, compression=compression)
        return self

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
            waiting = self._waiting.setdefault(key, [])
            waiting.append(part)
            held = pa.concat_tables(waiting)
            while size := self._full_group(held):
                self._flush(held.slice(0, size))
                held = held.slice(size)
            self._waiting[key] = [held]

    def _full_group(self, table: pa.Table) -> int:
        """Return the number of rows in the first group that `table` fills, or 0 if it fills none yet."""
        embedded = table.column("image_bytes").null_count < len(table)
        limit = self._limit or (EMBEDDED_ROWS if embedded else GROUP_ROWS)
        if table.nbytes >= GROUP_BYTES:
            sizes = pc.fill_null(pc.binary_length(table.column("image_bytes")), 0)
            for name in ("rationale", "attributes", "meta"):
                sizes = pc.add(sizes, pc.fill_null(pc.binary_length(table.column(name)), 0))
            within = pc.sum(pc.less(pc.cumulative_sum(sizes.cast(pa.int64())), GROUP_BYTES)).as_py()
            if within < len(table):
                limit = min(limit, max(1, within))
        return limit if len(table) >= limit else 0

    def _flush(self, table: pa.Table) -> None:
        self._writer.write_table(table, row_group_size=len(table))
        self._sizes.append(len(table))

    def _finish(self) -> None:
        for tables in self._waiting.values():
            rest = pa.concat_tables(tables)
            if len(rest):
                self._flush(rest)
        stamp = Stamp(VERSION, self.rows, groups_checksum(self._sizes), self._relative_root())
        self._writer.add_key_value_metadata({STAMP.decode(): stamp.to_json().decode()})
        self._writer.close()
        self._check_ids()
        with self._beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self._beside, self.path)

    def _relative_root(self) -> str | None:
        """Return the image root for the stamp: relative to the manifest if below it, else between resolved paths."""
        if self._root is None:
            return None
        root, home = os.path.abspath(self._root), os.path.abspath(self.path.parent)
        if Path(root).is_relative_to(home):
            return os.path.relpath(root, home)
        return os.path.relpath(os.path.realpath(root), os.path.realpath(home))

    def _check_ids(self) -> None:
        with pq.ParquetFile(self._beside) as file:
            for name, *_ in self._ids.repeats(stored_ids(file)):
                raise UserError(f"{self.path}: column sample_id: {name!r} comes twice; nothing was written")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._writer.close()
            self._beside.unlink(missing_ok=True)


def _by_pool(table: pa.Table) -> Iterator[tuple[Key, pa.Table]]:
    """Split the table into (pool, its rows), keeping the order of rows."""
    groups = table.select(KEYS).group_by(list(KEYS), use_threads=False).aggregate([]).to_pylist()
    if len(groups) == 1:
        yield (groups[0]["dataset"], groups[0]["task"], groups[0]["split"]), table
        return
    for g in groups:
        mask = pc.and_(
            pc.and_(pc.equal(table["dataset"], g["dataset"]), pc.equal(table["task"], g["task"])),
            pc.equal(table["split"], g["split"]),
        )
        yield (g["dataset"], g["task"], g["split"]), table.filter(mask)


def write_table(path: str | Path, table: pa.Table, image_root: str | Path | None = None) -> int:
    """Write a manifest from one table. Returns the number of rows; raises like `ManifestWriter`."""
    with ManifestWriter(path, image_root) as writer:
        for start in range(0, len(table), 64 * BATCH):
            writer.write(table.slice(start, 64 * BATCH))
    return writer.rows


def write_manifest(
    path: str | Path,
    rows: Iterable[Mapping[str, Any]],
    image_root: str | Path | None = None,
    group_rows: int | None = None,
) -> int:
    """Write a manifest from dicts of SCHEMA's columns. Absent ones are null; `attributes` and `meta` may be dicts.

    Returns the number of rows; raises like `ManifestWriter`.
    """
    names = set(SCHEMA.names)
    with ManifestWriter(path, image_root, group_rows) as writer:
        pending: list[Mapping[str, Any]] = []
        size = 0
        for row in rows:
            if unknown := sorted(set(row) - names):
                raise KeyError(f"{path}: no manifest column {unknown}")
            objects = {k: v for k, v in row.items() if isinstance(v, dict)}
            pending.append({**row, **{k: json.dumps(v, ensure_ascii=False) for k, v in objects.items()}})
            size += len(row.get("image_bytes") or b"")
            if len(pending) == BATCH or size >= BATCH_BYTES:
                writer.write(_table(pending))
                pending, size = [], 0
        if pending:
            writer.write(_table(pending))
    return writer.rows


def _table(rows: list[Mapping[str, Any]]) -> pa.Table:
    return pa.table({n: [r.get(n) for r in rows] for n in SCHEMA.names}, schema=SCHEMA)
