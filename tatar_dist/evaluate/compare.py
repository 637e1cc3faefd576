"""`tatar-dist compare A B`: paired comparison of two evaluations of the same samples.

Reads predictions.parquet of both directories. For each data set it reports both SRCC and PLCC, and their difference
with a 95 % interval and a p-value from a paired bootstrap. Resampling is by source photograph where the manifest names
one, since crops of one photograph are not independent. PLCC's percentiles are expanded for few pictures; those of SRCC,
whose resamples have ties, reject too seldom without. Samples in only one evaluation are counted and excluded.
Unparsed answers count as 50, so that refusing hard samples gains nothing; the figures then differ from those of an
evaluation that drops them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tatar_dist.assets import looked_in
from tatar_dist.errors import UserError
from tatar_dist.evaluate import bootstrap
from tatar_dist.evaluate.bootstrap import Statistic
from tatar_dist.evaluate.metrics import plcc, set_names, srcc, usable
from tatar_dist.evaluate.tables import print_table

ROUNDS = 2000
LEAST = 6  # pictures, or source photographs, below which resampling says nothing of chance
STATISTICS = {"srcc": srcc, "plcc": plcc}
COLUMNS = ["sample_id", "dataset", "task", "source", "target"]
# other answers than the greedy ones, and the key of an evaluation that asks for them
MADE_BY = {"expected": "evaluate.expected=true", "sample_mean": "evaluate.samples=5", "direct": "evaluate.direct=true"}
Row = dict[str, Any]  # of predictions.parquet


def run(
    before: Path,
    after: Path,
    *,
    columns: tuple[str, str] = ("prediction", "prediction"),
    rounds: int = ROUNDS,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the settings and, under "datasets", {NAME: {n, only_*, srcc, plcc, ...}}.

    only_*: only_before, only_after. Each statistic has before, after, difference, ci95, p and reason (of a None).
    columns: of predictions.parquet, which answers of each side are compared.

    Raises:
        UserError: no predictions in a directory, none in common, different targets for a sample, or `rounds` below 1.
    """
    if rounds < 1:
        raise UserError(f"--bootstrap {rounds}: must be at least 1")
    first, second = (_read(side, column) for side, column in zip((before, after), columns, strict=True))
    datasets: dict[str, Any] = {}
    names = set_names((name, task) for task, name, _ in (*first, *second))
    for name, task in sorted(names, key=lambda pair: pair[::-1]):
        first_of, second_of = ({k: v for k, v in rows.items() if k[:2] == (task, name)} for rows in (first, second))
        both = sorted(first_of.keys() & second_of.keys())
        pairs = [(first_of[key], second_of[key]) for key in both]
        for a, b in pairs:
            if a["target"] != b["target"]:
                raise UserError(
                    f"{after}: {name}/{b['sample_id']} has the target {b['target']}, in {before} it has "
                    f"{a['target']}: these are not evaluations of one manifest"
                )
        datasets[names[name, task]] = {
            "task": task,
            "n": len(both),
            "only_before": len(first_of) - len(both),
            "only_after": len(second_of) - len(both),
            "unparsed": "midpoint",
            "parsed_before": sum(a["prediction"] is not None for a, _ in pairs),
            "parsed_after": sum(b["prediction"] is not None for _, b in pairs),
            **{measure: compare_rows(statistic, pairs, rounds, seed) for measure, statistic in STATISTICS.items()},
        }
    if not any(entry["n"] for entry in datasets.values()):
        raise UserError(f"{before} and {after} have no sample in common")
    sides = {"before": str(before), "after": str(after), "columns": list(columns)}
    return {**sides, "rounds": rounds, "datasets": datasets}


