"""Explain rewards of sampled groups by term, with the comparisons behind a Thurstone term.

Reads the last file of RUN/rollouts and the run's reward configuration. For each task, the groups with the largest
reward spread (the strongest training signal), the highest and the lowest mean reward are returned as `Explained`. Terms
are read from the file. Comparisons are recomputed as in `tatar-dist rewards FILE --explain ROW`; a value that differs
from the logged one is marked (`Comparisons.agrees`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tatar_dist.prompts.answer import parse
from tatar_dist.report.gallery import Key, key_of, rationale
from tatar_dist.report.reading import Rollouts, Training, clean, is_number, noted
from tatar_dist.report.verdict import TASK_NAMES
from tatar_dist.rewards import audit
from tatar_dist.rewards.presets import preset_names

KNOWN = {  # columns of a rollouts file that are no reward term (run/directory.py)
    "step", "group_id", "index", "sample_id", "dataset", "task", "target", "completion", "tokens", "finish_reason",
    "score_std",
    "logprob_sum", "weight_version", "parsed", "reward", "advantage", "trained",
}  # fmt: skip
MOST_OPPONENTS = 8
REASONS: tuple[tuple[str, Callable[[np.ndarray], float]], ...] = (  # (why, what the group has the most of)
    ("Rewards furthest apart: this group teaches most", np.std),
    ("Highest mean reward", np.mean),
    ("Lowest mean reward", lambda rewards: -np.mean(rewards)),
)
APART = 1e-6  # more than rounding between a logged term and the same one computed again


@dataclass(frozen=True)
class Comparisons:
    """Opponents in a completion's Thurstone term, by falling weight; others: number not listed.

    mean: weighted, of their last column; paid: the term that it makes.
    """

    row: dict[str, Any]
    answer: float | None
    opponents: list[tuple[str, audit.Opponent]]
    others: int
    mean: float
    paid: float
    agrees: bool


@dataclass(frozen=True)
class Explained:
    """One group. completions: (row of the file, answer, rationale) by falling reward;
    terms: names; comparisons: of its best and worst answers."""

    why: str
    task: str
    key: Key
    terms: list[str]
    completions: list[tuple[dict[str, Any], float | None, str]]
    comparisons: list[Comparisons]


def explanations(training: Training, rollouts: Rollouts, notes: list[str]) -> list[Explained]:
    """Return up to three groups per task of the newest `rollouts` file; [] without valid rows."""
    file, rows = rollouts.files[-1], []
    with noted(file, notes):
        rows = pq.ParquetFile(file).read().to_pylist()
    groups: dict[tuple[str, Any], list[int]] = {}
    for i, row in enumerate(rows):
        if row.get("group_id") is not None and is_number(row.get("reward")) and audit.row_error(row) is None:
            groups.setdefault((row["task"], row["group_id"]), []).append(i)
    scored = _audit(file, rows, training.config, notes)
    return [
        _explained(why, rows, members, scored)
        for name in TASK_NAMES
        for why, members in _chosen(rows, [members for (task, _), members in groups.items() if task == name])
    ]


def _chosen(rows: Sequence[Mapping[str, Any]], groups: Sequence[list[int]]) -> list[tuple[str, list[int]]]:
    """Return (why, members) of the selected groups, each once. groups: positions of their rows."""
    rewards = [np.array([rows[i]["reward"] for i in members], np.float64) for members in groups]
    picks: dict[int, str] = {}
    for why, measure in REASONS if groups else ():
        picks.setdefault(int(np.argmax([measure(r) for r in rewards])), why)
    return [(why, groups[i]) for i, why in picks.items()]


def _audit(
    file: Path, rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], notes: list[str]
) -> audit.Audit | None:
    """Score the batch as the reward actor did; None without Thurstone term or usable preset."""
    if not any(is_number(r.get("thurstone")) for r in rows):
        return None
    reward = config.get("reward") or {}
    name = str(reward.get("preset", "tatar"))
    if name not in preset_names():  # a user's preset may name Python code, which a report does not run
        notes.append(f"the comparisons behind its reward: preset {clean(name)} is not one of ours")
        return None
    with noted(file, notes):
        return audit.run(file, name, weights=reward.get("weights"), params=reward.get("params"), all_terms=False)
    return None


def _explained(
    why: str, rows: Sequence[dict[str, Any]], members: Sequence[int], scored: audit.Audit | None
) -> Explained:
    answers = {i: parse(rows[i]["completion"]).value for i in sorted(members, key=lambda i: -rows[i]["reward"])}
    answered = [i for i, value in answers.items() if value is not None]
    comparisons = []
    for i in dict.fromkeys([*answered[:1], *answered[-1:]]) if scored else ():
        table = audit.explain(scored.batch, scored.scored.answers, scored.preset, i)
        if table and is_number(rows[i].get("thurstone")):
            shown = [(clean(o.group_id), o) for o in table[:MOST_OPPONENTS]]
            mean = sum(o.weight * o.reward for o in table)
            paid = audit.paid(mean, scored.preset)
            agrees = abs(paid - rows[i]["thurstone"]) <= APART
            comparisons.append(Comparisons(rows[i], answers[i], shown, len(table) - len(shown), mean, paid, agrees))
    first = rows[members[0]]
    return Explained(
        why=why,
        task=first["task"],
        key=key_of(first),
        terms=[k for k in first if k not in KNOWN and any(is_number(rows[i].get(k)) for i in members)],
        completions=[(rows[i], value, rationale(rows[i]["completion"])[0]) for i, value in answers.items()],
        comparisons=comparisons,
    )
