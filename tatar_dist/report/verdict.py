"""Headline and health checks of a run, as pure functions of `RunFiles`.

Each check reports the observed value and its limit. The limits are rules of thumb, defined in this module. "Late" means
the last fifth of the steps, which excludes a bad start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tatar_dist.report.charts import number
from tatar_dist.report.faults import history
from tatar_dist.report.reading import EvaluationFiles, RunFiles, Training, is_number

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
    found = _headline(run)
    past = [history(t.events, len(t.rows)) for t in run.trainings[-1:]]
    return Headline(found.title, found.lines + [p.progress for p in past if p and p.progress])


def _headline(run: RunFiles) -> Headline:
    if len(run.evaluations) >= 2:
        return _before_after(run)
    lines = [_curve_line(t) for t in run.trainings]
    lines += [line for t in run.trainings if (line := _held_out_line(t))]
    if run.evaluations:
        found = _scores(run, run.evaluations[-1])
        return Headline("Held-out scores: " + found if found else "No rank correlation could be computed", lines)
    training = run.trainings[-1]
    return Headline(f"{training.kind.upper()}, {count(len(training.rows), 'step')}", lines)


def count(n: int, noun: str) -> str:
    """Format "1 step", "1,200 steps"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _scores(run: RunFiles, evaluation: EvaluationFiles) -> str:
    values = [(d, evaluation.metrics[d].get("srcc")) for d in run.datasets if d in evaluation.metrics]
    return ", ".join(f"{name_of(run, d)} SRCC {number(v)}" for d, v in values if is_number(v))


def name_of(run: RunFiles, dataset: str) -> str:
    """Return the display name of a data set: its task if no other set has that task, else its name."""
    task = run.task(dataset)
    alone = sum(run.task(d) == task for d in run.datasets) == 1
    return TASK_NAMES.get(task, dataset) if alone else dataset


def _before_after(run: RunFiles) -> Headline:
    first, last = run.evaluations[0], run.evaluations[-1]
    learned, not_learned, moves = [], [], []
    for dataset in run.datasets:
        before, after = (e.metrics.get(dataset, {}).get("srcc") for e in (first, last))
        if not is_number(after):
            not_learned.append(dataset)
            moves.append(f"{name_of(run, dataset)} has no rank correlation after training")
            continue
        start = before if is_number(before) else 0.0
        good = after >= LEARNED_SRCC and after - start >= LEARNED_GAIN
        (learned if good else not_learned).append(dataset)
        was = number(before) if is_number(before) else "none"
        moves.append(f"{name_of(run, dataset)} {was} \N{RIGHTWARDS ARROW} {number(after)}")
    if not learned:
        title = "It did not learn to rank images"
    elif not_learned:
        title = (
            f"It learned {listed(name_of(run, d) for d in learned)}, not {listed(name_of(run, d) for d in not_learned)}"
        )
    else:
        title = f"It learned to score {listed(name_of(run, d) for d in learned)}"
    lines = [f"Rank correlation (SRCC) with the targets on held-out images, before and after: {'; '.join(moves)}."]
    parsed = [(m.get("n_parsed"), m.get("n")) for m in last.metrics.values()]
    counts = [(p, n) for p, n in parsed if is_number(p) and is_number(n) and n]
    if counts:
        share = sum(p for p, _ in counts) / sum(n for _, n in counts)
        lines.append(f"{share:.1%} of the final model\N{RIGHT SINGLE QUOTATION MARK}s answers give a score.")
    return Headline(title, lines)


def listed(names: Iterable[str]) -> str:
    """Join names as "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _curve_line(training: Training) -> str:
    if training.kind == "grpo":
        found = [(t, training.series(f"reward/total/{t}")[1]) for t in TASK_NAMES]
        moves = [f"{TASK_NAMES[t]} {arrow(v)}" for t, v in found if len(v)]
        return (
            f"Total reward, first to last fifth of the steps: {', '.join(moves)}." if moves else "No reward was logged."
        )
    for name, text in (("eval/loss/iqa", "Held-out loss (quality)"), ("loss/total", "Training loss")):
        values = training.series(name)[1]
        if len(values) >= 2:
            first, last = (values[0], values[-1]) if name.startswith("eval") else edges(values)
            return f"{text}: {number(first)} \N{RIGHTWARDS ARROW} {number(last)}."
    return "Too few steps to say how the loss moved."


def _held_out_line(training: Training) -> str:
    """Describe the change of held-out SRCC during training; "" with fewer than two values."""
    moves = []
    for dataset in training.held_out:
        values = training.series(f"eval/{dataset}/srcc")[1]
        if len(values) >= 2:
            moves.append(f"{dataset} {number(values[0])} \N{RIGHTWARDS ARROW} {number(values[-1])}")
    return f"Held-out SRCC, first to last look: {', '.join(moves)}." if moves else ""


def arrow(values: np.ndarray) -> str:
    """Format the means of the first and the last fifth as "a -> b"."""
    first, last = edges(values)
    return f"{number(first)} \N{RIGHTWARDS ARROW} {number(last)}"


def checks(run: RunFiles) -> list[VerdictCheck]:
    """Run all health checks that the run's files allow."""
    found: list[VerdictCheck | None] = []
    for training in run.trainings:
        found.append(_finite(training))
        found += _grpo_checks(training) if training.kind == "grpo" else [_overfitting(training)]
        found.append(_faults(training))
    if run.evaluations:
        found.append(_eval_parses(run.evaluations[-1]))
    rejected = sum(len(t.quarantine) for t in run.trainings)
    if run.trainings:
        seen = "none" if not rejected else count(rejected, "sample")
        found.append(VerdictCheck("watch" if rejected else "good", "Quarantined samples", seen, "none"))
    return [c for c in found if c]


