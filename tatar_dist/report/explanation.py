"""Explain the rewards of sampled groups term by term, with the comparisons behind a Thurstone term.

Reads the last file of RUN/rollouts and the run's reward configuration. For each task, the groups with the largest
reward spread (the strongest training signal), the highest and the lowest mean reward are returned as `Explained`. Terms
are read from the file. Comparisons are recomputed as in `tatar-dist rewards FILE --explain ROW`; a value that differs
from the logged one is marked (`Comparisons.agrees`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tatar_dist.errors import UserError
from tatar_dist.prompts.answer import parse
from tatar_dist.report.gallery import Key, key_of, rationale
from tatar_dist.report.reading import DAMAGE, Rollouts, Training, clean, damage_note, is_number
from tatar_dist.report.verdict import TASK_NAMES
from tatar_dist.rewards import audit
from tatar_dist.rewards.presets import load_preset, preset_names

KNOWN = {  # columns of a rollouts file that are no reward term (run/directory.py)
    "step", "group_id", "index", "sample_id", "dataset", "task", "target", "completion", "tokens", "finish_reason",
    "logprob_sum", "weight_version", "parsed", "reward", "advantage", "trained",
}  # fmt: skip
MOST_OPPONENTS = 8
APART = 1e-6  # more than rounding between a logged term and the same one computed again


@dataclass(frozen=True)
class Comparisons:
    """Opponents behind the Thurstone term of one completion, by falling weight; others: how many are not listed."""

    row: dict[str, Any]
    answer: float | None
    opponents: list[tuple[str, audit.Opponent]]
    others: int
    mean: float

    @property
    def agrees(self) -> bool:
        return abs(min(max(self.mean, 0.0), 1.0) - self.row["thurstone"]) <= APART


@dataclass(frozen=True)
class Explained:
    """One group. terms: names; completions: (row of the file, answer, rationale) by falling reward;
    comparisons: of its best and worst answers."""

    why: str
    task: str
    key: Key
    terms: list[str]
    completions: list[tuple[dict[str, Any], float | None, str]]
    comparisons: list[Comparisons]


def explanations(training: Training, rollouts: Rollouts | None, notes: list[str]) -> list[Explained]:
    """Return up to three groups per task from the newest rollouts file; [] if it holds no valid rows.

    `rollouts` are those of this training. A damaged file that is missing from them is already in `notes`.
    """
    files = sorted((training.path / "rollouts").glob("step_*.parquet"))
    if not files:
        return []
    try:
        rows = pq.ParquetFile(files[-1]).read().to_pylist()
    except DAMAGE as e:
        if rollouts is not None and files[-1] in rollouts.files:  # the damage is in a column that was not read there
            notes.append(damage_note(files[-1], e))
        return []
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        if _valid(row):
            groups.setdefault((row["task"], row["group_id"]), []).append(i)
    scored = _audit(files[-1], rows, training.config, notes)
    result = []
    for task in TASK_NAMES:
        of_task = [members for (name, _), members in groups.items() if name == task]
        for why, members in _chosen(rows, of_task):
            result.append(_explained(why, rows, members, scored))
    return result


def _valid(row: Mapping[str, Any]) -> bool:
    return row.get("group_id") is not None and is_number(row.get("reward")) and audit.row_error(dict(row)) is None


def _chosen(rows: Sequence[Mapping[str, Any]], groups: Sequence[list[int]]) -> list[tuple[str, list[int]]]:
    """Return (why, members) of the selected groups, without duplicates. groups: positions of each group's rows."""
    if not groups:
        return []
    rewards = [np.array([rows[i]["reward"] for i in members], np.float64) for members in groups]
    spreads, means = [r.std() for r in rewards], [r.mean() for r in rewards]
    picks: dict[int, str] = {}
    for why, pick in (
        ("Rewards furthest apart: this group teaches most", np.argmax(spreads)),
        ("Highest mean reward", np.argmax(means)),
        ("Lowest mean reward", np.argmin(means)),
    ):
        picks.setdefault(int(pick), why)
    return [(why, groups[i]) for i, why in picks.items()]


def _audit(
    file: Path, rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], notes: list[str]
) -> audit.Audit | None:
    """Score the step's batch again as the reward actor did; None without a Thurstone term or a usable preset."""
    if not any(is_number(r.get("thurstone")) for r in rows):
        return None
    reward = config.get("reward")
    reward = reward if isinstance(reward, Mapping) else {}
    name = str(reward.get("preset", "tatar"))
    try:
        if name not in preset_names():  # a user's preset may name Python code, which a report does not run
            raise UserError(f"the comparisons behind its reward: preset {clean(name)} is not one of ours")
        weights, params = (dict(reward.get(k) or {}) for k in ("weights", "params"))
        load_preset(name, weights, params)
        return audit.run(file, name, weights=weights, params=params, all_terms=False)
    except (UserError, TypeError, ValueError) as e:
        notes.append(str(e).splitlines()[0])
        return None


def _explained(
    why: str, rows: Sequence[dict[str, Any]], members: Sequence[int], scored: audit.Audit | None
) -> Explained:
    by_reward = sorted(members, key=lambda i: -rows[i]["reward"])
    answers = {i: parse(rows[i]["completion"]).value for i in by_reward}
    answered = [i for i, value in answers.items() if value is not None]
    ends = [*answered[:1], *answered[1:][-1:]]
    first = rows[members[0]]
    return Explained(
        why=why,
        task=first["task"],
        key=key_of(first),
        terms=[k for k in first if k not in KNOWN and any(is_number(rows[i].get(k)) for i in members)],
        completions=[(rows[i], value, rationale(rows[i]["completion"])[0]) for i, value in answers.items()],
        comparisons=[c for i in ends if scored and (c := _comparisons(rows[i], answers[i], scored, i))],
    )


def _comparisons(row: dict[str, Any], answer: float | None, scored: audit.Audit, position: int) -> Comparisons | None:
    table = audit.explain(scored.batch, scored.scored.answers, scored.preset, position)
    if not table or not is_number(row.get("thurstone")):
        return None
    mean = sum(o.weight * o.reward for o in table)
    shown = [(clean(o.group_id), o) for o in table[:MOST_OPPONENTS]]
    return Comparisons(row, answer, shown, len(table) - len(shown), mean)
