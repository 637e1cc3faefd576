"""Compute every reward term of completions in a file: `tatar-dist rewards FILE --preset P`.

The file (JSON lines, or a run's rollouts Parquet) has group_id, task, dataset, target and completion, and is one global
batch. The output adds parsed, gaussian, pairwise, thurstone, format, length, reward and advantage to every line, null
where a term does not apply, and any other term that the preset weighs. All terms are computed up to ALL_TERMS_LIMIT
rows or on request; above it only the preset's, as pairwise is quadratic in the completions. Needs no GPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
from annotated_types import Ge, Le
from pydantic import AfterValidator, BeforeValidator, Field, Strict, TypeAdapter, ValidationError
from pydantic_core import PydanticKnownError

from tatar_dist.assets import looked_in
from tatar_dist.config.validate import fault, first, shown
from tatar_dist.errors import UserError
from tatar_dist.rewards import links
from tatar_dist.rewards.batch import Answers, Batch, batch_of_rows, disagreement
from tatar_dist.rewards.metrics import reward_metrics
from tatar_dist.rewards.presets import Preset, load_preset
from tatar_dist.rewards.score import BatchScores, ranked_groups, rows_of_term, score_batch
from tatar_dist.rewards.thurstone import comparison_of, pair_terms, reward_of_mean
from tatar_dist.run.files import writing, written_whole
from tatar_dist.types import Task

ALL_TERMS_LIMIT = 20_000  # rows
COLUMNS = ("gaussian", "pairwise", "thurstone", "format", "length")


def _number(value: Any) -> Any:
    """Refuse a Decimal of a Parquet file: pydantic takes it for a number, JSON cannot write it."""
    if not isinstance(value, int | float):
        raise PydanticKnownError("float_type")
    return value


StrictText = Annotated[str, Strict()]
Number = Annotated[float, BeforeValidator(_number), Strict(), Field(allow_inf_nan=False)]


def _id(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"must be a text or a number, is {shown(value)}")
    return value


@dataclass(frozen=True)
class LabelledRow:
    """Keys that rows of `tatar-dist rewards` and of `metrics` share; more keys are allowed."""

    task: Task
    dataset: StrictText
    target: Annotated[Number, Ge(0), Le(100)]


@dataclass(frozen=True)
class CompletionRow(LabelledRow):
    group_id: Annotated[Any, AfterValidator(_id)]
    completion: StrictText
    score_std: Annotated[Number, Ge(0)] | None = None
    tokens: Annotated[Number, Ge(0)] | None = None


@dataclass(frozen=True)
class Audit:
    """A scored file. rows: the input dicts kept; warnings: lines for stderr."""

    rows: list[dict[str, Any]]
    batch: Batch
    preset: Preset
    scored: BatchScores
    warnings: list[str]

    def lines(self) -> Iterator[str]:
        """Yield the output, one JSON object per row, without line ends."""
        columns = {k: [None if math.isnan(v) else v for v in column.tolist()] for k, column in self.columns().items()}
        for n, row in enumerate(self.rows):
            line = {**row, **{key: values[n] for key, values in columns.items()}}
            yield json.dumps(line, default=str)  # str: of a Parquet file's own columns, dates for example

    def columns(self) -> dict[str, np.ndarray]:
        """Return the added columns by name, (N,) float64, NaN where a term does not apply."""
        unknown = np.full(len(self.rows), np.nan)
        terms = dict.fromkeys((*COLUMNS, *self.preset.weights))
        return {
            "parsed": self.scored.answers.value,
            **{term: self.scored.terms.get(term, unknown) for term in terms},
            "reward": self.scored.reward,
            "advantage": self.scored.advantage,
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
    scale: str = "group",
) -> Audit:
    """Read, check and score a file.

    Args:
        all_terms: True computes every term, False only the preset's; None decides by the number of rows.
        lenient: drop and count bad rows, and read answers leniently.

    Raises:
        UserError: no such file, or a bad row, as `FILE:LINE: what is wrong`.
    """
    loaded = load_preset(preset, weights, params)
    rows, dropped = read_rows(file, lenient)
    if not rows:
        raise UserError(f"{file}: no rows" + (f" left, {dropped} dropped" if dropped else ""))
    batch = batch_of_rows(rows)
    every = len(rows) <= ALL_TERMS_LIMIT if all_terms is None else all_terms
    scored = score_batch(
        batch, loaded, terms=COLUMNS if every else (), strict=not lenient, advantage=advantage, scale=scale
    )
    warnings = [f"{file}: {dropped} bad rows dropped"] if dropped else []
    if left_out := [t for t in COLUMNS if t not in scored.terms]:
        warnings.append(f"{len(rows)} rows: {', '.join(left_out)} not computed (preset weight 0); --all-terms does")
    if scored.unrankable.any():
        first_row = np.unique(batch.group, return_index=True)[1]
        counts = np.bincount(batch.dataset[first_row][scored.unrankable], minlength=len(batch.datasets))
        named = [f"{name!r}: {n} group(s)" for name, n in zip(batch.datasets, counts, strict=True) if n]
        warnings.append(f"no other image to be ranked against, so that the Thurstone term is 0: {', '.join(named)}")
    return Audit(rows, batch, loaded, scored, warnings)


def write(audits: Sequence[Audit], output: str | Path | None, stdout: IO[str]) -> None:
    """Write the lines to `output`, None: `stdout`. The file appears whole or not at all."""
    lines = (line + "\n" for audit in audits for line in audit.lines())
    if output is None:
        stdout.writelines(lines)
        return
    path = Path(output)
    with writing(path), written_whole(path) as place, place.open("w", encoding="utf-8") as f:
        f.writelines(lines)


def summary(audits: Sequence[Audit]) -> dict[str, Any]:
    """Count rows and parsed rows; average columns, and metrics over the files that have them."""
    columns = [audit.columns() for audit in audits]
    joined = {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
    metrics = [reward_metrics(a.batch, a.scored) for a in audits]
    averaged = sorted(
        {
            k
            for m in metrics
            for k in m
            if k.startswith(("reward/frac_zero_std/total", "reward/agreement", "reward/share"))
        }
    )
    return {
        "preset": audits[0].preset.name,
        "files": len(audits),
        "rows": sum(len(a.rows) for a in audits),
        "parsed": int((~np.isnan(joined["parsed"])).sum()),
        "mean": {name: _mean(values) for name, values in joined.items() if name not in ("parsed", "advantage")},
        "metrics": {k: _mean(np.array([m.get(k, math.nan) for m in metrics])) for k in averaged},
    }


def _mean(values: np.ndarray) -> float | None:
    """Return the mean of what is not NaN; None if all is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


