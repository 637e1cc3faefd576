"""State and result of `data validate`, and the reading of a manifest as a stream.

Unlike `read_manifest`, which rejects a manifest at its first invalid row, this reads on, to report all faults at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tatar_dist.data.checks.rows import Key, PoolFacts
from tatar_dist.data.manifest import open_parquet
from tatar_dist.data.schema import SCHEMA, IdCheck
from tatar_dist.run.files import probe, writing, written_whole

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
        """The message with its row, for people."""
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
    """Open a log that is written beside `path` and renamed at the end; an interrupted run leaves the earlier file.

    Raises UserError if it cannot be written, at once where that can be detected.
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
    """Arrays over the rows of all manifests: hashes of pictures and references (0: none), pool, usability."""

    picture: np.ndarray  # (n, 2) uint64
    reference: np.ndarray  # (n,) int64
    pool: np.ndarray  # (n,) int32, a place in `pools`
    unusable: np.ndarray  # (n,) bool
    pools: list[Key] = field(default_factory=list)

    @classmethod
    def of(cls, n: int) -> ValidationRows:
        return cls(np.zeros((n, 2), np.uint64), np.zeros(n, np.int64), np.zeros(n, np.int32), np.zeros(n, bool))


@dataclass
class Validation:
    """Result of a validation. `fate` (rows,) uint8: see compare.compare."""

    manifests: list[Checked]
    fate: np.ndarray

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
    """Yield (first row among all manifests, columns as lists) of every batch, reading the files again."""
    for manifest in checked:
        file, *_ = open_parquet(manifest.path)
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
