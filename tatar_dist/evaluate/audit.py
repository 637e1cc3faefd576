"""`tatar-dist metrics FILE [--json] [--bootstrap N]`: agreement with opinions by data set.

The file holds JSON lines `{dataset, task, target, prediction}` or `{dataset, task, target, completion}`, or Parquet
with these columns. A prediction of null or NaN is an unparsed output; `finish_reason: length` or `truncated: true`
marks a truncated one. The result is `{"datasets": {NAME: {...}}}`. A name used for both tasks is split into NAME/iqa
and NAME/iaa, since their scores are not comparable.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tatar_dist.errors import UserError
from tatar_dist.evaluate.metrics import DatasetMetrics, score_metrics, set_names
from tatar_dist.prompts.answer import parse
from tatar_dist.rewards import audit


@dataclass(frozen=True)
class PredictionRow(audit.LabelledRow):
    prediction: audit.Number | None = None


def run(
    file: str | Path, *, bootstrap: int = 0, ci_all: bool = False, unparsed: str = "drop", seed: int = 0
) -> dict[str, DatasetMetrics]:
    """Compute metrics by data set name, in order of appearance.

    Args:
        bootstrap: rounds of the 95 % intervals; 0 = none.
        ci_all: intervals of every metric instead of SRCC and PLCC only.
        unparsed: drop | midpoint.

    Raises:
        UserError: no such file, no rows, `bootstrap` below 0, or a bad row as `FILE:LINE: what is wrong`.
    """
    if bootstrap < 0:
        raise UserError(f"--bootstrap {bootstrap}: must not be negative")
    rows_of: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line, row in audit.numbered_rows(file, nan=True):
        wrong = row if isinstance(row, str) else row_error(row)
        if wrong is not None:
            raise UserError(f"{file}:{line}: {wrong}")
        assert isinstance(row, dict)  # row_error has seen it
        rows_of.setdefault((row["dataset"], row["task"]), []).append(row)
    if not rows_of:
        raise UserError(f"{file}: no rows")
    names = set_names(rows_of)
    result = {}
    for pair, rows in rows_of.items():
        predictions = [r["prediction"] if "prediction" in r else parse(r["completion"]).value for r in rows]
        result[names[pair]] = score_metrics(
            [r["target"] for r in rows],
            np.array(predictions, np.float64),  # None becomes NaN
            unparsed=unparsed,
            n_truncated=sum(r.get("finish_reason") == "length" or r.get("truncated") is True for r in rows),
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


def as_json(result: dict[str, DatasetMetrics]) -> dict[str, Any]:
    """Return the `--json` object."""
    return {"datasets": {name: metrics.to_dict() for name, metrics in result.items()}}
