"""State and result of `data validate`: problems, pool statistics, row rules, streaming.

Unlike `read_manifest`, which rejects a manifest at its first invalid row, this reads on, to report all faults at once.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tatar_dist.data.images import THUMB
from tatar_dist.data.manifest import image_path, open_parquet
from tatar_dist.data.schema import REQUIRED, SCHEMA, IdCheck, json_object
from tatar_dist.run.files import probe, writing, written_whole
from tatar_dist.types import SPLITS, TASKS

Columns = dict[str, list[Any]]  # column name -> Python values of a batch
Key = tuple[str, str, str]  # dataset, task, split

BINS = 50  # of a score histogram, 2 points each
FEW = 7  # at most this many distinct scores are suspicious ...
FEW_ROWS = 30  # ... in a pool of at least this many rows
NARROW = 10.0  # points; a tenth of the scale

BATCH_BYTES, BATCH_ROWS = 8 << 20, 128
KEEP, UNUSABLE, LEAKED, DUPLICATE = range(4)  # a row's fate in a clean manifest
EXAMPLES = 5  # of each code, for the summary

# code -> what it means, in the order of a summary. An error makes the command end with status 2.
ERRORS = {
    "no-value": "a required column has no value",
    "empty-key": "the sample_id or the name of the data set is empty",
    "bad-text": "text that is not UTF-8",
    "bad-task": "the task is neither iqa nor iaa",
    "bad-split": "the split is none of train, validation and test",
    "bad-score": "the score is not a number from 0 to 100",
    "bad-json": "attributes or meta is not a JSON object",
    "duplicate-id": "the sample_id was used before",
    "no-image": "neither a path nor bytes",
    "outside": "the path leads outside the image root",
    "missing": "the image file is not there, or empty",
    "corrupt": "the picture does not decode",
    "truncated": "the picture is cut off",
    "bomb": "the picture is larger than is decoded",
    "extreme-aspect": "longer than 200 times its width, which Qwen2.5-VL refuses",
    "leak-image": "the same picture is in a held-out split",
    "leak-reference": "a picture of the same reference is in a held-out split",
}
WARNINGS = {
    "conflicting-scores": "identical pictures, different scores",
    "near-duplicate": "nearly the same picture is in a held-out split",
    "duplicate-image": "the same picture again in the same pool",
    "scores-constant": "all scores of a pool are equal",
    "scores-few": "a pool has a handful of distinct scores",
    "scores-narrow": "a pool's scores lie within a tenth of the scale",
}
MEANING = ERRORS | WARNINGS


@dataclass(frozen=True)
class Problem:
    """One line of the file. `row` and `sample_id` are None if the problem concerns a whole pool."""

    row: int | None
    sample_id: str | None
    code: str
    message: str

    @property
    def text(self) -> str:
        """Return the message with its row, for people."""
        return self.message if self.row is None else f"row {self.row}, {self.sample_id}: {self.message}"


@dataclass
class ProblemLog:
    """Counts by code, the first `EXAMPLES` of each, and the open file with all problems."""

    path: Path
    file: IO[str]
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Problem]] = field(default_factory=dict)

    def add(self, problem: Problem) -> None:
        self.counts[problem.code] += 1
        if len(kept := self.examples.setdefault(problem.code, [])) < EXAMPLES:
            kept.append(problem)
        level = "error" if problem.code in ERRORS else "warning"
        with writing(self.path):
            self.file.write(json.dumps(asdict(problem) | {"level": level}, ensure_ascii=False) + "\n")

    def in_order(self) -> Iterator[tuple[str, int, list[Problem]]]:
        """Return (code, count, first problems) of each code that occurred, errors first."""
        return ((code, self.counts[code], self.examples[code]) for code in MEANING if self.counts[code])


@contextmanager
def problem_log(path: Path) -> Iterator[ProblemLog]:
    """Open a log that is written beside `path` and renamed when complete.

    An interrupted run leaves the earlier file. Raises UserError, early if possible, if the log cannot be written.
    """
    probe(path)
    with ExitStack() as stack:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(stack.enter_context(written_whole(path)).open("w", encoding="utf-8"))
        yield ProblemLog(path, file)
        with writing(path):
            stack.pop_all().close()


@dataclass
class PoolFacts:
    """Running pool statistics: `histogram` (BINS,) int64 on 0-100, `distinct` up to FEW scores."""

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
        """Return the population standard deviation of the scores, in points."""
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


@dataclass
class Checked:
    """Findings in one manifest. `first`: index of its first row among the rows of all manifests."""

    path: Path
    root: Path
    rows: int
    first: int
    log: ProblemLog
    ids: IdCheck = field(default_factory=IdCheck)
    pools: dict[int, PoolFacts] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    files: int = 0  # rows whose picture is a file
    absent: int = 0  # of those, the files that cannot be read

    def place(self, suffix: str) -> Path:
        """Return the path of the report file with this suffix, beside the problem log."""
        return self.log.path.with_name(f"{self.path.stem}.{suffix}")


@dataclass
class ValidationRows:
    """Arrays over all manifests' rows: picture and reference hashes (0: none), pool, usability."""

    picture: np.ndarray  # (n, 2) uint64
    reference: np.ndarray  # (n,) int64
    pool: np.ndarray  # (n,) int32, a place in `pools`
    unusable: np.ndarray  # (n,) bool
    thumbnail: np.ndarray  # (n, THUMB^2) uint8
    pools: list[Key] = field(default_factory=list)

    @classmethod
    def of(cls, n: int) -> ValidationRows:
        keys = np.zeros((n, 2), np.uint64), np.zeros(n, np.int64), np.zeros(n, np.int32)
        return cls(*keys, np.zeros(n, bool), np.zeros((n, THUMB**2), np.uint8))


