"""`tatar-dist metrics FILE [--json] [--bootstrap N]`: agreement with opinion scores by data set, from a file.

The file holds JSON lines `{dataset, task, target, prediction}` or `{dataset, task, target, completion}`, or Parquet
with these columns. A prediction of null or NaN is an unparsed output; `finish_reason: length` or `truncated: true`
marks a truncated one. The result is `{"datasets": {NAME: {...}}}`. A name used for both tasks is split into NAME/iqa
and NAME/iaa, since their scores are not comparable.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tatar_dist.errors import UserError
from tatar_dist.evaluate.metrics import DatasetMetrics, score_metrics, set_names
from tatar_dist.evaluate.tables import notes_of
from tatar_dist.prompts.answer import parse
from tatar_dist.rewards import audit


@dataclass(frozen=True)
class PredictionRow(audit.LabelledRow):
    prediction: audit.Number | None = None


def run(
    file: str | Path,
    *,
    bootstrap: int = 0,
    ci_all: bool = False,
    unparsed: str = "drop",
    strict: bool = True,
    seed: int = 0,
) -> dict[str, DatasetMetrics]:
    """Compute metrics by data set name, in order of appearance.

    Args:
        bootstrap: rounds of the 95 % intervals; 0 = none.
        ci_all: intervals of every metric instead of SRCC and PLCC only.
        unparsed: drop | midpoint.
        strict: whether to parse completions with the strict answer grammar.

    Raises:
        UserError: no such file, no rows, `bootstrap` below 0, or a bad row as `FILE:LINE: what is wrong`.
    """
    if bootstrap < 0:
        raise UserError(f"--bootstrap {bootstrap}: must not be negative")
    entries_of: dict[tuple[str, str], list[tuple[float, float | None, bool]]] = {}
    for line, row in audit.numbered_rows(file, nan=True):
        wrong = row if isinstance(row, str) else row_error(row)
        if wrong is not None:
            raise UserError(f"{file}:{line}: {wrong}")
        assert isinstance(row, dict)  # row_error has seen it
        truncated = row.get("finish_reason") == "length" or row.get("truncated") is True
        entry = (row["target"], _prediction(row, strict), truncated)
        entries_of.setdefault((row["dataset"], row["task"]), []).append(entry)
    if not entries_of:
        raise UserError(f"{file}: no rows")
    names = set_names(entries_of)
    result = {}
    for pair, entries in entries_of.items():
        target, prediction, truncated = zip(*entries, strict=True)
        result[names[pair]] = score_metrics(
            target,
            prediction,
            unparsed=unparsed,
            n_truncated=sum(truncated),
            bootstrap=bootstrap,
            ci_all=ci_all,
            seed=seed,
        )
    return result


def row_error(row: dict[str, Any]) -> str | None:
    """Return the error in a row of the `metrics` contract, or None."""
    unparsed = row.get("prediction") != row.get("prediction")  # NaN, as null
    wrong = audit.row_error({**row, "prediction": None} if unparsed else row, PredictionRow)
    if wrong is None and "prediction" not in row and not isinstance(row.get("completion"), str):
        return "prediction or completion is missing"
    return wrong


def _prediction(row: dict[str, Any], strict: bool) -> float | None:
    return row["prediction"] if "prediction" in row else parse(row["completion"], strict).value


def as_json(result: dict[str, DatasetMetrics]) -> dict[str, Any]:
    """Return the `--json` object."""
    return {"datasets": {name: metrics.to_dict() for name, metrics in result.items()}}


def as_table(result: dict[str, DatasetMetrics]) -> str:
    """Format a plain-text table, followed by its notes."""
    width = max(len("dataset"), *(len(name) for name in result))
    columns = ("srcc", "plcc", "krcc", "plcc_fitted", "rmse", "mae")
    lines = [f"{'dataset':{width}} {'n':>6} {'parsed':>6} {'truncated':>9} " + " ".join(f"{c:>11}" for c in columns)]
    for name, m in result.items():
        cells = [f"{'—' if v is None else format(v, '.4f'):>11}" for v in (getattr(m, c) for c in columns)]
        lines.append(f"{name:{width}} {m.n:6d} {m.n_parsed:6d} {m.n_truncated:9d} " + " ".join(cells))
    return "\n".join([*lines, *notes_of(as_json(result))])
