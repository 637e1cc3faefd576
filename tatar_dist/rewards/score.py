"""Turn a global batch of completions into reward terms, rewards, advantages and metrics.

The reward actor runs `score_batch(batch, preset)`, then `metrics.reward_metrics(batch, scored)`. Pure numpy, float64.
The whole global batch goes in at once, because ranking needs other images. An unparsed completion gets 0 from every
term (from a user's own that punishes, its worst) and counts in its group's advantage; a term of another task is NaN.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from tatar_dist.algo.advantages import ZERO_STD, contributions, group_std, total_reward
from tatar_dist.rewards import thurstone as ranking
from tatar_dist.rewards.batch import Answers, Batch, read_answers
from tatar_dist.rewards.pairwise import pairwise
from tatar_dist.rewards.presets import Preset
from tatar_dist.rewards.terms import binary, cost, gaussian, length
from tatar_dist.types import Group, ScoredGroup


@dataclass(frozen=True)
class BatchScores:
    """The N scored completions. terms: term -> (N,) float64, NaN where the term does not apply.

    reward, advantage: (N,) float64. parts: what each weighted term adds to the advantage. unrankable: (J,) bool, groups
    whose Thurstone term is 0 because their pool holds no other image that parsed. zero_std: (J,) bool of the groups
    whose completions all have the same reward (advantage per_term: the same in every weighted term) and which therefore
    have no advantage.
    """

    answers: Answers
    terms: dict[str, np.ndarray]
    reward: np.ndarray
    advantage: np.ndarray
    parts: dict[str, np.ndarray]
    unrankable: np.ndarray
    zero_std: np.ndarray


def score_batch(
    batch: Batch,
    preset: Preset,
    *,
    terms: Collection[str] = (),
    strict: bool = True,
    advantage: str = "std",
    eps: float = 1e-4,
    scale: str = "group",
) -> BatchScores:
    """Score one global batch.

    Args:
        terms: which terms to compute beside those the preset weighs.
        strict: the answer grammar (tatar_dist/prompts/answer.py).
        advantage: std | mean | per_term (tatar_dist/algo/advantages.py), with its eps and scale.

    Raises:
        UserError: an unknown advantage mode, or a user's term that fails.
    """
    answers = read_answers(batch.completions, strict)
    weights = preset.weights
    values: dict[str, np.ndarray] = {}
    unrankable = np.zeros(len(batch.group_ids), bool)
    for term in preset.terms:
        if term not in weights and term not in terms:
            continue
        values[term] = np.full(len(batch), np.nan)
        index = rows_of_term(batch, preset, term)
        if not len(index):
            continue
        if term == "thurstone":
            q, stats, groups = ranked_groups(batch, answers, preset, index)
            values[term][index] = ranking.thurstone(q, stats, preset.thurstone)
            unrankable[groups[stats.unrankable]] = True
        else:
            values[term][index] = _term(term, batch, answers, preset, index)
    reward = total_reward(values, weights, len(batch))
    compared = [np.nan_to_num(values[t], nan=0.0) for t in weights] if advantage == "per_term" else [reward]
    parts = contributions(values, weights, batch.group, advantage, eps, scale)
    return BatchScores(
        answers=answers,
        terms=values,
        reward=reward,
        advantage=np.sum([*parts.values()], axis=0),
        parts=parts,
        unrankable=unrankable,
        zero_std=np.all([group_std(x, batch.group) < ZERO_STD for x in compared], axis=0),
    )


def _term(term: str, batch: Batch, answers: Answers, preset: Preset, index: np.ndarray) -> np.ndarray:
    """Return the (len(index),) values of one term at the rows it applies to."""
    q, g, iaa, parsed = answers.score[index], batch.target[index], batch.iaa[index], answers.parsed[index]
    if term == "gaussian":
        return gaussian(q, g, iaa, answers.words[index], preset.gaussian, batch.numbers("score_std")[index])
    if term == "pairwise":
        return pairwise(q, g, batch.group[index], _pools(batch, index, preset.pairwise.pool), preset.pairwise)
    if term == "binary":
        return binary(q, g, preset.binary)
    if term == "format":
        return parsed.astype(np.float64)
    if term == "length":
        return length(answers.think_words[index], iaa, parsed, preset.length)
    if term == "cost":
        return cost(batch.numbers("tokens")[index], iaa, parsed, preset.cost)
    return preset.custom[term].values(batch, answers, index)


def _pools(batch: Batch, index: np.ndarray, pool: str) -> np.ndarray:
    """Return pool ids: images compare within a task and, unless `pool` is `list`, a data set."""
    iaa = batch.iaa[index].astype(np.int64)
    return iaa if pool == "list" else 2 * batch.dataset[index] + iaa


def ranked_groups(
    batch: Batch, answers: Answers, preset: Preset, index: np.ndarray
) -> tuple[np.ndarray, ranking.Groups, np.ndarray]:
    """Return scores of the ranked rows, statistics of their groups, and each one's batch group."""
    groups, local = np.unique(batch.group[index], return_inverse=True)
    q = answers.score[index]
    pool, sd = _pools(batch, index, preset.thurstone.pool), batch.numbers("score_std")[index]
    stats = ranking.group_statistics(q, batch.target[index], local, pool, sd)
    return q, stats, groups


def rows_of_term(batch: Batch, preset: Preset, term: str) -> np.ndarray:
    """Return the indices of the rows whose task the term applies to."""
    tasks = preset.terms[term].tasks
    return np.flatnonzero(np.where(batch.iaa, "iaa" in tasks, "iqa" in tasks))


def scored_groups(groups: Sequence[Group], scored: BatchScores) -> list[ScoredGroup]:
    """Split a `BatchScores` of `batch_of_groups(groups)` back into the groups, in order."""
    result, start = [], 0
    for number, group in enumerate(groups):
        part = slice(start, start + len(group.completions))
        start = part.stop
        result.append(
            ScoredGroup(
                group=group,
                parsed=scored.answers.parsed[part],
                terms={name: value[part] for name, value in scored.terms.items()},
                reward=scored.reward[part],
                advantage=scored.advantage[part],
                zero_std=bool(scored.zero_std[number]),
            )
        )
    return result
