"""Log the problems that `data validate` finds, one JSON line each, while the rows are read.

`M.problems.jsonl` has row, sample_id, code, level and message. Memory holds only the count of each code and its first
few problems, however many there are.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from tatar_dist.run.files import beside, probe, writing

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
    def level(self) -> str:
        return "error" if self.code in ERRORS else "warning"


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
        line = asdict(problem) | {"level": problem.level}
        with writing(self.path):
            self.file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def in_order(self) -> Iterator[tuple[str, int, list[Problem]]]:
        """Return (code, count, first problems) of each code that occurred, errors first."""
        return ((code, self.counts[code], self.examples[code]) for code in MEANING if self.counts[code])


@contextmanager
def problem_log(path: Path) -> Iterator[ProblemLog]:
    """Open a log that is written beside `path` and renamed at the end; an interrupted run leaves the earlier file.

    Raises UserError if it cannot be written, at once where that can be detected.
    """
    probe(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        place = beside(path)
        file = place.open("w", encoding="utf-8")
    try:
        yield ProblemLog(path, file)
        with writing(path):
            file.close()
            os.replace(place, path)
    finally:
        with suppress(OSError):  # the file is discarded; a full disk has already been reported
            file.close()
        place.unlink(missing_ok=True)
