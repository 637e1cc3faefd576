"""Check single manifest rows and summarise the scores of each pool, one batch at a time.

`row_faults` takes the light columns of a batch as Python values and yields (position in the batch, code, message).
`PoolFacts` holds running sums that need a few hundred bytes per pool, however many rows it has.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tatar_dist.data.manifest import image_path
from tatar_dist.data.schema import REQUIRED, json_object
from tatar_dist.types import SPLITS, TASKS

Columns = dict[str, list[Any]]  # column name -> Python values of a batch
Key = tuple[str, str, str]  # dataset, task, split

BINS = 50  # of a score histogram, 2 points each
FEW = 7  # at most this many distinct scores are suspicious ...
FEW_ROWS = 30  # ... in a pool of at least this many rows
NARROW = 10.0  # points; a tenth of the scale


def row_faults(columns: Columns, root: Path) -> Iterator[tuple[int, str, str]]:
    """Yield what `read_manifest` and `Manifest.get` reject in the rows of a batch. `root`: normalised, absolute."""
    for name in (*REQUIRED, "attributes", "meta"):
        for i, value in enumerate(columns[name]):
            if fault := _fault(name, value):
                code, text = fault
                yield i, code, f"column {name}: {text}"
    for i, (name, embedded) in enumerate(zip(columns["image"], columns["image_bytes"], strict=True)):
        if not embedded and not name:
            yield i, "no-image", "column image: neither a path nor image_bytes"
        elif not embedded and image_path(root, name) is None:
            yield i, "outside", f"column image: {name!r} leads outside the image root"


def _fault(name: str, value: Any) -> tuple[str, str] | None:
    """Return (code, text) of what is wrong with a value of a column other than image and image_bytes, or None."""
    if value is None:
        return ("no-value", "no value") if name in REQUIRED else None
    if name in ("sample_id", "dataset") and value == "":
        return "empty-key", "is empty"
    if name == "task" and value not in TASKS:
        return "bad-task", f"{value!r} is neither {' nor '.join(TASKS)}"
    if name == "split" and value not in SPLITS:
        return "bad-split", f"{value!r} must be one of {', '.join(SPLITS)}"
    if name == "score" and not 0 <= value <= 100:  # true for NaN as well
        return "bad-score", f"{value} is not a number from 0 to 100"
    if name in ("attributes", "meta") and value:
        try:
            json_object(value)
        except ValueError as e:
            return "bad-json", str(e)
    return None


def reference_of(meta: str | None) -> str | None:
    """Return `meta.reference`, the pristine image that a distorted one was made from, or None."""
    if not meta or '"reference"' not in meta:
        return None
    try:
        value = json_object(meta).get("reference")
    except ValueError:  # reported by row_faults
        return None
    return str(value) if value not in (None, "") else None


@dataclass
class PoolFacts:
    """Running statistics of a pool. `histogram` (BINS,) int64 over 0-100; `distinct` is complete up to FEW scores."""

    dataset: str
    task: str
    split: str
    rows: int = 0
    scored: int = 0
    low: float = math.inf
    high: float = -math.inf
    total: float = 0.0
    squares: float = 0.0
    rationales: int = 0
    attributes: int = 0
    stds: int = 0
    distinct: set[float] = field(default_factory=set)
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, columns: Columns, rows: Sequence[int]) -> None:
        """Add the `rows` of a batch, all of this pool."""
        scores = [columns["score"][i] for i in rows]
        self.rows += len(rows)
        self.rationales += sum(bool((columns["rationale"][i] or "").strip()) for i in rows)
        self.attributes += sum(columns["attributes"][i] not in (None, "", "{}") for i in rows)
        self.stds += sum(columns["score_std"][i] is not None for i in rows)
        valid = np.array([s for s in scores if s is not None and 0 <= s <= 100], np.float64)
        if not len(valid):
            return
        self.scored += len(valid)
        self.low, self.high = min(self.low, float(valid.min())), max(self.high, float(valid.max()))
        self.total, self.squares = self.total + float(valid.sum()), self.squares + float((valid**2).sum())
        self.histogram += np.histogram(valid, BINS, (0, 100))[0]
        if len(self.distinct) <= FEW:
            self.distinct.update(np.unique(valid)[: FEW + 1].tolist())

    @property
    def name(self) -> str:
        return f"{self.dataset} {self.task} {self.split}"

    @property
    def mean(self) -> float:
        return self.total / self.scored if self.scored else math.nan

    @property
    def std(self) -> float:
        """Population standard deviation of the scores, in points."""
        return math.sqrt(max(0.0, self.squares / self.scored - self.mean**2)) if self.scored else math.nan

    def suspicions(self) -> Iterator[tuple[str, str]]:
        """Yield (code, message) for scores that suggest a wrong scale or a constant column."""
        if self.scored < 2:
            return
        if self.high == self.low:
            yield "scores-constant", f"all {self.scored:,} scores are {self.low:g}"
        elif self.scored >= FEW_ROWS and self.high - self.low <= NARROW:
            yield "scores-narrow", f"all scores lie in {self.low:g}-{self.high:g}: was the right raw range declared?"
        if self.scored >= FEW_ROWS and 1 < len(self.distinct) <= FEW:
            shown = ", ".join(f"{s:g}" for s in sorted(self.distinct))
            yield "scores-few", f"only {len(self.distinct)} distinct scores in {self.scored:,} rows: {shown}"

    def as_json(self) -> dict[str, Any]:
        keys = ("dataset", "task", "split", "rows", "rationales", "attributes")
        scores = {"score_min": self.low, "score_max": self.high, "score_mean": self.mean, "score_std": self.std}
        shown = {k: round(v, 4) if math.isfinite(v) else None for k, v in scores.items()}
        return {k: getattr(self, k) for k in keys} | {"with_score_std": self.stds} | shown


def rows_by_pool(columns: Columns) -> dict[Key, list[int]]:
    """Return the positions of a batch's rows by data set, task and split."""
    positions: dict[Key, list[int]] = defaultdict(list)
    for i, key in enumerate(zip(columns["dataset"], columns["task"], columns["split"], strict=True)):
        positions[key].append(i)
    return positions
