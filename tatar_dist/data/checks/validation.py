"""State and result of `data validate`, and the reading of a manifest as a stream.

Unlike `read_manifest`, which rejects a manifest at its first invalid row, this reads on, to report all faults at once.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tatar_dist.data.checks import duplicates
from tatar_dist.data.checks.problem_log import WARNINGS, ProblemLog
from tatar_dist.data.checks.rows import Key, PoolFacts
from tatar_dist.data.manifest import existing, stamped_root
from tatar_dist.data.rules import check_columns
from tatar_dist.data.schema import SCHEMA, read_stamp
from tatar_dist.errors import UserError

BATCH_BYTES, BATCH_ROWS = 8 << 20, 128


@dataclass
class Checked:
    """Findings in one manifest. `first`: index of its first row among the rows of all manifests."""

    path: Path
    root: Path
    rows: int
    first: int
    log: ProblemLog
    pools: dict[int, PoolFacts] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # width, height
    files: int = 0  # rows whose picture is a file
    absent: int = 0  # of those, the files that cannot be read

    def place(self, suffix: str) -> Path:
        """Return the path of the report file with this suffix, beside the problem log."""
        return self.log.path.with_name(f"{self.path.stem}.{suffix}")


@dataclass
class ValidationRows:
    """Arrays over the rows of all manifests: hashes of pictures, ids and references (0: none), pool, usability."""

    picture: np.ndarray  # (n, 2) uint64
    ident: np.ndarray  # (n,) int64
    reference: np.ndarray  # (n,) int64
    pool: np.ndarray  # (n,) int32, a place in `pools`
    unusable: np.ndarray  # (n,) bool
    pools: list[Key] = field(default_factory=list)

    @classmethod
    def of(cls, n: int) -> ValidationRows:
        ident, reference = np.zeros(n, np.int64), np.zeros(n, np.int64)
        return cls(np.zeros((n, 2), np.uint64), ident, reference, np.zeros(n, np.int32), np.zeros(n, bool))


@dataclass
class Validation:
    """Result of a validation. `fate` (rows,) uint8: see duplicates.fates."""

    manifests: list[Checked]
    fate: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.fate)

    @property
    def unusable(self) -> int:
        return int((self.fate == duplicates.UNUSABLE).sum())

    @property
    def leaking(self) -> int:
        return int((self.fate == duplicates.LEAKED).sum())

    @property
    def warnings(self) -> int:
        return sum(n for m in self.manifests for code, n, _ in m.log.in_order() if code in WARNINGS)

    @property
    def ok(self) -> bool:
        return not self.unusable and not self.leaking and not self.without_rows

    @property
    def without_rows(self) -> list[Path]:
        return [m.path for m in self.manifests if not m.rows]

    def fate_of(self, manifest: Checked) -> np.ndarray:
        return self.fate[manifest.first : manifest.first + manifest.rows]


def open_source(path: Path, images: Path | None = None) -> tuple[pq.ParquetFile, Path]:
    """Open a manifest. Returns the file and its image root, which is `images` if given, else the stored one.

    Raises UserError for a file that is not a manifest; no row is read.
    """
    try:
        existing(path)
        # Read in pieces: a row group of another program's file may be larger than memory.
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path}: not a whole Parquet file: {str(e).splitlines()[0]}") from None
    check_columns(path, schema)
    root = stamped_root(path, read_stamp(path, file))
    return file, Path(os.path.abspath(images)) if images else root


def batches(file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield tables of SCHEMA's types in file order, at most BATCH_ROWS rows and about BATCH_BYTES; absent is null."""
    there = [n for n in columns if n in file.schema_arrow.names]
    for g in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(g)
        each = group.total_byte_size / max(1, group.num_rows) if "image_bytes" in there else 1
        size = int(np.clip(BATCH_BYTES / max(1.0, each), 1, BATCH_ROWS))
        for batch in file.iter_batches(size, row_groups=[g], columns=there, use_threads=False):
            made = {}
            for name in columns:
                kind = SCHEMA.field(name).type
                # unsafe: a whole number beyond 2**53 is a wrong score, not a damaged file
                safe = not pa.types.is_floating(kind)
                made[name] = batch.column(name).cast(kind, safe=safe) if name in there else pa.nulls(len(batch), kind)
            yield pa.table(made)


def columns_of(checked: Sequence[Checked], names: Sequence[str]) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Yield (first row among all manifests, columns as lists) of every batch, reading the files again."""
    for manifest in checked:
        file, _ = open_source(manifest.path)
        start = manifest.first
        with file:
            for table in batches(file, names):
                yield start, {n: values_of(table.column(n))[0] for n in names}
                start += len(table)


def values_of(column: pa.ChunkedArray) -> tuple[list[Any], list[int]]:
    """Return a column's values and the positions of texts that are not UTF-8, whose wrong bytes become escapes."""
    try:
        return column.to_pylist(), []
    except UnicodeDecodeError:
        values, wrong = column.cast(pa.binary()).to_pylist(), []
    for i, raw in enumerate(values):
        if raw is not None:
            values[i] = raw.decode(errors="backslashreplace")
            if values[i].encode() != raw:
                wrong.append(i)
    return values, wrong
