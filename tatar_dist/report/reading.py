"""Read a run or demo directory into `RunFiles`, and the completions that GRPO sampled into `Rollouts`.

A run directory is one of SFT, GRPO or evaluation; a demo directory holds several. Missing parts are absent from the
record. Damaged parts are absent too, and named in notes, which the page prints.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tatar_dist.assets import looked_in
from tatar_dist.errors import UserError
from tatar_dist.prompts.answer import parse
from tatar_dist.run.events import read_events
from tatar_dist.run.files import json_lines

T = TypeVar("T")
DAMAGE = (pa.ArrowException, OSError, ValueError, yaml.YAMLError)  # ValueError: also a text that is not UTF-8
DEMO_MODELS = {"baseline": "base", "sft_eval": "SFT", "grpo_eval": "GRPO"}  # directory -> name on the page
DEMO_TRAININGS = ("sft", "grpo")
ROLLOUT_COLUMNS = ("dataset", "sample_id", "task", "completion", "target")
MOST_NOTES = 5  # damaged files of rollouts that are named; the rest is counted
SHARE = 5  # "late" is the last of so many parts of the run, "early" the first
MOST_CHARS = 4000  # of one rationale
# What HTML forbids or a terminal obeys, except tab and newline.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
PREDICTION_COLUMNS = ("sample_id", "dataset", "task", "source", "target", "prediction", "completion", "truncated")


@dataclass(frozen=True)
class Training:
    """One SFT or GRPO run. `rows`: one dict per step; `quarantine`: unusable samples; `events`: its log."""

    kind: str  # sft | grpo
    config: Mapping[str, Any]
    rows: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    path: Path
    events: list[dict[str, Any]] = field(default_factory=list)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (steps, values) of a metric, (n,) float64 each, at steps where it was logged and is finite."""
        pairs = [(r.get("step", i), r.get(name)) for i, r in enumerate(self.rows)]
        kept = [(s, v) for s, v in pairs if is_number(v) and is_number(s)]
        array = np.array(kept, np.float64).reshape(-1, 2)
        return array[:, 0], array[:, 1]

    @property
    def held_out(self) -> list[str]:
        """Data sets whose held-out SRCC was logged during training."""
        names = {k for r in self.rows for k in r if k.startswith("eval/") and k.endswith("/srcc")}
        return sorted({k.removeprefix("eval/").removesuffix("/srcc") for k in names})

    def not_finite(self, name: str) -> int:
        """Count the steps at which this metric was logged but is not a finite number."""
        return sum(1 for r in self.rows if name in r and not is_number(r[name]))

    def terms(self, task: str) -> list[str]:
        """Return the reward terms logged for a task, without the total."""
        names = {k.split("/")[1] for r in self.rows for k in r if k.startswith("reward/") and k.endswith(f"/{task}")}
        return sorted(names - {"total", "frac_zero_std", "agreement"})


@dataclass(frozen=True)
class EvaluationFiles:
    """Held-out answers of one model. `metrics`: data set -> its metrics; `predictions`: one dict per image."""

    model: str
    metrics: Mapping[str, Mapping[str, Any]]
    predictions: list[dict[str, Any]]
    task_of: Mapping[str, str]

    def of(self, dataset: str) -> list[dict[str, Any]]:
        """Return the predictions on one data set."""
        return [p for p in self.predictions if p["dataset"] == dataset]


@dataclass(frozen=True)
class RunFiles:
    """Contents of a run. `evaluations`: in order of training; `manifests`: where to look up pictures."""

    path: Path
    is_demo: bool
    trainings: list[Training]
    evaluations: list[EvaluationFiles]
    stages: list[dict[str, Any]]
    gains: list[tuple[str, str, list[float]]]
    manifests: list[Path]
    image_root: str | None  # where their image paths start, if not where they say
    notes: list[str] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)  # of the directory itself

    @property
    def datasets(self) -> list[str]:
        """Evaluated data sets, quality before aesthetics, then by name."""
        names = {d: e.task_of.get(d, "") for e in self.evaluations for d in e.metrics}
        return sorted(names, key=lambda d: (names[d] != "iqa", d))

    def task(self, dataset: str) -> str:
        return next((e.task_of[dataset] for e in self.evaluations if dataset in e.task_of), "")


def is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 1 << 1000  # what a float can hold
    return isinstance(value, float) and math.isfinite(value)


def clean(text: str | None) -> str:
    """Remove control characters and truncate to MOST_CHARS."""
    text = _CONTROL.sub("", text or "").strip()
    return text if len(text) <= MOST_CHARS else text[:MOST_CHARS] + "…"


