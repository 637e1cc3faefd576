"""Read a directory into `RunFiles`, its events into `History`, GRPO samples into `Rollouts`.

A run directory is one of SFT, GRPO or evaluation; a demo directory holds several, as does any with the runs sft and
grpo. Evaluations beside a training are read with it. Missing parts are absent from the record. Damaged parts are absent
too, and named in notes, which the page prints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tatar_dist.assets import looked_in
from tatar_dist.config.schema import Config
from tatar_dist.data.images import UnreadableImage
from tatar_dist.errors import UserError
from tatar_dist.prompts.answer import parse
from tatar_dist.run.events import FILE as EVENTS
from tatar_dist.run.files import json_lines
from tatar_dist.run.status import ENDS, TROUBLE, RunHistory

T = TypeVar("T")
BASE = "base"  # the model before any training
DEMO_MODELS = {"baseline": BASE, "sft_eval": "SFT", "grpo_eval": "GRPO"}  # directory -> name on the page
DEMO_TRAININGS = ("sft", "grpo")
ROLLOUT_COLUMNS = ["dataset", "sample_id", "task", "completion", "target"]
MOST_NOTES = 5  # damaged files of rollouts that are named; the rest is counted
SHARE = 5  # "late" is the last of so many parts of the run, "early" the first
MOST_CHARS = 4000  # of one rationale
# What HTML forbids or a terminal obeys, except tab and newline.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
PREDICTION_COLUMNS = ("sample_id", "dataset", "task", "source", "target", "prediction", "completion", "truncated")


@dataclass(frozen=True)
class Training:
    """One SFT or GRPO run. rows: dict per step; quarantine: unusable samples; events: its log."""

    kind: str  # sft | grpo
    config: Mapping[str, Any]
    rows: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    path: Path
    events: list[dict[str, Any]]

    @cached_property
    def history(self) -> History | None:
        return history(self.events, len(self.rows))

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (steps, values) of a metric, (n,) float64 each, where it was logged and is finite."""
        pairs = [(r.get("step", i), r[name]) for i, r in enumerate(self.rows) if is_number(r.get(name))]
        steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
        return steps, values

    def values(self, name: str) -> np.ndarray:
        """Return the finite values of a metric, (n,) float64, in the order of the steps."""
        return self.series(name)[1]

    @property
    def held_out(self) -> list[str]:
        """Return the data sets whose held-out SRCC was logged during training."""
        names = {k for r in self.rows for k in r if k.startswith("eval/") and k.endswith("/srcc")}
        return sorted(k.removeprefix("eval/").removesuffix("/srcc") for k in names)

    def terms(self, task: str) -> list[str]:
        """Return the reward terms logged for a task, without the total."""
        names = {k.split("/")[1] for r in self.rows for k in r if k.startswith("reward/") and k.endswith(f"/{task}")}
        return sorted(names - {"total", "frac_zero_std", "agreement", "share", "share_parsed"})


@dataclass(frozen=True)
class EvaluationFiles:
    """Held-out answers of one model. metrics: by data set; predictions: one dict per image."""

    model: str
    metrics: Mapping[str, Mapping[str, Any]]
    predictions: list[dict[str, Any]]
    task_of: Mapping[str, str]

    def of(self, dataset: str) -> list[dict[str, Any]]:
        """Return the predictions on one data set."""
        return [p for p in self.predictions if p["dataset"] == dataset]


@dataclass(frozen=True)
class RunFiles:
    """Contents of a run. evaluations: in training order; manifests: where to look up pictures.

    config: of the directory itself; summary: summary.json of a demo, its times and what GRPO changed.
    """

    path: Path
    kind: str  # demo | SFT | GRPO | SFT and GRPO | evaluation
    trainings: list[Training]
    evaluations: list[EvaluationFiles]
    manifests: list[Path]
    image_root: str | None  # where their image paths start, if not where they say
    notes: list[str]
    config: Mapping[str, Any]
    summary: Mapping[str, Any]

    def training(self, kind: str) -> Training | None:
        """Return the last training of a kind."""
        return next((t for t in reversed(self.trainings) if t.kind == kind), None)

    @property
    def datasets(self) -> list[str]:
        """Return the evaluated data sets, quality before aesthetics, then by name."""
        names = {d: e.task_of.get(d, "") for e in self.evaluations for d in e.metrics}
        return sorted(names, key=lambda d: (names[d] != "iqa", d))

    def task(self, dataset: str) -> str:
        return next((e.task_of[dataset] for e in self.evaluations if dataset in e.task_of), "")


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; bounded, as JSON integers may exceed a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def clean(text: str | None, most: int = MOST_CHARS) -> str:
    """Remove control characters and truncate to `most`."""
    text = _CONTROL.sub("", text or "").strip()
    return text if len(text) <= most else text[:most] + "…"