def _read(directory: Path, column: str) -> dict[tuple[str, str, str], Row]:
    """Return the rows of an evaluation, the answers of `column` under "prediction"."""
    file = Path(directory) / "predictions.parquet"
    if not file.is_file():
        where = "" if Path(directory).is_dir() else f", no such directory{looked_in(directory)}"
        raise UserError(f"{directory}: no predictions.parquet in it{where}: give the output of `tatar-dist evaluate`")
    try:
        known = column in pq.read_schema(file).names
        table = pq.read_table(file, columns=[*COLUMNS, column] if known else COLUMNS)
    except (pa.ArrowInvalid, OSError) as e:
        raise UserError(f"{file}: cannot be read: {e}") from e
    if not known or (column in MADE_BY and table[column].null_count == len(table)):
        cure = f"evaluate with {MADE_BY[column]}; or none of them parses" if column in MADE_BY else "no such column"
        raise UserError(f"{file}: no score under {column!r}: {cure}")
    rows = table.rename_columns([*COLUMNS, "prediction"]).to_pylist()
    return {(r["task"], r["dataset"], r["sample_id"]): r for r in rows}


def compare_rows(
    statistic: Statistic, pairs: Sequence[tuple[Row, Row]], rounds: int = ROUNDS, seed: int = 0
) -> dict[str, Any]:
    """Compare two models' predictions of the same samples, resampled by photograph if known.

    Returns before, after, difference, ci95 and p, None where undefined, and reason: why.
    """
    target = np.array([row["target"] for row, _ in pairs], np.float64)
    a, b = (np.array([pair[i]["prediction"] for pair in pairs], np.float64) for i in (0, 1))  # None becomes NaN
    values = [statistic(*usable(target, p, "midpoint")) if pairs else math.nan for p in (a, b)]
    before, after = (value if math.isfinite(value) else None for value in values)
    entry: dict[str, Any] = {"before": before, "after": after, "difference": None, "ci95": None, "p": None}
    if before is None or after is None:
        return entry | {"reason": "a correlation does not exist: too few rows, or one side is constant"}
    cluster = np.array([row["source"] or row["sample_id"] for row, _ in pairs])
    if (n := len(set(cluster.tolist()))) < LEAST:
        return entry | {"difference": after - before, "reason": f"{n} independent pictures tell nothing of chance"}
    how: Any = {"rounds": rounds, "seed": seed, "expand": statistic is plcc}
    i = bootstrap.paired_difference(statistic, target, a, b, cluster, **how)
    if not math.isfinite(i.lo):
        return entry | {"difference": i.estimate, "reason": "too many resamples are constant"}
    return entry | {"difference": i.estimate, "ci95": [i.lo, i.hi], "p": i.p, "reason": None}


def show(result: dict[str, Any]) -> None:
    """Print one row per data set and statistic; differences significant at 5 % are bold."""
    rows, notes = [], []
    for name, m in result["datasets"].items():
        for i, statistic in enumerate(STATISTICS):
            s = m[statistic]
            lo, hi = s["ci95"] or (math.nan, math.nan)
            first = ["", ""] if i else [name, str(m["n"])]
            cells = [_cell(s["before"]), _cell(s["after"]), _cell(s["difference"], "+")]
            interval = f"{lo:+.3f} to {hi:+.3f}" if s["ci95"] else "—"
            rows.append((lo > 0 or hi < 0, [*first, statistic.upper(), *cells, interval, _cell(s["p"])]))
        notes += [f"{name}: {k.upper()}: {m[k]['reason']}" for k in STATISTICS if m[k]["reason"]]
        if m["only_before"] or m["only_after"]:
            notes.append(f"{name}: {m['only_before']} samples only in A, {m['only_after']} only in B: left out")
        if m["parsed_before"] < m["n"] or m["parsed_after"] < m["n"]:
            parsed = f"{m['parsed_before']} and {m['parsed_after']} parsed"
            notes.append(f"{name}: of {m['n']} answers {parsed}, the others are 50")
    head = ("data set", "n", "", "A", "B", "B - A", "95 % interval", "p")
    a, b = (
        result[side] + ("" if column == "prediction" else f" ({column})")
        for side, column in zip(("before", "after"), result["columns"], strict=True)
    )
    print_table(f"B = {b} against A = {a}", head, rows, notes)


def _cell(value: float | None, sign: str = "") -> str:
    return "—" if value is None else format(value, f"{sign}.3f")