def read_run(path: Path) -> RunFiles:
    """Read a run directory or a demo directory.

    Raises:
        UserError: the directory does not exist or holds no run.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no directory" if path.exists() else f"{path}: no such directory{looked_in(path)}")
    notes: list[str] = []
    is_demo = (path / "summary.json").is_file() or any(
        (path / n / "metrics.json").is_file() or (path / n / "metrics.jsonl").is_file()
        for n in (*DEMO_MODELS, *DEMO_TRAININGS)
    )
    summary = _json(path / "summary.json", notes)
    config: Mapping[str, Any] = {}
    if is_demo:
        trainings = [t for n in DEMO_TRAININGS if (t := _training(path / n, notes))]
        evaluations = [e for n, model in DEMO_MODELS.items() if (e := _evaluation(path / n, model, notes))]
        evaluations = evaluations or _from_table(summary.get("table"))
        manifests = [m for split in ("test", "train") for m in sorted((path / "data").glob(f"*_{split}.parquet"))]
        image_root = None
    else:
        training, evaluation = _training(path, notes), _evaluation(path, "this model", notes)
        trainings, evaluations = [training] if training else [], [evaluation] if evaluation else []
        config = training.config if training else _config(path, notes)
        manifests, image_root = _manifests(config, "test" if evaluation else "train")
    if not trainings and not evaluations:
        raise UserError(f"{path}: holds no run (neither metrics.jsonl, metrics.json nor the directories of a demo)")
    stages, gains = _stages(summary.get("stages")), _gains(summary.get("gains"))
    return RunFiles(path, is_demo, trainings, evaluations, stages, gains, manifests, image_root, notes, config)


def _training(path: Path, notes: list[str]) -> Training | None:
    rows = _json_lines(path / "metrics.jsonl", notes)
    if not rows:
        return None
    kind = "grpo" if any(k.startswith("reward/") for r in rows for k in r) else "sft"
    quarantine = _json_lines(path / "quarantine.jsonl", notes)
    events = _read(path / "events.jsonl", lambda file: read_events(file.parent), [], notes)
    return Training(kind, _config(path, notes), rows, quarantine, path, events)


def _evaluation(path: Path, model: str, notes: list[str]) -> EvaluationFiles | None:
    datasets = _json(path / "metrics.json", notes).get("datasets")
    if not isinstance(datasets, dict) or not datasets:
        return None
    rows = _read(path / "predictions.parquet", lambda file: pq.read_table(file).to_pylist(), [], notes)
    predictions = [{c: r.get(c) for c in PREDICTION_COLUMNS} for r in rows if is_number(r.get("target"))]
    task_of = {name: "iaa" if "iaa" in name else "iqa" for name in datasets}
    task_of |= {p["dataset"]: p["task"] for p in predictions}
    return EvaluationFiles(model, {k: v for k, v in datasets.items() if isinstance(v, dict)}, predictions, task_of)


def _from_table(table: Any) -> list[EvaluationFiles]:
    """Build evaluations from the table in summary.json, for a demo whose evaluation directories are gone."""
    by_model: dict[str, dict[str, Any]] = {}
    for row in _list(table):
        if isinstance(row, dict) and "model" in row and "task" in row:
            by_model.setdefault(str(row["model"]), {})[str(row["task"])] = row
    names = {"sft": "SFT", "grpo": "GRPO"}
    return [EvaluationFiles(names.get(m, m), d, [], {t: t for t in d}) for m, d in by_model.items()]


def _stages(stages: Any) -> list[dict[str, Any]]:
    """Return name, seconds, budget (seconds or None) and reused of each stage that names its seconds."""
    return [
        {
            "name": str(s.get("name", "")),
            "seconds": s["seconds"],
            "budget": s.get("budget_seconds") if is_number(s.get("budget_seconds")) else None,
            "reused": bool(s.get("reused")),
        }
        for s in _list(stages)
        if isinstance(s, dict) and is_number(s.get("seconds"))
    ]


def _gains(gains: Any) -> list[tuple[str, str, list[float]]]:
    """Return (task, measure, [change, low, high]), without entries that are not three numbers."""
    return [
        (task, measure, values)
        for task, measures in (gains if isinstance(gains, dict) else {}).items()
        for measure, values in (measures if isinstance(measures, dict) else {}).items()
        if isinstance(values, list) and len(values) == 3 and all(is_number(v) for v in values)
    ]


def _manifests(config: Mapping[str, Any], split: str) -> tuple[list[Path], str | None]:
    """Return the existing manifests of a split, and the image root of the configuration."""
    data = config.get("data")
    if not isinstance(data, dict):
        return [], None
    root, images = Path(str(data.get("root", "."))), data.get("image_root")
    there = [p for p in (root / str(path) for path in _list(data.get(split))) if p.is_file()]
    return there, str(images) if images else None


def _read(file: Path, read: Callable[[Path], Any], empty: T, notes: list[str]) -> T:
    """Return the content of a file, or `empty` if it is absent, of another type or damaged, which is noted."""
    try:
        content = read(file) if file.is_file() else empty
    except DAMAGE as e:
        notes.append(damage_note(file, e))
        return empty
    return content if isinstance(content, type(empty)) else empty


def damage_note(file: Path, error: Exception) -> str:
    """Return the note about a file that could not be read, with the first line of the error."""
    reason, *_ = str(error).splitlines() or [type(error).__name__]
    return f"{file.parent.name}/{file.name} could not be read: {reason}"


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    return _read(path / "config.yaml", lambda file: yaml.safe_load(file.read_text()), {}, notes)


def _json(file: Path, notes: list[str]) -> dict[str, Any]:
    return _read(file, lambda f: json.loads(f.read_text()), {}, notes)


def _json_lines(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    name = f"{file.parent.name}/{file.name}"
    note = lambda n: notes.append(f"{name}: line {n} is not JSON and was left out")  # noqa: E731
    return _read(file, lambda f: json_lines(f, note), [], notes)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


@dataclass(frozen=True)
class Rollouts:
    """N completions in the order of the steps. file, row: position on disk; key: (data set, sample id).
    target, prediction: (N,) float64 in points, NaN where unparsed. task: (N,) names."""

    files: list[Path]
    file: np.ndarray
    row: np.ndarray
    target: np.ndarray
    prediction: np.ndarray
    task: np.ndarray
    key: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.row)

    def part(self, late: bool, task: str | None = None) -> np.ndarray:
        """Return (k,) positions of completions in the last (`late`) or first fifth of the files, in order."""
        size = max(1, len(self.files) // SHARE)
        chosen = self.file >= len(self.files) - size if late else self.file < size
        return np.flatnonzero(chosen if task is None else chosen & (self.task == task))

    def answer(self, position: int) -> dict[str, Any]:
        """Return a prediction row without its text (`completion` is None); `at` holds the position."""
        dataset, sample_id = self.key[position]
        prediction = float(self.prediction[position])
        return {
            "dataset": dataset,
            "sample_id": sample_id,
            "task": str(self.task[position]),
            "target": float(self.target[position]),
            "prediction": None if math.isnan(prediction) else prediction,
            "completion": None,
            "at": int(position),
        }

    def text(self, position: int) -> str:
        """Read the text of a completion."""
        column = pq.ParquetFile(self.files[self.file[position]]).read(columns=["completion"]).column(0)
        return column[int(self.row[position])].as_py() or ""


def read_rollouts(training: Training, notes: list[str]) -> Rollouts | None:
    """Load the completions of a run; None if there are none."""
    files: list[Path] = []
    completions: list[tuple[Any, ...]] = []
    bad: list[str] = []
    for file in sorted((training.path / "rollouts").glob("step_*.parquet")):
        try:
            rows = [(i, r) for i, r in enumerate(_completions(file)) if is_number(r["target"])]
        except DAMAGE as e:
            bad.append(damage_note(file, e))
            continue
        for i, r in rows:
            key = str(r["dataset"]), str(r["sample_id"])
            prediction = parse(r["completion"] or "").value
            completions.append((len(files), i, r["target"], prediction, str(r["task"]), key))
        if rows:
            files.append(file)
    notes += bad[:MOST_NOTES]
    if len(bad) > MOST_NOTES:
        notes.append(f"{len(bad) - MOST_NOTES} more files of rollouts could not be read")
    if not files:
        return None
    file_of, row, target, prediction, task, key = zip(*completions, strict=True)
    scores = np.array([target, prediction], np.float64)  # None becomes NaN
    return Rollouts(files, np.array(file_of), np.array(row), *scores, np.array(task), list(key))


def _completions(file: Path) -> list[dict[str, Any]]:
    """Read the columns ROLLOUT_COLUMNS of a file. Raises ValueError naming a missing or invalid column."""
    opened = pq.ParquetFile(file)
    schema = opened.schema_arrow
    for name in ROLLOUT_COLUMNS:
        if name not in schema.names:
            raise ValueError(f"no column {name}")
    if not pa.types.is_string(schema.field("completion").type):
        raise ValueError("column completion holds no text")
    return opened.read(columns=list(ROLLOUT_COLUMNS)).to_pylist()