def read_run(path: Path) -> RunFiles:
    """Read a run directory, or one that holds the runs sft and grpo, as a demo does.

    Raises:
        UserError: the directory does not exist or holds no run.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: not a directory" if path.exists() else f"{path}: no such directory{looked_in(path)}")
    notes: list[str] = []
    summary: dict[str, Any] = {}
    is_demo = any((path / name).is_file() for name in ("summary.json", "settings.json"))
    is_run = any((path / name).is_file() for name in ("metrics.jsonl", "metrics.json"))
    trainings = [t for p in ([path] if is_run else [path / n for n in DEMO_TRAININGS]) if (t := _training(p, notes))]
    if is_demo:
        models = {path / name: model for name, model in DEMO_MODELS.items()}
        summary = _read(path / "summary.json", summary, notes)
    elif (path / "metrics.json").is_file():
        models = {path: "this model"}
    else:
        models = _beside(trainings, path.absolute().parent if is_run else path)
    evaluations = [e for place, model in models.items() if (e := _evaluation(place, model, notes))]
    if not trainings and not evaluations:
        raise UserError(f"{path}: holds no run (neither metrics.jsonl, metrics.json nor the directories sft and grpo)")
    read_by = [("test", _config(place, notes)) for place in models] + [("train", t.config) for t in trainings]
    data = [(split, config.get("data", {})) for split, config in read_by]
    manifests = [Path(d.get("root", ".")) / name for split, d in data for name in d.get(split) or []]
    if is_demo:  # also one that was moved, or that an older version made
        manifests = [m for split in ("test", "train") for m in sorted((path / "data").glob(f"*_{split}.parquet"))]
    image_root = next((root for _, d in data if (root := d.get("image_root"))), None)
    kind = "demo" if is_demo else " and ".join(t.kind.upper() for t in trainings) or "evaluation"
    config = read_by[-1][1] if is_run else {}
    manifests = [m for m in dict.fromkeys(manifests) if m.is_file()]
    return RunFiles(path, kind, trainings, evaluations, manifests, image_root, notes, config, summary)


def _beside(trainings: Sequence[Training], directory: Path) -> dict[Path, str]:
    """Choose evaluations in `directory` to show; return them with their models' names.

    These are the newest of each training's checkpoints and, if there is one, that of the model they started from.
    """
    found: dict[str, Path] = {}
    for file in sorted(directory.glob("*/metrics.json"), key=lambda f: f.stat().st_mtime):
        path = str(_read(file, {}, []).get("model"))
        if trainings and path == trainings[0].config.get("model", {}).get("path"):
            found["start" if "checkpoints" in path else BASE] = file.parent
        found |= {t.kind: file.parent for t in trainings if _is_of(Path(path), t.path)}
    order = ["start", BASE, *(t.kind for t in trainings)] if found.keys() & {t.kind for t in trainings} else []
    return {found[name]: name.upper() if name in DEMO_TRAININGS else name for name in order if name in found}


def _is_of(model: Path, run: Path) -> bool:
    """Return whether a model is a checkpoint of a run, also if both were moved together."""
    above = model.parts[:-3]
    moved = bool(above) and model.parts[-3] == "checkpoints" and run.resolve().parts[-len(above) :] == above
    return moved or model.resolve().is_relative_to((run / "checkpoints").resolve())


def _training(path: Path, notes: list[str]) -> Training | None:
    rows = _json_lines(path / "metrics.jsonl", notes)
    if not rows:
        return None
    kind = "grpo" if any(k.startswith("reward/") for r in rows for k in r) else "sft"
    quarantine = _json_lines(path / "quarantine.jsonl", notes)
    return Training(kind, _config(path, notes), rows, quarantine, path, _json_lines(path / EVENTS, notes))


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read config.yaml; a section of another type than the schema's is left out, with a note."""
    config = _read(path / "config.yaml", {}, notes)
    sections = [f.name for f in fields(Config) if is_dataclass(f.default_factory)]
    wrong = [key for key in sections if key in config and not isinstance(config[key], dict)]
    notes.extend(f"{path.name}/config.yaml: {key} is not a mapping and was left out" for key in wrong)
    return {key: value for key, value in config.items() if key not in wrong}