@dataclass(frozen=True)
class Opponent:
    """A comparison behind a Thurstone reward. Scores in points; `weight`: its share of the mean."""

    group_id: str
    target: float
    mean: float
    variance: float
    p: float
    q: float
    weight: float
    reward: float


def explain(batch: Batch, answers: Answers, preset: Preset, row: int) -> list[Opponent]:
    """Return the opponents of row `row` (from 0) with their weights, heaviest first.

    Their weighted mean is the reward before its clamp, of `regret` its nats. Empty where the term does not apply, the
    row is unparsed or its pool cannot rank.
    """
    params, index = preset.thurstone, rows_of_term(batch, preset, "thurstone")
    if row not in index or not answers.parsed[row]:
        return []
    _, stats, groups = ranked_groups(batch, answers, preset, index)
    i = int(np.searchsorted(groups, batch.group[row]))
    rivals = np.flatnonzero((stats.pool == stats.pool[i]) & (stats.n_parsed > 0))
    rivals = rivals[rivals != i]
    c = comparison_of(i, rivals, stats, params)
    z = (answers.score[row] - c.mu) * c.inverse_scale
    q, _ = links.probabilities(z, params.link)
    reward = pair_terms(c.p, c.not_p, z, params) - c.entropy
    if params.measure == "bce":
        reward = 1.0 + reward / math.log(params.eps)
    columns = (stats.g[rivals], stats.mu[rivals], stats.v[rivals], c.p, q, c.w, reward)
    ids = [str(batch.group_ids[group]) for group in groups[rivals]]
    table = [Opponent(*values) for values in zip(ids, *(x.tolist() for x in columns), strict=True)]
    return sorted(table, key=lambda o: -o.weight)


