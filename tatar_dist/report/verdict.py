"""Headline and health checks of a run, as pure functions of `RunFiles`.

Each check reports the observed value and its limit. The limits are rules of thumb, defined in this module. "Late" means
the last fifth of the steps, which excludes a bad start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tatar_dist.report.charts import number, percent
from tatar_dist.report.faults import history
from tatar_dist.report.reading import EvaluationFiles, RunFiles, Training, is_number

ARROW = "\N{RIGHTWARDS ARROW}"
TASK_NAMES = {"iqa": "quality", "iaa": "aesthetics"}
LEARNED_SRCC, LEARNED_GAIN = 0.2, 0.1  # a model that ranks at all, and better than it did before training
PARSE_LIMIT = 0.02  # share of answers without a score
ZERO_STD_LIMIT = 0.5  # share of groups whose completions all got one reward: they teach nothing
KL_LIMIT = 0.3  # nats a token from the reference
CLIPPED_LIMIT = 0.05  # share of completions cut off by the token limit
ENTROPY_FLOOR = 0.2  # of what it was at the start
OVERFIT_LIMIT = 1.05  # last held-out SFT loss over its minimum
GAP_LIMIT = 0.05  # sync/logprob_gap, when the run's config does not say


@dataclass(frozen=True)
class VerdictCheck:
    """One health check: state (good | watch | bad), name, observed value and expected value."""

    state: str
    name: str
    seen: str
    expected: str


@dataclass(frozen=True)
class Headline:
    """One-sentence summary, and the sentences that support it."""

    title: str
    lines: list[str]


def edges(values: np.ndarray) -> tuple[float, float]:
    """Return the means of the first and the last fifth of (n,) values, n >= 1."""
    k = max(1, len(values) // 5)
    return float(values[:k].mean()), float(values[-k:].mean())


def headline(run: RunFiles) -> Headline:
    """Sum the run up: what it learned if there are two evaluations, else its scores or its length."""
    past = [history(t.events, len(t.rows)) for t in run.trainings[-1:]]
    progress = [p.progress for p in past if p and p.progress]
    if len(run.evaluations) >= 2:
        title, lines = _before_after(run)
        return Headline(title, lines + progress)
    lines = [x for t in run.trainings for x in (_curve_line(t), _held_out_line(t)) if x] + progress
    if not run.evaluations:
        training = run.trainings[-1]
        return Headline(f"{training.kind.upper()}, {count(len(training.rows), 'step')}", lines)
    metrics = run.evaluations[-1].metrics
    values = [(d, metrics[d].get("srcc")) for d in run.datasets if d in metrics]
    scores = ", ".join(f"{name_of(run, d)} SRCC {number(v)}" for d, v in values if is_number(v))
    return Headline(f"Held-out scores: {scores}" if scores else "No rank correlation could be computed", lines)


def count(n: int, noun: str) -> str:
    """Format "1 step", "1,200 steps"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def name_of(run: RunFiles, dataset: str) -> str:
    """Return the display name of a data set: its task if no other set has that task, else its name."""
    task = run.task(dataset)
    alone = sum(run.task(d) == task for d in run.datasets) == 1
    return TASK_NAMES.get(task, dataset) if alone else dataset


def _before_after(run: RunFiles) -> tuple[str, list[str]]:
    """Return the title and the sentences of a run that was evaluated before and after training."""
    first, last = run.evaluations[0], run.evaluations[-1]
    learned, not_learned, moves = [], [], []
    for dataset in run.datasets:
        name = name_of(run, dataset)
        before, after = (e.metrics.get(dataset, {}).get("srcc") for e in (first, last))
        start = before if is_number(before) else 0.0
        good = is_number(after) and after >= LEARNED_SRCC and after - start >= LEARNED_GAIN
        (learned if good else not_learned).append(name)
        was = number(before) if is_number(before) else "none"
        no_rank = f"{name} has no rank correlation after training"
        moves.append(f"{name} {was} {ARROW} {number(after)}" if is_number(after) else no_rank)
    title = f"It learned to score {listed(learned)}" if learned else "It did not learn to rank images"
    if learned and not_learned:
        title = f"It learned {listed(learned)}, not {listed(not_learned)}"
    lines = [f"Rank correlation (SRCC) with the targets on held-out images, before and after: {'; '.join(moves)}."]
    parsed, n = _parsed(last)
    if n:
        lines.append(f"{percent(parsed / n)} of the final model\N{RIGHT SINGLE QUOTATION MARK}s answers give a score.")
    return title, lines


def _parsed(evaluation: EvaluationFiles) -> tuple[int, int]:
    """Return (answers with a score, answers) over all data sets that count both."""
    counts = [(m.get("n_parsed"), m.get("n")) for m in evaluation.metrics.values()]
    known = [(parsed, n) for parsed, n in counts if is_number(parsed) and is_number(n)]
    return sum(parsed for parsed, _ in known), sum(n for _, n in known)


