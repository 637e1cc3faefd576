"""Index a manifest's rows by data set, task and split, without a stored value per row.

`index_pools` reads an open Parquet file into one `Pool` per (data set, task, split), as runs of rows. Row-group
statistics are trusted, since they are computed from the values written; only groups that mix pools or lack them are
read. So the index of ten million rows from `write_manifest` (a pool per row group) comes from the footer alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

KEYS = ("dataset", "task", "split")
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Pool:
    """Rows of one data set, task, split. `runs` (k, 2) int64: first row, count; sorted, apart."""

    dataset: str
    task: str
    split: str
    runs: np.ndarray
    score_min: float
    score_max: float

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.runs[:, 1])

    @property
    def rows(self) -> int:
        return int(self._ends[-1])

    def row(self, position: int) -> int:
        """Return the manifest row of the pool's `position`-th row, 0 <= position < rows."""
        k = int(np.searchsorted(self._ends, position, side="right"))
        first, count = self.runs[k]
        return int(first + position - (self._ends[k] - count))

    def rows_before(self, rows: np.ndarray) -> np.ndarray:
        """Return (n,) counts of the pool's rows before each of `rows` (n,) int64 of the manifest."""
        k = np.searchsorted(self.runs[:, 0], rows, side="right") - 1
        within = np.minimum(rows - self.runs[k, 0], self.runs[k, 1])
        return np.where(k < 0, 0, self._ends[k] - self.runs[k, 1] + within)

    def __contains__(self, row: object) -> bool:
        assert isinstance(row, int)
        k = int(np.searchsorted(self.runs[:, 0], row, side="right")) - 1
        return k >= 0 and row < int(self.runs[k].sum())

    def __iter__(self) -> Iterator[int]:
        return (row for first, count in self.runs.tolist() for row in range(first, first + count))


_Part = tuple[Key, np.ndarray, float, float]  # key, runs (k, 2), lowest and highest score


def index_pools(file: pq.ParquetFile) -> tuple[Pool, ...]:
    """Return a manifest's pools by first row. A null key becomes "", rejected by read_manifest."""
    names = file.schema_arrow.names
    column = {name: names.index(name) for name in (*KEYS, "score")}
    parts_of: dict[Key, list[_Part]] = {}
    first = 0
    for g in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(g)
        for key, runs, low, high in _by_statistics(group, column) or _by_reading(file, g):
            parts_of.setdefault(key, []).append((key, runs + np.array([first, 0]), low, high))
        first += group.num_rows
    return tuple(sorted(map(_pool, parts_of.values()), key=lambda pool: int(pool.runs[0, 0])))


def _pool(parts: list[_Part]) -> Pool:
    """Join the parts of a pool, given in ascending row order; adjacent runs are merged."""
    dataset, task, split = parts[0][0]
    rows = np.concatenate([runs for _, runs, _, _ in parts])
    first, last = rows[:, 0], rows.sum(axis=1)
    starts = np.flatnonzero(np.r_[True, first[1:] != last[:-1]])
    ends = np.r_[starts[1:], len(rows)] - 1
    joined = np.stack([first[starts], last[ends] - first[starts]], axis=1)
    low, high = min(low for *_, low, _ in parts), max(high for *_, high in parts)
    return Pool(dataset, task, split, joined, low, high)


def _by_statistics(group: Any, column: dict[str, int]) -> list[_Part] | None:
    """Return the part of a row group that its statistics show to be of a single pool, else None."""
    values = []
    for name in KEYS:
        keys = group.column(column[name]).statistics
        if keys is None or not keys.has_min_max or keys.null_count or keys.min != keys.max:
            return None
        values.append(str(keys.min))
    score = group.column(column["score"]).statistics
    if score is None or not score.has_min_max:
        return None
    run = np.array([[0, group.num_rows]], np.int64)
    return [((values[0], values[1], values[2]), run, float(score.min), float(score.max))]


def _by_reading(file: pq.ParquetFile, g: int) -> list[_Part]:
    """Read the parts of a row group that holds several pools or has no statistics."""
    table = file.read_row_group(g, columns=[*KEYS, "score"])
    columns = (pc.fill_null(table.column(name).cast(pa.string()), "").to_pylist() for name in KEYS)
    rows_of: dict[Key, list[int]] = defaultdict(list)
    for row, key in enumerate(zip(*columns, strict=True)):
        rows_of[key].append(row)
    scores = table.column("score").cast(pa.float64(), safe=False).to_numpy()
    parts: list[_Part] = []
    for key, rows in rows_of.items():
        starts = np.flatnonzero(np.diff(rows, prepend=-2) > 1)
        runs = np.stack([np.take(rows, starts), np.diff(starts, append=len(rows))], axis=1)
        parts.append((key, runs, float(np.fmin.reduce(scores[rows])), float(np.fmax.reduce(scores[rows]))))
    return parts
