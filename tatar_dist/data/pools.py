"""Index a manifest's rows by data set, task and split, without a stored value per row.

`index_pools` reads an open Parquet file into one `Pool` per (data set, task, split), as runs of rows. Row-group
statistics are trusted, since they are computed from the values written; only groups that mix pools or lack them are
read. So the index of ten million rows from `write_manifest` (a pool per row group) comes from the footer alone.
"""

from __future__ import annotations

import math
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
    """All rows of one data set, task and split. `runs` (k, 2) int64: first row, row count; ascending, not adjacent."""

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
        """Return (n,) counts of the pool's rows that precede each of `rows` (n,) int64 of the manifest."""
        k = np.searchsorted(self.runs[:, 0], rows, side="right") - 1
        within = np.minimum(rows - self.runs[k, 0], self.runs[k, 1])
        return np.where(k < 0, 0, self._ends[k] - self.runs[k, 1] + within)

    def __contains__(self, row: object) -> bool:
        assert isinstance(row, int)
        k = int(np.searchsorted(self.runs[:, 0], row, side="right")) - 1
        return k >= 0 and row < int(self.runs[k].sum())

    def __iter__(self) -> Iterator[int]:
        return (row for first, count in self.runs.tolist() for row in range(first, first + count))


@dataclass
class _Gathered:
    """Parts of a pool collected so far: arrays of runs, lowest and highest score."""

    runs: list[np.ndarray]
    low: float = math.inf
    high: float = -math.inf

    def pool(self, key: Key) -> Pool:
        runs = np.concatenate(self.runs)
        first, last = runs[:, 0], runs.sum(axis=1)
        starts = np.flatnonzero(np.r_[True, first[1:] != last[:-1]])  # runs that touch become one
        ends = np.r_[starts[1:], len(runs)] - 1
        merged = np.stack([first[starts], last[ends] - first[starts]], axis=1)
        return Pool(*key, merged, self.low, self.high)


def index_pools(file: pq.ParquetFile) -> tuple[Pool, ...]:
    """Return the pools of a manifest, ordered by first row. A null key becomes "", which read_manifest rejects."""
    names = file.schema_arrow.names
    column = {name: names.index(name) for name in (*KEYS, "score")}
    found: dict[Key, _Gathered] = {}
    first = 0
    for g in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(g)
        for key, runs, low, high in _by_statistics(group, column) or _by_reading(file, g):
            pool = found.setdefault(key, _Gathered([]))
            pool.runs.append(runs + np.array([first, 0]))
            pool.low, pool.high = min(pool.low, low), max(pool.high, high)
        first += group.num_rows
    return tuple(sorted((p.pool(key) for key, p in found.items()), key=lambda p: int(p.runs[0, 0])))


_Part = tuple[Key, np.ndarray, float, float]  # key, runs (k, 2) within the group, lowest and highest score


def _by_statistics(group: Any, column: dict[str, int]) -> list[_Part] | None:
    """Return the one part of a row group that a single pool fills, or None if its statistics do not show that."""
    values = []
    for name in KEYS:
        found = group.column(column[name]).statistics
        if found is None or not found.has_min_max or found.null_count or found.min != found.max:
            return None
        values.append(str(found.min))
    score = group.column(column["score"]).statistics
    if score is None or not score.has_min_max:
        return None
    run = np.array([[0, group.num_rows]], np.int64)
    return [((values[0], values[1], values[2]), run, float(score.min), float(score.max))]


def _by_reading(file: pq.ParquetFile, g: int) -> list[_Part]:
    """Read the parts of a row group that holds several pools or has no statistics."""
    table = file.read_row_group(g, columns=[*KEYS, "score"])
    if not table.num_rows:
        return []
    code = np.zeros(table.num_rows, np.int64)
    words = []
    for name in KEYS:
        values = pc.fill_null(table.column(name).combine_chunks().cast(pa.string()), "")
        encoded = values.dictionary_encode()
        words.append(encoded.dictionary.to_pylist())
        code = code * len(words[-1]) + encoded.indices.to_numpy()
    score = table.column("score").cast(pa.float64(), safe=False).to_numpy()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(code)) + 1])
    runs = np.stack([starts, np.diff(np.append(starts, table.num_rows))], axis=1)
    parts: list[_Part] = []
    for c in np.unique(code).tolist():
        rest, split = divmod(c, len(words[2]))
        dataset, task = divmod(rest, len(words[1]))
        own = score[code == c]
        low, high = float(np.fmin.reduce(own)), float(np.fmax.reduce(own))
        parts.append(((words[0][dataset], words[1][task], words[2][split]), runs[code[starts] == c], low, high))
    return parts
