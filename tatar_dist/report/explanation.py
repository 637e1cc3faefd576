"""Explain the rewards of sampled groups term by term, with the comparisons behind a Thurstone term.

Reads the last file of RUN/rollouts and the run's reward configuration. For each task, the groups with the largest
reward spread (the strongest training signal), the highest and the lowest mean reward are returned as `Explained`. Terms
are read from the file. Comparisons are recomputed as in `tatar-dist rewards FILE --explain ROW`; a value that differs
from the logged one is marked (`Comparisons.agrees`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tatar_dist.errors import UserError
from tatar_dist.prompts.answer import parse
from tatar_dist.report.gallery import Key, key_of, rationale, split_teaser
from tatar_dist.report.reading import Rollouts, Training, clean, is_number
from tatar_dist.rewards import audit
from tatar_dist.rewards.explain import Opponent, explain
from tatar_dist.rewards.presets import load_preset, preset_names

KNOWN = {  # columns of a rollouts file that are no reward term (run/directory.py)
    "step", "group_id", "index", "sample_id", "dataset", "task", "target", "completion", "tokens", "finish_reason",
    "logprob_sum", "weight_version", "parsed", "reward", "advantage", "trained",
}  # fmt: skip
MOST_OPPONENTS = 8
APART = 1e-6  # more than rounding between a logged term and the same one computed again
WHY = {
    "spread": "Rewards furthest apart: this group teaches most",
    "best": "Highest mean reward",
    "worst": "Lowest mean reward",
}


@dataclass(frozen=True)
class Judged:
    """One completion. terms: values in the order of `Explained.terms`, None where a term does not apply."""

    index: int
    answer: float | None
    terms: list[float | None]
    reward: float
    advantage: float | None
    tokens: int | None
    teaser: str
    rest: str


@dataclass(frozen=True)
class Comparisons:
    """Opponents behind the Thurstone term of one completion, by falling weight; others: how many are not listed."""

    index: int
    answer: float
    opponents: list[tuple[str, Opponent]]
    others: int
    mean: float
    logged: float

    @property
    def agrees(self) -> bool:
        return abs(min(max(self.mean, 0.0), 1.0) - self.logged) <= APART


@dataclass(frozen=True)
class Explained:
    """One group. terms: names; completions: by falling reward; comparisons: of its best and worst answers."""

    why: str
    task: str
    key: Key
    step: int
    target: float
    terms: list[str]
    completions: list[Judged]
    comparisons: list[Comparisons] = field(default_factory=list)


def explanations(training: Training, rollouts: Rollouts | None, notes: list[str]) -> list[Explained]:
    """Return up to three groups per task from the newest rollouts file; [] if it holds no valid rows.

    `rollouts` are those of this training. A damaged file that is missing from them is already in `notes`.
    """
    files = sorted((training.path / "rollouts").glob("step_*.parquet"))
    if not files:
        return []
    try:
        rows = pq.ParquetFile(files[-1]).read().to_pylist()
    except (pa.ArrowException, OSError, ValueError) as e:  # ValueError: a text that is not UTF-8
        file = files[-1]
        if rollouts is not None and file in rollouts.files:  # the damage is in a column that was not read there
            notes.append(f"{file.parent.name}/{file.name} could not be read: {str(e).splitlines()[0]}")
        return []
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        if _whole(row):
            groups.setdefault((row["task"], row["group_id"]), []).append(i)
    result = []
    ranked = _Ranked(files[-1], rows, training.config, notes)
    for task in ("iqa", "iaa"):
        own = [members for (of, _), members in groups.items() if of == task]
        for why, members in _chosen([[rows[i] for i in g] for g in own], own):
            result.append(_explained(WHY[why], rows, members, ranked))
    return result


def _whole(row: Mapping[str, Any]) -> bool:
    return row.get("group_id") is not None and is_number(row.get("reward")) and audit.row_error(dict(row)) is None


def _chosen(groups: Sequence[list[dict[str, Any]]], members: Sequence[list[int]]) -> list[tuple[str, list[int]]]:
    """Return (why, members) of the selected groups, without duplicates."""
    if not groups:
        return []
    rewards = [np.array([r["reward"] for r in g], np.float64) for g in groups]
    picks: dict[int, str] = {}
    for why, pick in (
        ("spread", max(range(len(groups)), key=lambda i: rewards[i].std())),
        ("best", max(range(len(groups)), key=lambda i: rewards[i].mean())),
        ("worst", min(range(len(groups)), key=lambda i: rewards[i].mean())),
    ):
        picks.setdefault(pick, why)
    return [(why, members[i]) for i, why in picks.items()]


class _Ranked:
    """Batch of the step as the reward actor received it, loaded when a Thurstone term is first explained."""

    def __init__(self, file: Path, rows: list[dict[str, Any]], config: Mapping[str, Any], notes: list[str]) -> None:
        self._file, self._rows, self._config, self._notes = file, rows, config, notes
        self._audit: audit.Audit | None = None
        self._failed = False

    def comparisons(self, row: int) -> Comparisons | None:
        logged = self._rows[row].get("thurstone")
        answer = parse(self._rows[row]["completion"]).value
        if not is_number(logged) or answer is None or self._failed or not self._read():
            return None
        assert self._audit is not None
        table = explain(self._audit.batch, self._audit.preset, row)
        if not table:
            return None
        mean = sum(o.weight * o.reward for _, o in table)
        shown = [(clean(name), o) for name, o in table[:MOST_OPPONENTS]]
        return Comparisons(_index(self._rows[row]), answer, shown, len(table) - len(shown), mean, float(logged))

    def _read(self) -> bool:
        if self._audit is not None:
            return True
        reward = self._config.get("reward")
        reward = reward if isinstance(reward, Mapping) else {}
        name = str(reward.get("preset", "tatar"))
        try:
            if name not in preset_names():  # a preset of one's own may name Python code, which a report does not run
                raise UserError(f"the comparisons behind its reward: preset {clean(name)} is not one of ours")
            weights, params = (dict(reward.get(k) or {}) for k in ("weights", "params"))
            load_preset(name, weights, params)
            self._audit = audit.run(self._file, name, weights=weights, params=params, all_terms=False)
        except (UserError, TypeError, ValueError) as e:
            self._failed = True
            self._notes.append(str(e).splitlines()[0])
        return self._audit is not None


def _index(row: Mapping[str, Any]) -> int:
    return row["index"] if isinstance(row.get("index"), int) else 0


def _explained(why: str, rows: list[dict[str, Any]], members: list[int], ranked: _Ranked) -> Explained:
    group = [rows[i] for i in members]
    terms = [k for k in group[0] if k not in KNOWN and any(is_number(r.get(k)) for r in group)]
    by_reward = sorted(members, key=lambda i: -rows[i]["reward"])
    compared = dict.fromkeys(i for i in by_reward if parse(rows[i]["completion"]).value is not None)
    ends = list(compared)[:1] + list(compared)[1:][-1:]
    step = group[0].get("step")
    return Explained(
        why=why,
        task=group[0]["task"],
        key=key_of(group[0]),
        step=step if isinstance(step, int) else 0,
        target=float(group[0]["target"]),
        terms=terms,
        completions=[_judged(rows[i], terms) for i in by_reward],
        comparisons=[c for i in ends if (c := ranked.comparisons(i))],
    )


def _judged(row: Mapping[str, Any], terms: Sequence[str]) -> Judged:
    teaser, rest = split_teaser(rationale(row["completion"])[0])
    advantage, tokens = row.get("advantage"), row.get("tokens")
    return Judged(
        index=_index(row),
        answer=parse(row["completion"]).value,
        terms=[float(row[t]) if is_number(row.get(t)) else None for t in terms],
        reward=float(row["reward"]),
        advantage=float(advantage) if is_number(advantage) else None,
        tokens=tokens if isinstance(tokens, int) else None,
        teaser=teaser,
        rest=rest,
    )