def _worst_task(training: Training, metric: str) -> tuple[float, str] | None:
    """Return (late mean, text by task) of a per-task share, for the task where it is highest."""
    late = {t: edges(v)[1] for t in TASK_NAMES if len(v := training.series(f"{metric}/{t}")[1])}
    if not late:
        return None
    return max(late.values()), ", ".join(f"{TASK_NAMES[t]} {v:.1%}" for t, v in late.items())


def _share(training: Training, metric: str, name: str, limit: float) -> VerdictCheck | None:
    found = _worst_task(training, metric)
    return found and VerdictCheck(
        "good" if found[0] <= limit else "watch", name, found[1], f"at most {limit:.0%}, late"
    )


def _grpo_checks(training: Training) -> list[VerdictCheck | None]:
    result: list[VerdictCheck | None] = []
    gap = training.series("sync/logprob_gap")[1]
    if len(gap):
        grpo = training.config.get("grpo")
        configured = grpo.get("logprob_gap_limit") if isinstance(grpo, dict) else None
        limit = configured if is_number(configured) else GAP_LIMIT
        state, seen = "good" if gap.max() <= limit else "bad", f"largest gap {number(gap.max())} nats"
        result.append(VerdictCheck(state, "Engines and learners hold the same weights", seen, f"at most {limit:g}"))
    kl = training.series("loss/kl")[1]
    if len(kl):
        late = edges(kl)[1]
        state, seen = "good" if late <= KL_LIMIT else "watch", f"KL {number(late)} nats a token"
        result.append(VerdictCheck(state, "Distance from the reference", seen, f"at most {KL_LIMIT:g}, late"))
    result.append(_share(training, "reward/frac_zero_std/total", "Groups that teach nothing", ZERO_STD_LIMIT))
    result.append(_share(training, "completion/parse_failures", "Sampled answers without a score", PARSE_LIMIT))
    result.append(_share(training, "completion/clipped_ratio", "Answers cut off by the token limit", CLIPPED_LIMIT))
    entropy = training.series("policy/entropy")[1]
    if len(entropy) >= 5 and edges(entropy)[0] > 0:
        first, last = edges(entropy)
        state = "good" if last >= ENTROPY_FLOOR * first else "watch"
        seen = f"entropy {number(first)} \N{RIGHTWARDS ARROW} {number(last)}"
        result.append(VerdictCheck(state, "Answers stay varied", seen, f"at least {ENTROPY_FLOOR:.0%} of the start"))
    unrankable = training.series("reward/unrankable_groups")[1]
    if len(unrankable):
        total = int(unrankable.sum())
        seen = "none" if not total else count(total, "group")
        result.append(
            VerdictCheck("watch" if total else "good", "Groups without a rival to rank against", seen, "none")
        )
    return result


def _faults(training: Training) -> VerdictCheck | None:
    past = history(training.events, len(training.rows))
    if past is None:
        return None
    seen = past.summary or "no fault"
    return VerdictCheck("watch" if past.summary else "good", f"{training.kind.upper()} processes", seen, "no fault")


def _finite(training: Training) -> VerdictCheck | None:
    names = {k for r in training.rows for k in r if k.startswith("loss/") or k == "optim/grad_norm"}
    if not names:
        return None
    wrong = max(training.not_finite(n) for n in names)
    seen = "at every step" if not wrong else f"not at {count(wrong, 'step')}"
    return VerdictCheck(
        "bad" if wrong else "good", f"{training.kind.upper()} loss and gradients finite", seen, "at every step"
    )


def _overfitting(training: Training) -> VerdictCheck | None:
    held_out = [v for t in TASK_NAMES if len(v := training.series(f"eval/loss/{t}")[1]) >= 2 and v.min() > 0]
    if not held_out:
        return None
    worst = max(float(v[-1] / v.min()) for v in held_out)
    state = "good" if worst <= OVERFIT_LIMIT else "watch"
    seen = "at its lowest at the end" if worst <= 1.0 else f"{worst - 1:.1%} above its lowest"
    return VerdictCheck(state, "Held-out SFT loss", seen, "at most 5% above its lowest")


def _eval_parses(evaluation: EvaluationFiles) -> VerdictCheck | None:
    rows = [m for m in evaluation.metrics.values() if is_number(m.get("n")) and is_number(m.get("n_parsed")) and m["n"]]
    if not rows:
        return None
    failed, n = sum(m["n"] - m["n_parsed"] for m in rows), sum(m["n"] for m in rows)
    state = "good" if failed <= PARSE_LIMIT * n else "watch"
    seen = f"{failed:,} of {n:,}"
    return VerdictCheck(
        state, f"Held-out answers without a score ({evaluation.model})", seen, f"at most {PARSE_LIMIT:.0%}"
    )
