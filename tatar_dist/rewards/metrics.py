"""The metrics of a scored batch, Kendall's tau-b of its groups among them. Pure numpy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np

from tatar_dist.algo.advantages import ZERO_STD, group_std, shares
from tatar_dist.rewards.batch import Batch
from tatar_dist.rewards.score import BatchScores
from tatar_dist.types import TASKS

GUARDS = ("format", "length", "cost")  # the terms that do not look at the score
LOW_SHARE, LOW_STEPS = 0.2, 20
LARGE = 64  # rows; all pairs of a larger group would take too much memory


def reward_metrics(batch: Batch, scored: BatchScores) -> dict[str, float]:
    """Return the metrics of one batch by contract names, for the tasks and terms that occur.

    reward/{total,TERM}/{task}: mean over completions. reward/frac_zero_std/{total,TERM}/{task}: share of groups whose
    completions all got the same, which teaches nothing. reward/agreement/{task}: mean over groups of Kendall's tau-b
    between rewards and nearness -|d| of the parsed completions; groups where it is undefined are left out.
    reward/share/{TERM}/{task}: Cov(a, A) / Var(A), a what the term adds to the advantage A; they sum to 1.
    reward/share_parsed/{TERM}/{task}: the same among the parsed completions of each group.
    completion/think_words/{task}: mean.
    completion/parse_failures/{task}, completion/out_of_range/{task}: shares. reward/unrankable_groups: a count.
    """
    metrics: dict[str, float] = {}
    for task in TASKS:
        rows = np.flatnonzero(batch.iaa == (task == "iaa"))
        if not len(rows):
            continue
        _, group = np.unique(batch.group[rows], return_inverse=True)
        for name, values in [("total", scored.reward), *scored.terms.items()]:
            part = values[rows]
            if np.isnan(part).all():
                continue
            metrics[f"reward/{name}/{task}"] = float(part.mean())
            metrics[f"reward/frac_zero_std/{name}/{task}"] = float((group_std(part, group) < ZERO_STD).mean())
        parsed = rows[scored.answers.parsed[rows]]
        for kind, which in (("share", rows), ("share_parsed", parsed)):
            for name, share in shares(scored.parts, which, batch.group).items():
                if not np.isnan(scored.terms[name][rows]).all():
                    metrics[f"reward/{kind}/{name}/{task}"] = share
        nearness = -np.abs(scored.answers.score[parsed] - batch.target[parsed])
        tau = group_kendall(scored.reward[parsed], nearness, batch.group[parsed])
        metrics[f"reward/agreement/{task}"] = float(np.nanmean(tau)) if np.isfinite(tau).any() else math.nan
        metrics[f"completion/think_words/{task}"] = float(scored.answers.think_words[rows].mean())
        metrics[f"completion/parse_failures/{task}"] = float((~scored.answers.parsed[rows]).mean())
        metrics[f"completion/out_of_range/{task}"] = float(scored.answers.out_of_range[rows].mean())
    metrics["reward/unrankable_groups"] = float(scored.unrankable.sum())
    return metrics


def group_kendall(x: np.ndarray, y: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return tau-b (Kendall 1945) of x and y per occurring group, by id; NaN where undefined.

    tau_b = (concordant - discordant) / sqrt((pairs - ties in x)(pairs - ties in y)); undefined when either is constant.
    Groups of G rows are computed together from their G (G - 1) / 2 pairs; those over LARGE rows by scipy.

    Args:
        x, y: (N,) finite values.
        group: (N,) int64 ids, in any order.
    """
    _, index, counts = np.unique(group, return_inverse=True, return_counts=True)
    order, starts = np.argsort(index, kind="stable"), np.cumsum(counts) - counts
    tau = np.full(len(counts), np.nan)
    for size in np.unique(counts):
        members = np.flatnonzero(counts == size)
        rows = order[starts[members, None] + np.arange(size)]  # (J, G)
        if size > LARGE:
            from scipy.stats import kendalltau

            tau[members] = [kendalltau(x[r], y[r]).statistic for r in rows]
            continue
        first, second = np.triu_indices(size, 1)
        a, b = (np.sign(v[rows[:, first]] - v[rows[:, second]]) for v in (x, y))
        scale = np.sqrt(np.abs(a).sum(1) * np.abs(b).sum(1))
        tau[members] = np.divide((a * b).sum(1), scale, out=np.full(len(members), np.nan), where=scale > 0)
    return tau


class ShareWatch:
    """Notice that the terms which look at the score hardly order the parsed answers of a task.

    advantage: `grpo.advantage`, which the advice depends on.
    """

    def __init__(self, advantage: str) -> None:
        self._low = Counter[str]()  # steps in a row, by task; those without a share are left out
        self._per_term = advantage == "per_term"

    def add(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return {task: line} where the share has just been under LOW_SHARE for LOW_STEPS steps.

        metrics: those of a step; a task without a scoring term, or without an advantage, is left out.
        """
        lines: dict[str, str] = {}
        for task in TASKS:
            parts = [(k.split("/"), v) for k, v in metrics.items() if k.startswith("reward/share_parsed/")]
            share = {name: value for (_, _, name, of), value in parts if of == task}
            scoring = [name for name in share if name not in GUARDS]
            found = sum(share[name] for name in scoring)
            if not scoring or math.isnan(found):
                continue
            self._low[task] = self._low[task] + 1 if found < LOW_SHARE else 0
            if self._low[task] == LOW_STEPS:
                ruler = max(share, key=lambda name: share[name])
                lower = f"lower reward.weights.{ruler}"
                lines[task] = (
                    f"for {LOW_STEPS} steps {' and '.join(scoring)} had less than {LOW_SHARE:.0%} of the "
                    f"{task.upper()} advantage among parsed answers (now {found:.0%}), {ruler} has "
                    f"{share[ruler]:.0%}: {lower if self._per_term else f'set grpo.advantage=per_term, or {lower}'}"
                )
        return lines