def listed(names: Iterable[str]) -> str:
    """Join names as "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _curve_line(training: Training) -> str:
    """Describe how the reward moved, or the loss of SFT."""
    if training.kind == "grpo":
        rewards = [(name, training.series(f"reward/total/{task}")[1]) for task, name in TASK_NAMES.items()]
        moves = ", ".join(f"{name} {arrow(v)}" for name, v in rewards if len(v))
        return f"Total reward, first to last fifth of the steps: {moves}." if moves else "No reward was logged."
    held_out = training.series("eval/loss/iqa")[1]
    if len(held_out) >= 2:
        return f"Held-out loss (quality): {number(held_out[0])} {ARROW} {number(held_out[-1])}."
    values = training.series("loss/total")[1]
    return f"Training loss: {arrow(values)}." if len(values) >= 2 else "Too few steps to say how the loss moved."


def _held_out_line(training: Training) -> str:
    """Describe the change of held-out SRCC during training; "" with fewer than two values."""
    curves = [(d, training.series(f"eval/{d}/srcc")[1]) for d in training.held_out]
    moves = ", ".join(f"{d} {number(v[0])} {ARROW} {number(v[-1])}" for d, v in curves if len(v) >= 2)
    return f"Held-out SRCC, first to last look: {moves}." if moves else ""


def arrow(values: np.ndarray) -> str:
    """Format the means of the first and the last fifth as "a -> b"."""
    first, last = edges(values)
    return f"{number(first)} {ARROW} {number(last)}"


def checks(run: RunFiles) -> list[VerdictCheck]:
    """Run all health checks that the run's files allow."""
    found: list[VerdictCheck | None] = []
    for t in run.trainings:
        found.append(_finite(t))
        found += _grpo_checks(t) if t.kind == "grpo" else [_overfitting(t)]
        past = history(t.events, len(t.rows))
        found.append(past and _none(f"{t.kind.upper()} processes", past.summary, "no fault"))
    if run.evaluations:
        found.append(_eval_parses(run.evaluations[-1]))
    if run.trainings:
        rejected = sum(len(t.quarantine) for t in run.trainings)
        found.append(_none("Quarantined samples", count(rejected, "sample") if rejected else ""))
    return [c for c in found if c]


def _check(good: bool, name: str, seen: str, expected: str, otherwise: str = "watch") -> VerdictCheck:
    return VerdictCheck("good" if good else otherwise, name, seen, expected)


def _none(name: str, seen: str, none: str = "none") -> VerdictCheck:
    """Check that something did not happen; seen: "" or what did."""
    return _check(not seen, name, seen or none, none)


def _share(training: Training, metric: str, name: str, limit: float) -> VerdictCheck | None:
    """Check the late mean of a share of each task."""
    late = {n: edges(v)[1] for t, n in TASK_NAMES.items() if len(v := training.series(f"{metric}/{t}")[1])}
    seen = ", ".join(f"{name} {v:.1%}" for name, v in late.items())
    return _check(max(late.values()) <= limit, name, seen, f"at most {limit:.0%}, late") if late else None


def _grpo_checks(training: Training) -> list[VerdictCheck | None]:
    found: list[VerdictCheck | None] = []
    gap = training.series("sync/logprob_gap")[1]
    if len(gap):
        grpo = training.config.get("grpo")
        configured = grpo.get("logprob_gap_limit") if isinstance(grpo, dict) else None
        limit = configured if is_number(configured) else GAP_LIMIT
        name, seen = "Engines and learners hold the same weights", f"largest gap {number(gap.max())} nats"
        found.append(_check(gap.max() <= limit, name, seen, f"at most {limit:g}", "bad"))
    kl = training.series("loss/kl")[1]
    if len(kl):
        late = edges(kl)[1]
        seen, expected = f"KL {number(late)} nats a token", f"at most {KL_LIMIT:g}, late"
        found.append(_check(late <= KL_LIMIT, "Distance from the reference", seen, expected))
    found.append(_share(training, "reward/frac_zero_std/total", "Groups that teach nothing", ZERO_STD_LIMIT))
    found.append(_share(training, "completion/parse_failures", "Sampled answers without a score", PARSE_LIMIT))
    found.append(_share(training, "completion/clipped_ratio", "Answers cut off by the token limit", CLIPPED_LIMIT))
    entropy = training.series("policy/entropy")[1]
    if len(entropy) >= 5 and edges(entropy)[0] > 0:
        first, last = edges(entropy)
        expected = f"at least {ENTROPY_FLOOR:.0%} of the start"
        found.append(
            _check(last >= ENTROPY_FLOOR * first, "Answers stay varied", f"entropy {arrow(entropy)}", expected)
        )
    unrankable = training.series("reward/unrankable_groups")[1]
    if len(unrankable):
        total = int(unrankable.sum())
        found.append(_none("Groups without a rival to rank against", count(total, "group") if total else ""))
    return found


def _finite(training: Training) -> VerdictCheck | None:
    names = {k for r in training.rows for k in r if k.startswith("loss/") or k == "optim/grad_norm"}
    if not names:
        return None
    wrong = max(sum(n in r and not is_number(r[n]) for r in training.rows) for n in names)
    seen = f"not at {count(wrong, 'step')}" if wrong else "at every step"
    return _check(not wrong, f"{training.kind.upper()} loss and gradients finite", seen, "at every step", "bad")


def _overfitting(training: Training) -> VerdictCheck | None:
    losses = [training.series(f"eval/loss/{t}")[1] for t in TASK_NAMES]
    ratios = [float(v[-1] / v.min()) for v in losses if len(v) >= 2 and v.min() > 0]
    if not ratios:
        return None
    worst = max(ratios)
    seen = "at its lowest at the end" if worst <= 1.0 else f"{worst - 1:.1%} above its lowest"
    return _check(worst <= OVERFIT_LIMIT, "Held-out SFT loss", seen, "at most 5% above its lowest")


def _eval_parses(evaluation: EvaluationFiles) -> VerdictCheck | None:
    parsed, n = _parsed(evaluation)
    if not n:
        return None
    failed, name = n - parsed, f"Held-out answers without a score ({evaluation.model})"
    return _check(failed <= PARSE_LIMIT * n, name, f"{failed:,} of {n:,}", f"at most {PARSE_LIMIT:.0%}")