@dataclass
class Validation:
    """Result of a validation. `fate` (rows,) uint8: see compare.compare.

    compared: a sentence. near_pairs: near.Alike of rows over all manifests. near: number of all pairs.
    """

    manifests: list[Checked]
    fate: np.ndarray
    compared: str = ""
    near_pairs: Sequence[tuple[int, int, float]] = ()
    near: int = 0

    @property
    def rows(self) -> int:
        return len(self.fate)

    @property
    def unusable(self) -> int:
        return int((self.fate == UNUSABLE).sum())

    @property
    def leaking(self) -> int:
        return int((self.fate == LEAKED).sum())

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


def batches(file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield tables of SCHEMA's types in file order; columns that the file lacks are null.

    A table has at most BATCH_ROWS rows and, if it has image_bytes, about BATCH_BYTES bytes.
    """
    there = [n for n in columns if n in file.schema_arrow.names]
    for g in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(g)
        row_bytes = group.total_byte_size / max(1, group.num_rows) if "image_bytes" in there else 1
        size = int(np.clip(BATCH_BYTES / max(1.0, row_bytes), 1, BATCH_ROWS))
        for batch in file.iter_batches(size, row_groups=[g], columns=there, use_threads=False):
            converted = {}
            for name in columns:
                kind = SCHEMA.field(name).type
                # unsafe: a whole number beyond 2**53 is a wrong score, not a damaged file
                safe = not pa.types.is_floating(kind)
                converted[name] = (
                    batch.column(name).cast(kind, safe=safe) if name in there else pa.nulls(len(batch), kind)
                )
            yield pa.table(converted)


def columns_of(checked: Sequence[Checked], names: Sequence[str]) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Read the files again; yield (first row over all manifests, columns as lists) per batch."""
    for manifest in checked:
        file, *_ = open_parquet(manifest.path)
        start = manifest.first
        with file:
            for table in batches(file, names):
                yield start, {n: values_of(table.column(n))[0] for n in names}
                start += len(table)


def values_of(column: pa.ChunkedArray) -> tuple[list[Any], list[int]]:
    """Return a column's values, bytes that are not UTF-8 as escapes, and positions of such text."""
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


def row_faults(columns: Columns, root: Path) -> Iterator[tuple[int, str, str]]:
    """Yield faults that `read_manifest` or `Manifest.get` rejects; `root`: normalised, absolute."""
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
    """Return (code, text) of a value's fault, or None; not for image and image_bytes."""
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
    try:
        value = json_object(meta or "{}").get("reference")
    except ValueError:  # reported by row_faults
        return None
    return None if value in (None, "") else str(value)


def rows_by_pool(columns: Columns) -> dict[Key, list[int]]:
    """Return the positions of a batch's rows by data set, task and split."""
    positions: dict[Key, list[int]] = defaultdict(list)
    for i, key in enumerate(zip(columns["dataset"], columns["task"], columns["split"], strict=True)):
        positions[key].append(i)
    return positions
