"""Pools: which rows of a manifest belong to which data set, task and split, without holding a value per row.

In: an open Parquet file. Out: one `Pool` for every (data set, task, split), as runs of consecutive rows. What a row
group's statistics say is believed, for they are made from the values written; only groups that mix pools are read. So
the index of ten million rows written by `write_manifest` (a pool per row group) comes from the footer alone.
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
    """All rows of one data set, task and split. `runs` (k, 2) int64: first row, rows; ascending, not adjacent."""

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
        """The manifest row of the pool's `position`-th row, 0 <= position < rows."""
        k = int(np.searchsorted(self._ends, position, side="right"))
        first, count = self.runs[k]
        return int(first + position - (self._ends[k] - count))

    def __contains__(self, row: object) -> bool:
        assert isinstance(row, int)
        k = int(np.searchsorted(self.runs[:, 0], row, side="right")) - 1
        return k >= 0 and row < int(self.runs[k].sum())

    def __iter__(self) -> Iterator[int]:
        return (row for first, count in self.runs.tolist() for row in range(first, first + count))


@dataclass
class _Gathered:
    runs: list[tuple[int, int]]
    low: float = math.inf
    high: float = -math.inf

    def add(self, first: int, count: int, low: float, high: float) -> None:
        if self.runs and sum(self.runs[-1]) == first:
            first, count = self.runs[-1][0], self.runs[-1][1] + count
            self.runs[-1] = (first, count)
        else:
            self.runs.append((first, count))
        self.low, self.high = min(self.low, low), max(self.high, high)


def index_pools(file: pq.ParquetFile) -> tuple[Pool, ...]:
    """The pools of a manifest, in the order of their first rows. A null key reads as ""; read_manifest refuses it."""
    names = file.schema_arrow.names
    column = {name: names.index(name) for name in (*KEYS, "score")}
    found: dict[Key, _Gathered] = {}
    first = 0
    for g in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(g)
        spans = _by_statistics(group, column) or _by_reading(file, g)
        for key, start, count, low, high in spans:
            found.setdefault(key, _Gathered([])).add(first + start, count, low, high)
        first += group.num_rows
    return tuple(Pool(*key, np.array(p.runs, np.int64).reshape(-1, 2), p.low, p.high) for key, p in found.items())


_Span = tuple[Key, int, int, float, float]  # key, first row within the group, rows, lowest and highest score


def _by_statistics(group: Any, column: dict[str, int]) -> list[_Span] | None:
    """One span for a group that one pool fills, or None when its statistics do not say so."""
    values = []
    for name in KEYS:
        found = group.column(column[name]).statistics
        if found is None or not found.has_min_max or found.null_count or found.min != found.max:
            return None
        values.append(str(found.min))
    score = group.column(column["score"]).statistics
    if score is None or not score.has_min_max:
        return None
    return [((values[0], values[1], values[2]), 0, group.num_rows, float(score.min), float(score.max))]


def _by_reading(file: pq.ParquetFile, g: int) -> list[_Span]:
    """The spans of a group that holds several pools, or has no statistics."""
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
    score = table.column("score").cast(pa.float64()).to_numpy()
    starts = np.concatenate([[0], np.flatnonzero(np.diff(code)) + 1])
    counts = np.diff(np.append(starts, table.num_rows))
    low, high = np.fmin.reduceat(score, starts), np.fmax.reduceat(score, starts)
    spans = []
    for start, count, lo, hi in zip(starts.tolist(), counts.tolist(), low.tolist(), high.tolist(), strict=True):
        rest, split = divmod(int(code[start]), len(words[2]))
        dataset, task = divmod(rest, len(words[1]))
        spans.append(((words[0][dataset], words[1][task], words[2][split]), start, count, lo, hi))
    return spans