def explain_table(audit: Audit, row: int) -> str:
    """Tabulate what is behind the Thurstone reward of row `row` (from 1). Raises UserError."""
    if not 1 <= row <= len(audit.rows):
        raise UserError(f"--explain {row}: the file has rows 1 to {len(audit.rows)}")
    value = audit.scored.answers.value[row - 1]
    text = "unparsed" if math.isnan(value) else f"{value:g}"
    head = f"row {row}: group {audit.rows[row - 1]['group_id']}, target {audit.batch.target[row - 1]:g}, answer {text}"
    table = explain(audit.batch, audit.scored.answers, audit.preset, row - 1)
    if not table:
        return head + "\nno Thurstone comparison: unparsed, another task's term, or no other image in its pool"
    regret = audit.preset.thurstone.measure == "regret"
    last = "regret" if regret else "reward"
    lines = [head, f"{'opponent':24} {'target':>7} {'mean':>7} {'sd':>6} {'P':>7} {'Q':>7} {'weight':>7} {last:>7}"]
    for o in table:
        points = f"{o.target:7.2f} {o.mean:7.2f} {math.sqrt(o.variance):6.2f}"
        # what tells ids apart stands at their end
        name = o.group_id if len(o.group_id) <= 24 else "…" + o.group_id[-23:]
        lines.append(f"{name:24} {points} {o.p:7.4f} {o.q:7.4f} {o.weight:7.4f} {o.reward:7.4f}")
    mean = sum(o.weight * o.reward for o in table)
    pays = f" nats, which pay {paid(mean, audit.preset):.6f}" if regret else ""
    return "\n".join([*lines, f"weighted mean {mean:.6f}{pays}"])


def paid(mean: float, preset: Preset) -> float:
    """Return the Thurstone term of a weighted mean of `explain`'s rewards."""
    if preset.thurstone.measure == "regret":
        return float(reward_of_mean(np.array(mean), preset.thurstone))
    return min(max(mean, 0.0), 1.0)


def read_rows(file: str | Path, lenient: bool = False) -> tuple[list[dict[str, Any]], int]:
    """Return the checked rows and the number dropped (`lenient`). UserError names FILE:LINE."""
    rows: list[dict[str, Any]] = []
    first_rows: dict[Any, Mapping] = {}
    dropped = 0
    for line, row in numbered_rows(file):
        problem = row if isinstance(row, str) else row_error(row) or disagreement(row, first_rows)
        if isinstance(row, dict) and not problem:
            rows.append(row)
        elif lenient:
            dropped += 1
        else:
            raise UserError(f"{file}:{line}: {problem}")
    return rows, dropped


def numbered_rows(file: str | Path, nan: bool = False) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (line number from 1, row or what is wrong with the line). Skips blank lines.

    `nan`: read NaN and Infinity, which are no JSON but which Python writes; else such a line is wrong. Raises UserError
    for a file that is missing or cannot be read as JSON lines or Parquet.
    """
    path = Path(file)
    if not path.is_file():
        raise UserError(f"{file}: no such file{looked_in(file)}")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
        except (pyarrow.ArrowException, OSError) as e:
            raise UserError(f"{file}: not readable as Parquet: {str(e).splitlines()[0]}") from None
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
        row = json.loads(text)
        if not nan:
            json.dumps(row, allow_nan=False)  # raises for 1e999, too, which reads as infinity
    except (ValueError, RecursionError) as e:
        return f"not valid JSON: {e}"
    return row if isinstance(row, dict) else "expected a JSON object"


@cache
def _adapter(schema: Any) -> TypeAdapter:
    return TypeAdapter(schema)


def row_error(row: dict[str, Any], schema: Any = CompletionRow) -> str | None:
    """Return what is wrong with a row, or None."""
    try:
        _adapter(schema).validate_python(row)
    except ValidationError as e:
        return fault(first(e), schema)
    return None