def _evaluation(path: Path, model: str, notes: list[str]) -> EvaluationFiles | None:
    datasets = _read(path / "metrics.json", {}, notes).get("datasets")
    if isinstance(datasets, dict):
        datasets = {name: metrics for name, metrics in datasets.items() if isinstance(metrics, dict)}
    if not isinstance(datasets, dict) or not datasets:
        return None
    rows = _read(path / "predictions.parquet", [], notes)
    predictions = [{c: r.get(c) for c in PREDICTION_COLUMNS} for r in rows]
    task_of = {name: "iaa" if "iaa" in name else "iqa" for name in datasets}
    return EvaluationFiles(model, datasets, predictions, task_of | {p["dataset"]: p["task"] for p in predictions})


READERS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda file: json.loads(file.read_text()),
    ".yaml": lambda file: yaml.safe_load(file.read_text()),
    ".parquet": lambda file: pq.read_table(file).to_pylist(),
}


def _read(file: Path, empty: T, notes: list[str]) -> T:
    """Return a file's content, or `empty` if it is absent, of another type or damaged (noted)."""
    content: Any = empty
    with noted(file, notes):
        if file.is_file():
            content = READERS[file.suffix](file)
    if isinstance(content, type(empty)):
        return content
    notes.append(f"{file.parent.name}/{file.name} could not be read: not what a run writes")
    return empty


