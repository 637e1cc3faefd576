"""Compute every reward term of the completions in a file: `tatar-dist rewards FILE --preset P`. Needs no GPU.

The file (JSON lines, or a run's rollouts Parquet) has group_id, task, dataset, target and completion, and is one global
batch. The output adds parsed, gaussian, pairwise, thurstone, format, length, reward and advantage to every line, null
where a term does not apply, and any other term that the preset weighs. All terms are computed up to ALL_TERMS_LIMIT
rows or on request; above it only the preset's, because the pairwise term is quadratic in the completions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from tatar_dist.assets import looked_in
from tatar_dist.errors import UserError
from tatar_dist.rewards.batch import Batch, batch_of_rows, disagreement
from tatar_dist.rewards.explain import explain
from tatar_dist.rewards.metrics import reward_metrics
from tatar_dist.rewards.presets import Preset, load_preset
from tatar_dist.rewards.score import BatchScores, score_batch
from tatar_dist.run.files import writing, written_whole
from tatar_dist.types import TASKS

ALL_TERMS_LIMIT = 20_000  # rows
COLUMNS = ("gaussian", "pairwise", "thurstone", "format", "length")
MAX_SAID = 20  # data sets named in warnings before the rest is summed up


@dataclass(frozen=True)
class Audit:
    """What `run` found. rows: the input dicts kept, in order; warnings: lines for stderr; dropped: rows, with lenient.
    strict: how answers were read."""

    rows: list[dict[str, Any]]
    batch: Batch
    preset: Preset
    scored: BatchScores
    dropped: int = 0
    strict: bool = True
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The output, one JSON object per row, without line ends."""
        columns = self.columns()
        for n, row in enumerate(self.rows):
            yield json.dumps({**row, **{key: values[n] for key, values in columns.items()}})

    def columns(self) -> dict[str, list[float | None]]:
        """The added columns by name, each of N floats or None."""
        extra = [t for t in self.preset.active if t not in COLUMNS]
        return {
            "parsed": _or_none(self.scored.answers.value),
            **{t: _or_none(self.scored.terms.get(t, np.full(len(self.rows), np.nan))) for t in (*COLUMNS, *extra)},
            "reward": _or_none(self.scored.reward),
            "advantage": _or_none(self.scored.advantage),
        }


def run(
    file: str | Path,
    preset: str = "tatar",
    *,
    weights: dict[str, float] | None = None,
    params: dict[str, Any] | None = None,
    all_terms: bool | None = None,
    lenient: bool = False,
    advantage: str = "std",
) -> Audit:
    """Read, check and score a file.

    Args:
        all_terms: True computes every term, False only the preset's; None decides by the number of rows.
        lenient: drop and count bad rows, and read answers leniently.

    Raises:
        UserError: no such file, or a bad row, as `FILE:LINE: what is wrong`.
    """
    chosen = load_preset(preset, weights, params)
    rows, dropped = read_rows(file, lenient)
    if not rows:
        raise UserError(f"{file}: no rows" + (f" left, {dropped} dropped" if dropped else ""))
    batch = batch_of_rows(rows)
    every = len(rows) <= ALL_TERMS_LIMIT if all_terms is None else all_terms
    scored = score_batch(batch, chosen, terms=COLUMNS if every else None, strict=not lenient, advantage=advantage)
    warnings = [] if not dropped else [f"{file}: {dropped} bad rows dropped"]
    left_out = [t for t in COLUMNS if t not in scored.terms]
    if left_out:
        warnings.append(f"{len(rows)} rows: {', '.join(left_out)} not computed (preset weight 0); --all-terms does")
    return Audit(rows, batch, chosen, scored, dropped, not lenient, warnings + _unrankable_warnings(batch, scored))


def write(audits: Sequence[Audit], output: str | Path | None, stdout: IO[str]) -> None:
    """Write the lines to `output`, or to `stdout` when it is None. The file appears whole or not at all."""
    if output is None:
        for audit in audits:
            stdout.writelines(line + "\n" for line in audit.lines())
        return
    path = Path(output)
    with writing(path), written_whole(path) as place, place.open("w", encoding="utf-8") as f:
        for audit in audits:
            f.writelines(line + "\n" for line in audit.lines())


