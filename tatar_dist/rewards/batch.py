"""One global batch of completions as arrays, the input of every reward term.

A `Batch` is made from rows (dicts of the `rewards` contract) or from the groups of a rollout; `Answers` are its parsed
completions. Groups have explicit ids. Rows of one group must agree on task, data set and target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tatar_dist.errors import UserError
from tatar_dist.prompts.answer import parse, think_words
from tatar_dist.types import Group


@dataclass(frozen=True)
class Batch:
    """N completions, J groups. group (N,) int64 in 0..J-1; iaa (N,) bool; completions: N texts;
    dataset (N,) int64 index into `datasets`; target (N,) float64 in points; group_ids: J external ids.

    rows: N mappings, each as it was given; those of a rollout have the keys of `batch_of_groups`.
    """

    group: np.ndarray
    iaa: np.ndarray
    dataset: np.ndarray
    target: np.ndarray
    completions: Sequence[str]
    group_ids: Sequence[str]
    datasets: Sequence[str]
    rows: Sequence[Mapping[str, Any]]

    def numbers(self, key: str) -> np.ndarray:
        """Return (N,) float64 of a key of the rows, NaN where it is absent or null."""
        return np.array([row.get(key) for row in self.rows], np.float64)

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(frozen=True)
class Answers:
    """The N parsed answers. value: raw score; score: clamped to [0, 100]; both NaN if unparsed.
    parsed, out_of_range: bool; think_words: words in <think>; words: of the whole text with tags (released gates)."""

    value: np.ndarray
    score: np.ndarray
    parsed: np.ndarray
    out_of_range: np.ndarray
    think_words: np.ndarray
    words: np.ndarray


def read_answers(completions: Sequence[str], strict: bool = True) -> Answers:
    """Parse every completion once (tatar_dist/prompts/answer.py)."""
    results = [parse(text, strict) for text in completions]
    value = np.array([np.nan if r.value is None else r.value for r in results], np.float64)
    return Answers(
        value=value,
        score=np.clip(value, 0.0, 100.0),
        parsed=~np.isnan(value),
        out_of_range=np.array([r.out_of_range for r in results], bool),
        think_words=np.array([think_words(text) for text in completions], np.int64),
        words=np.array([len(text.split()) for text in completions], np.int64),
    )


def batch_of_rows(rows: Iterable[Mapping]) -> Batch:
    """Make a batch of checked dicts with group_id, task, dataset, target, completion.

    Raises:
        UserError: rows of one group that disagree; the message names the row (from 1).
    """
    rows = list(rows)
    first_rows: dict[Any, Mapping] = {}
    for n, row in enumerate(rows, 1):
        if problem := disagreement(row, first_rows):
            raise UserError(f"row {n}: {problem}")
    groups = {group_id: j for j, group_id in enumerate(first_rows)}
    datasets = {name: i for i, name in enumerate(dict.fromkeys(row["dataset"] for row in rows))}
    return Batch(
        group=np.array([groups[row["group_id"]] for row in rows], np.int64),
        iaa=np.array([row["task"] == "iaa" for row in rows], bool),
        dataset=np.array([datasets[row["dataset"]] for row in rows], np.int64),
        target=np.array([row["target"] for row in rows], np.float64),
        completions=[row["completion"] for row in rows],
        group_ids=list(groups),
        datasets=list(datasets),
        rows=rows,
    )


def disagreement(row: Mapping, first_rows: dict[Any, Mapping]) -> str | None:
    """Say how a row contradicts its group's first, or None; adds new groups to `first_rows`."""
    first = first_rows.setdefault(row["group_id"], row)
    keys = [key for key in ("task", "dataset", "target", "score_std") if row.get(key) != first.get(key)]
    differences = ", ".join(f"{key} {first.get(key)!r} and {row.get(key)!r}" for key in keys)
    return f"group {row['group_id']!r} has rows that disagree: {differences}" if keys else None


def batch_of_groups(groups: Sequence[Group]) -> Batch:
    """Make a batch from rollout groups. Rows are the completions in the order of the groups.

    Beside what `batch_of_rows` asks for they have sample_id, score_std (points; None if unknown), meta (of the
    manifest), tokens (their number), token_ids, logprobs (one a token), finish_reason and weight_version. An evaluation
    keeps no tokens: there token_ids and logprobs are None.

    Raises:
        UserError: two groups with one group_id.
    """
    ids = [g.prompt.group_id for g in groups]
    if len(set(ids)) != len(ids):
        raise UserError("two rollout groups of one batch have the same group_id")
    return batch_of_rows(
        {
            "group_id": g.prompt.group_id,
            "task": g.prompt.sample.task,
            "dataset": g.prompt.sample.dataset,
            "target": g.prompt.sample.score,
            "completion": c.text,
            "sample_id": g.prompt.sample.sample_id,
            "score_std": g.prompt.sample.score_std,
            "meta": g.prompt.sample.meta,
            "tokens": len(c.token_ids),
            "token_ids": c.token_ids if len(c.token_ids) == len(c.logprobs) else None,
            "logprobs": c.logprobs if len(c.token_ids) == len(c.logprobs) else None,
            "finish_reason": c.finish_reason,
            "weight_version": g.weight_version,
        }
        for g in groups
        for c in g.completions
    )