def _json_lines(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    note = f"{file.parent.name}/{file.name}: line {{}} is not JSON and was left out"
    return json_lines(file, lambda line: notes.append(note.format(line)))


@contextmanager
def noted(file: Path, notes: list[str]) -> Iterator[None]:
    """Suppress an error while reading `file`; append the first line of its message to `notes`."""
    try:
        yield
    except (UserError, UnreadableImage) as e:  # names the place
        notes.append(str(e).splitlines()[0])
    except (pa.ArrowException, OSError, ValueError, yaml.YAMLError) as e:  # ValueError: also text that is not UTF-8
        reason, *_ = str(e).splitlines() or [type(e).__name__]
        notes.append(f"{file.parent.name}/{file.name} could not be read: {reason}")


SHOWN = TROUBLE | ENDS.keys() | {"run/start", "engine/restarting", "push/checked", "checkpoint/accepted"}
MOST_ROWS = 200  # of the log
MOST_FACTS = 160  # characters of one entry
COUNTED = {  # event -> (one, several), as the health check says it
    "engine/dead": ("engine failure", "engine failures"),
    "engine/suspect": ("slow engine", "slow engines"),
    "learners/failed": ("learner failure", "learner failures"),
    "reward/failed": ("reward actor failure", "reward actor failures"),
    "node/lost": ("node lost", "nodes lost"),
    "push/late": ("late weight push", "late weight pushes"),
    "push/fallback": ("way of pushing given up", "ways of pushing given up"),
    "step/skipped": ("step skipped, its gradient not finite", "steps skipped, their gradients not finite"),
    "share/low": ("scoring term that hardly trains", "scoring terms that hardly train"),
    "stall": ("stall", "stalls"),
    "checkpoint/failed": ("checkpoint not written", "checkpoints not written"),
    "run/failed": ("failed start", "failed starts"),
}
STATES = {"ready": "healthy", "stale": "behind", "gone": "given up"}
LEFT_OUT = set(
    "reason engine time event step phase pid host node stacks processes silent hosts pids gpu".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class FaultEntry:
    """One log line. seconds: since the run's first event; bad: a fault, no recovery or start."""

    seconds: float
    step: int | None
    what: str
    detail: str
    bad: bool


@dataclass(frozen=True)
class History:
    """Faults of a run. entries: at most MOST_ROWS, oldest first; hidden: number not shown.

    engines: (index, last state, counts of its events). summary: `4 engine failures, 1 stall`, or "".
    progress: `It stopped after 13 of 60 steps.`, "" once finished.
    """

    entries: list[FaultEntry]
    hidden: int
    engines: list[tuple[int, str, Mapping[str, int]]]
    summary: str
    progress: str


def history(events: Sequence[Mapping[str, Any]], steps: int) -> History | None:
    """Build a run's history; None without events. steps: finished, as counted in metrics.jsonl."""
    known = [e for e in events if is_number(e.get("time")) and isinstance(e.get("event"), str)]
    if not known:
        return None
    past = RunHistory(known)
    shown = [_entry(e, known[0]["time"]) for e in known if e["event"] in SHOWN]
    parts = [f"{n:,} {names[n > 1]}" for k, names in COUNTED.items() if (n := past.counts[k])]
    states = {i: STATES.get(engine.state, engine.state) for i, engine in past.engines.items()}
    engines = [(i, states.get(i, ""), counts) for i, counts in sorted(past.engine_counts.items())]
    progress = ""
    if past.now.started is not None and past.now.state != "finished":
        of = f" of {past.now.total:,}" if is_number(past.now.total) else ""
        how = "It had not ended when this page was written,"
        if past.now.state in ENDS.values():
            how = f"It {past.now.state.replace('interrupted', 'was interrupted')}"
        progress = f"{how} after {steps:,}{of} steps."
    return History(shown[:MOST_ROWS], len(shown[MOST_ROWS:]), engines, ", ".join(parts), progress)


def _entry(event: Mapping[str, Any], first: float) -> FaultEntry:
    name = event["event"]
    reason = [str(event["reason"])] if event.get("reason") else []
    facts = [f"{k.replace('_', ' ')} {v}" for k, v in event.items() if k not in LEFT_OUT]
    subject, _, what = name.partition("/")
    engine = f" {event['engine']}" if is_number(event.get("engine")) else ""
    return FaultEntry(
        max(0.0, event["time"] - first),
        event["step"] if isinstance(event.get("step"), int) else None,
        f"{subject}{engine} {what}".strip(),
        clean(" ".join("; ".join([*reason, *facts]).split()), MOST_FACTS),
        name in COUNTED,
    )


@dataclass(frozen=True)
class Rollouts:
    """Completions in the order of the steps, as prediction rows without their text.

    rows: dataset, sample_id, task, target, prediction (None if unparsed); file, row: the place in `files`.
    """

    files: list[Path]
    rows: list[dict[str, Any]]

    def part(self, late: bool) -> list[dict[str, Any]]:
        """Return the completions of the last (`late`) or first fifth of the files."""
        size = max(1, len(self.files) // SHARE)
        first = len(self.files) - size if late else 0
        return [r for r in self.rows if first <= r["file"] < first + size]

    def text(self, row: Mapping[str, Any]) -> str:
        """Read the text of a completion."""
        column = pq.ParquetFile(self.files[row["file"]]).read(columns=["completion"]).column(0)
        return column[row["row"]].as_py() or ""


def read_rollouts(training: Training, notes: list[str]) -> Rollouts | None:
    """Load the completions of a run; None if there are none."""
    rollouts, damaged = Rollouts([], []), list[str]()
    for file in sorted((training.path / "rollouts").glob("step_*.parquet")):
        with noted(file, damaged):
            for i, row in enumerate(_completions(file)):
                prediction = parse(row.pop("completion") or "").value
                rollouts.rows.append(row | {"prediction": prediction, "file": len(rollouts.files), "row": i})
            rollouts.files.append(file)
    notes += damaged[:MOST_NOTES]
    if len(damaged) > MOST_NOTES:
        notes.append(f"{len(damaged) - MOST_NOTES} more files of rollouts could not be read")
    return rollouts if rollouts.rows else None


def _completions(file: Path) -> list[dict[str, Any]]:
    """Read ROLLOUT_COLUMNS of a file. Raises ValueError naming a missing or invalid column."""
    table = pq.ParquetFile(file).read(columns=ROLLOUT_COLUMNS)
    for name in ROLLOUT_COLUMNS:
        if name not in table.column_names:
            raise ValueError(f"no column {name}")
    if not pa.types.is_string(table.schema.field("completion").type):
        raise ValueError("column completion holds no text")
    return table.to_pylist()