def summary(audits: Sequence[Audit]) -> dict[str, Any]:
    """Rows, parsed rows, the mean of every column, and the batches' metrics averaged over the files that have them."""
    rows = [audit.columns() for audit in audits]
    names = [n for n in rows[0] if n not in ("parsed", "advantage")]
    metrics = [reward_metrics(a.batch, a.scored) for a in audits]
    shown = sorted({k for m in metrics for k in m if k.startswith(("reward/frac_zero_std/total", "reward/agreement"))})
    return {
        "preset": audits[0].preset.name,
        "files": len(audits),
        "rows": sum(len(a.rows) for a in audits),
        "parsed": sum(v is not None for columns in rows for v in columns["parsed"]),
        "mean": {name: _mean([v for columns in rows for v in columns[name]]) for name in names},
        "metrics": {k: _mean([None if math.isnan(v := m.get(k, math.nan)) else v for m in metrics]) for k in shown},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean over the rows a term applies to; None when there are none."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def explain_table(audit: Audit, row: int) -> str:
    """A readable table of the comparisons behind the Thurstone reward of row `row` (from 1). Raises UserError."""
    if not 1 <= row <= len(audit.rows):
        raise UserError(f"--explain {row}: the file has rows 1 to {len(audit.rows)}")
    value = audit.scored.answers.value[row - 1]
    text = "unparsed" if math.isnan(value) else f"{value:g}"
    head = f"row {row}: group {audit.rows[row - 1]['group_id']}, target {audit.batch.target[row - 1]:g}, answer {text}"
    table = explain(audit.batch, audit.preset, row - 1, audit.strict)
    if not table:
        return head + "\nno Thurstone comparison: unparsed, another task's term, or no other image in its pool"
    lines = [head, f"{'opponent':24} {'target':>7} {'mean':>7} {'sd':>6} {'P':>7} {'Q':>7} {'weight':>7} {'reward':>7}"]
    for group_id, o in table:
        points = f"{o.target:7.2f} {o.mean:7.2f} {math.sqrt(o.variance):6.2f}"
        name = group_id if len(group_id) <= 24 else "…" + group_id[-23:]  # what tells ids apart stands at their end
        lines.append(f"{name:24} {points} {o.p:7.4f} {o.q:7.4f} {o.weight:7.4f} {o.reward:7.4f}")
    return "\n".join([*lines, f"weighted mean {sum(o.weight * o.reward for _, o in table):.6f}"])


def read_rows(file: str | Path, lenient: bool = False) -> tuple[list[dict[str, Any]], int]:
    """The checked rows and how many were dropped (only with `lenient`). Raises UserError naming FILE:LINE."""
    rows: list[dict[str, Any]] = []
    groups: dict[Any, tuple] = {}
    dropped = 0
    for line, raw in numbered_rows(file):
        row, wrong = (raw, row_error(raw)) if isinstance(raw, dict) else ({}, str(raw))
        if wrong is None:
            key = (row["task"], row["dataset"], float(row["target"]))
            before = groups.setdefault(row["group_id"], key)
            wrong = None if before == key else disagreement(row["group_id"], before, key)
        if wrong is None:
            rows.append(row)
        elif lenient:
            dropped += 1
        else:
            raise UserError(f"{file}:{line}: {wrong}")
    return rows, dropped


def numbered_rows(file: str | Path, nan: bool = False) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number from 1, row), or (line number, what is wrong with the line). Blank lines are skipped.

    `nan`: the word NaN, which is no JSON but which Python writes, is read as such; else the line is wrong.

    Raises UserError for a file that is missing or cannot be read as JSON lines or Parquet.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: no such file{looked_in(file)}")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            loaded = pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as e:
            raise UserError(f"{file}: not readable as Parquet: {str(e).splitlines()[0]}") from None
        yield from enumerate(loaded, 1)
        return
    try:
        with path.open(encoding="utf-8-sig") as f:
            for number, text in enumerate(f, 1):
                if text.strip():
                    yield number, _json_object(text, nan)
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text") from None
    except OSError as e:
        raise UserError(f"{file}: cannot be read: {e.strerror or e}") from None


def _json_object(text: str, nan: bool) -> dict[str, Any] | str:
    try:
        row = json.loads(text, parse_constant=_only_nan if nan else _refuse_constant, parse_float=_finite_float)
    except (ValueError, RecursionError) as e:
        return f"not valid JSON: {e}"
    return row if isinstance(row, dict) else "expected a JSON object"


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _only_nan(name: str) -> float:
    return math.nan if name == "NaN" else _refuse_constant(name)


def _finite_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):  # 1e999 is valid JSON, but could not be written again
        raise ValueError(f"{text} is too large for a finite number")
    return value


def row_error(row: dict[str, Any]) -> str | None:
    """What is wrong with one row of the `rewards` contract, or None."""
    for key in ("group_id", "task", "dataset", "target", "completion"):
        if row.get(key) is None:
            return f"{key} is missing"
    if isinstance(row["group_id"], bool) or not isinstance(row["group_id"], (str, int, float)):
        return f"group_id {row['group_id']!r} must be a text or a number"
    return common_error(row) or (None if isinstance(row["completion"], str) else "completion must be a text")


def common_error(row: dict[str, Any]) -> str | None:
    """What is wrong with a row's task, dataset or target, or None; shared with `tatar-dist metrics`."""
    for key in ("task", "dataset", "target"):
        if row.get(key) is None:
            return f"{key} is missing"
    if row["task"] not in TASKS:
        return f"task {row['task']!r} must be one of {', '.join(TASKS)}"
    if not isinstance(row["dataset"], str):
        return f"dataset {row['dataset']!r} must be a text"
    return number_error("target", row["target"], bounded=True)  # NaN among them


def number_error(key: str, value: Any, bounded: bool) -> str | None:
    """What is wrong with a number, or None; `bounded` demands 0-100."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{key} {value!r} must be a number"
    try:
        finite = math.isfinite(float(value))  # 1e999 is valid JSON and reads as infinity
    except OverflowError:  # an integer of hundreds of digits
        finite = False
    if not finite:
        return f"{key} must be a finite number"
    if bounded and not 0 <= value <= 100:
        return f"{key} {value:g} lies outside 0-100"
    return None


def _or_none(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(x) else x for x in values.tolist()]


def _unrankable_warnings(batch: Batch, scored: BatchScores) -> list[str]:
    """One line per data set with images that could not be ranked."""
    if not scored.unrankable.any():
        return []
    first = np.unique(batch.group, return_index=True)[1]
    counts = np.bincount(batch.dataset[first][scored.unrankable], minlength=len(batch.datasets))
    names = [batch.datasets[i] for i in np.flatnonzero(counts)]
    lines = [
        f"data set {name!r}: {counts[batch.datasets.index(name)]} group(s) have no other image to be ranked against; "
        "their Thurstone term is 0"
        for name in names[:MAX_SAID]
    ]
    return lines if len(names) <= MAX_SAID else [*lines, f"… and {len(names) - MAX_SAID} more data sets"]
