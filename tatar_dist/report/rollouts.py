"""Load the completions sampled by a GRPO run as columns; texts are read again only where needed.

Reads RUN/rollouts/step_*.parquet, written by run/directory.py, into `Rollouts`. Unreadable files and files without the
required columns are skipped and named in the notes. 100,000 completions take a few seconds, mostly for parsing the
answers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tatar_dist.prompts.answer import parse
from tatar_dist.report.reading import Training, is_number

TEXTS = ("dataset", "sample_id", "task", "completion")
MOST_NOTES = 5  # files that are named; the rest is counted
SHARE = 5  # "late" is the last of so many parts of the run, "early" the first


@dataclass(frozen=True)
class Rollouts:
    """N completions in the order of the steps. file, row: position on disk; key: (data set, sample id).
    target, prediction, reward: (N,) float64, NaN if absent; scores are in points. task: (N,) names."""

    files: list[Path]
    file: np.ndarray
    row: np.ndarray
    index: np.ndarray
    step: np.ndarray
    target: np.ndarray
    prediction: np.ndarray
    reward: np.ndarray
    task: np.ndarray
    key: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.row)

    def part(self, late: bool, task: str | None = None) -> np.ndarray:
        """Return (k,) positions of completions in the last (`late`) or first fifth of the files, in order."""
        size = max(1, len(self.files) // SHARE)
        chosen = self.file >= len(self.files) - size if late else self.file < size
        return np.flatnonzero(chosen if task is None else chosen & (self.task == task))

    def answers(self, positions: Iterable[int]) -> list[dict[str, Any]]:
        """Return prediction rows without their text (`completion` is None); `at` holds the position."""
        return [
            {
                "dataset": self.key[i][0],
                "sample_id": self.key[i][1],
                "task": str(self.task[i]),
                "target": float(self.target[i]),
                "prediction": None if np.isnan(self.prediction[i]) else float(self.prediction[i]),
                "step": int(self.step[i]),
                "completion": None,
                "at": int(i),
            }
            for i in positions
        ]

    def text(self, position: int) -> str:
        """Read the text of a completion."""
        file = pq.ParquetFile(self.files[self.file[position]])
        column = file.read(columns=["completion"]).column(0)
        return column[int(self.row[position])].as_py() or ""


def read_rollouts(training: Training, notes: list[str]) -> Rollouts | None:
    """Load the completions of a run; None if there are none."""
    files: list[Path] = []
    columns: dict[str, list[Any]] = {k: [] for k in ("file", "row", "index", "step", "target", "prediction", "reward")}
    tasks: list[str] = []
    keys: list[tuple[str, str]] = []
    bad: list[str] = []
    for file in sorted((training.path / "rollouts").glob("step_*.parquet")):
        try:
            table = _light(file)
        except (pa.ArrowException, OSError, ValueError) as e:
            bad.append(f"{file.parent.name}/{file.name} could not be read: {str(e).splitlines()[0]}")
            continue
        kept = [i for i, t in enumerate(table["target"]) if is_number(t)]
        if not kept:
            continue
        columns["file"] += [len(files)] * len(kept)
        columns["row"] += kept
        for name in ("index", "step", "target", "reward"):
            values = table[name]
            columns[name] += [values[i] if is_number(values[i]) else None for i in kept]
        columns["prediction"] += [parse(table["completion"][i] or "").value for i in kept]
        tasks += [str(table["task"][i]) for i in kept]
        keys += [(str(table["dataset"][i]), str(table["sample_id"][i])) for i in kept]
        files.append(file)
    notes += bad[:MOST_NOTES]
    if len(bad) > MOST_NOTES:
        notes.append(f"{len(bad) - MOST_NOTES} more files of rollouts could not be read")
    if not files:
        return None
    whole = {k: np.array([v or 0 for v in columns[k]], np.int64) for k in ("file", "row", "index", "step")}
    real = {k: np.array(columns[k], np.float64) for k in ("target", "prediction", "reward")}
    return Rollouts(files, **whole, **real, task=np.array(tasks), key=keys)


def _light(file: Path) -> dict[str, list[Any]]:
    """Read the required columns of a file. Raises ValueError naming a missing or invalid column."""
    opened = pq.ParquetFile(file)
    names = set(opened.schema_arrow.names)
    for name in (*TEXTS, "target"):
        if name not in names:
            raise ValueError(f"no column {name}")
    if not pa.types.is_string(opened.schema_arrow.field("completion").type):
        raise ValueError("column completion holds no text")
    wanted = [n for n in (*TEXTS, "index", "step", "target", "reward") if n in names]
    found = opened.read(columns=wanted).to_pydict()
    n = opened.metadata.num_rows
    return {name: found.get(name, [None] * n) for name in (*TEXTS, "index", "step", "target", "reward")}
