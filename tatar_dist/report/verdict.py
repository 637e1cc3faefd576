"""Headline and health checks of a run, as pure functions of `RunFiles`.

Each check reports the observed value and its limit. The limits are rules of thumb, defined in this module. "Late" means
the last fifth of the steps, which excludes a bad start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tatar_dist.report.charts import number, percent
from tatar_dist.report.reading import BASE, EvaluationFiles, RunFiles, Training, is_number

ARROW = "\N{RIGHTWARDS ARROW}"
TASK_NAMES = {"iqa": "quality", "iaa": "aesthetics"}
LEARNED_SRCC, LEARNED_GAIN = 0.2, 0.1  # a model that ranks at all, and better than it did before training
PARSE_LIMIT = 0.02  # share of answers without a score
BAD = 0.25  # from this share on, lost answers are marked red
SHARES = (  # (metric, name, limit of its late mean, marked red from)
    ("reward/frac_zero_std/total", "Groups that teach nothing", 0.5, 0.9),
    ("completion/parse_failures", "Sampled answers without a score", PARSE_LIMIT, BAD),
    ("completion/clipped_ratio", "Answers cut off by the token limit", 0.05, BAD),
)
KL_LIMIT = 0.3  # nats a token from the reference
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


def edges(values: np.ndarray) -> tuple[float, float]:
    """Return the means of the first and the last fifth of (n,) values, n >= 1."""
    k = max(1, len(values) // 5)
    return float(values[:k].mean()), float(values[-k:].mean())


def headline(run: RunFiles) -> tuple[str, list[str]]:
    """Return (title: what two evaluations show was learned, else scores or length; sentences)."""
    progress = [t.history.progress for t in run.trainings[-1:] if t.history and t.history.progress]
    if _from_base(run):
        title, lines = _learned(run)
        return title, lines + progress
    lines = [line for t in run.trainings for line in (_curve_line(t), _held_out_line(t)) if line] + progress
    if not run.evaluations:
        training = run.trainings[-1]
        return f"{training.kind.upper()}, {count(len(training.rows), 'step')}", lines
    values = {name_of(run, d): run.evaluations[-1].metrics.get(d, {}).get("srcc") for d in run.datasets}
    scores = ", ".join(f"{name} SRCC {number(v)}" for name, v in values.items() if is_number(v))
    return f"Held-out scores: {scores}" if scores else "No rank correlation could be computed", lines


def count(n: int, noun: str) -> str:
    """Format "1 step", "1,200 steps"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def name_of(run: RunFiles, dataset: str) -> str:
    """Return a data set's display name: its task if no other set has that task, else its name."""
    task = run.task(dataset)
    alone = sum(run.task(d) == task for d in run.datasets) == 1
    return TASK_NAMES.get(task, dataset) if alone else dataset


def verdict(run: RunFiles, found: Sequence[VerdictCheck]) -> list[tuple[str, str, str]]:
    """Return (question, answer, id of the section with more) of the line under the headline."""
    learned, not_learned, _ = _before_after(run)
    answer = f"yes: {listed(learned)}" if learned else "no"
    if not _from_base(run):
        answer = _moved(run.trainings[-1]) if run.trainings else "no training in this directory"
    elif learned and not_learned:
        answer = f"{listed(learned)}, not {listed(not_learned)}"
    wrong = sorted((c for c in found if c.state != "good"), key=lambda c: c.state)  # "bad" is before "watch"
    bad = sum(c.state == "bad" for c in wrong)
    health = f"{len(found) - len(wrong)} of {len(found)} checks pass{f', {bad} red' if bad else ''}"
    look = (f"{wrong[0].name}: {wrong[0].seen}", "health") if wrong else ("how it went", "went")
    if not wrong and any(e.predictions for e in run.evaluations):
        look = "the answers furthest from the target", "says"
    return [
        ("Did it learn?", answer, "scores" if _from_base(run) else "went"),
        ("Is it healthy?", health if wrong else f"all {len(found)} checks pass", "health"),
        ("How good is it?", _scores(run), "scores"),
        ("Look first at", *look),
    ]


def _from_base(run: RunFiles) -> bool:
    return len(run.evaluations) >= 2 and run.evaluations[0].model == BASE


def _moved(training: Training) -> str:
    """Say how held-out SRCC moved, else held-out loss, reward or training loss."""
    curves = {
        "held-out SRCC": {d: f"eval/{d}/srcc" for d in training.held_out},
        "held-out loss": {name: f"eval/loss/{t}" for t, name in TASK_NAMES.items()},
        "reward": {name: f"reward/total/{t}" for t, name in TASK_NAMES.items()},
        "training loss": {"": "loss/total"},
    }
    for what, metrics in curves.items():
        ends = {name: edges(v) for name, metric in metrics.items() if len(v := training.values(metric)) >= 2}
        rose = [name for name, (first, last) in ends.items() if last > first]
        if ends and 0 < len(rose) < len(ends):
            return f"{what} rose for {listed(rose)}, not for {listed(n for n in ends if n not in rose)}"
        if ends:
            return f"{what} {'rose' if rose else 'fell'}"
    return "too few steps to say"


def _scores(run: RunFiles) -> str:
    """Give the last model's SRCC, each with that of the model before."""
    if not run.evaluations:
        return "not evaluated"
    *before, last = run.evaluations
    known = []
    for dataset in run.datasets:
        value, was = (e.metrics.get(dataset, {}).get("srcc") for e in (last, (before or [last])[-1]))
        if is_number(value):
            than = f" ({before[-1].model} {number(was)})" if before and is_number(was) else ""
            known.append(f"{name_of(run, dataset)} {number(value)}{than}")
    return f"SRCC {', '.join(known)}{'' if before else ', nothing to compare with'}" if known else "no SRCC"


def _before_after(run: RunFiles) -> tuple[list[str], list[str], list[str]]:
    """Return names of sets that the last model learned, of the others, and a phrase each."""
    learned, not_learned, moves = [], [], []
    for dataset in run.datasets:
        name = name_of(run, dataset)
        before, after = (run.evaluations[i].metrics.get(dataset, {}).get("srcc") for i in (0, -1))
        start = before if is_number(before) else 0.0
        good = is_number(after) and after >= LEARNED_SRCC and after - start >= LEARNED_GAIN
        (learned if good else not_learned).append(name)
        was = number(before) if is_number(before) else "none"
        no_rank = f"{name} has no rank correlation after training"
        moves.append(f"{name} {was} {ARROW} {number(after)}" if is_number(after) else no_rank)
    return learned, not_learned, moves


def _learned(run: RunFiles) -> tuple[str, list[str]]:
    """Return the title and the sentences of a run that was evaluated before and after training."""
    learned, not_learned, moves = _before_after(run)
    title = f"It learned to score {listed(learned)}" if learned else "It did not learn to rank images"
    if learned and not_learned:
        title = f"It learned {listed(learned)}, not {listed(not_learned)}"
    lines = [f"Rank correlation (SRCC) with the targets on held-out images, before and after: {'; '.join(moves)}."]
    parsed, n = _parsed(run.evaluations[-1])
    if n:
        lines.append(f"{percent(parsed / n)} of the final model\N{RIGHT SINGLE QUOTATION MARK}s answers give a score.")
    return title, lines


def _parsed(evaluation: EvaluationFiles) -> tuple[int, int]:
    """Return (answers with a score, answers) over all data sets that count both."""
    known = [m for m in evaluation.metrics.values() if is_number(m.get("n_parsed")) and is_number(m.get("n"))]
    return sum(m["n_parsed"] for m in known), sum(m["n"] for m in known)


def listed(names: Iterable[str]) -> str:
    """Join names as "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _curve_line(training: Training) -> str:
    """Describe how the reward moved, or the loss of SFT."""
    if training.kind == "grpo":
        rewards = [(name, training.values(f"reward/total/{task}")) for task, name in TASK_NAMES.items()]
        moves = ", ".join(f"{name} {arrow(v)}" for name, v in rewards if len(v))
        return f"Total reward, first to last fifth of the steps: {moves}." if moves else "No reward was logged."
    held_out = training.values("eval/loss/iqa")
    if len(held_out) >= 2:
        return f"Held-out loss (quality): {number(held_out[0])} {ARROW} {number(held_out[-1])}."
    values = training.values("loss/total")
    return f"Training loss: {arrow(values)}." if len(values) >= 2 else "Too few steps to say how the loss moved."


def _held_out_line(training: Training) -> str:
    """Describe the change of held-out SRCC during training; "" with fewer than two values."""
    curves = [(d, training.values(f"eval/{d}/srcc")) for d in training.held_out]
    moves = ", ".join(f"{d} {number(v[0])} {ARROW} {number(v[-1])}" for d, v in curves if len(v) >= 2)
    return f"Held-out SRCC, first to last look: {moves}." if moves else ""


def arrow(values: np.ndarray) -> str:
    """Format the means of the first and the last fifth as "a -> b"."""
    first, last = edges(values)
    return f"{number(first)} {ARROW} {number(last)}"


def checks(run: RunFiles) -> Iterator[VerdictCheck]:
    """Run all health checks that the run's files allow."""
    for t in run.trainings:
        yield from _finite(t)
        yield from _grpo(t) if t.kind == "grpo" else _overfitting(t)
        if t.history:
            yield _none(f"{t.kind.upper()} processes", t.history.summary, "no fault")
    if run.evaluations:
        parsed, n = _parsed(run.evaluations[-1])
        if n:
            name, failed = f"Held-out answers without a score ({run.evaluations[-1].model})", n - parsed
            yield _share(failed / n, PARSE_LIMIT, BAD, name, f"{failed:,} of {n:,}")
    if run.trainings:
        rejected = sum(len(t.quarantine) for t in run.trainings)
        yield _none("Quarantined samples", count(rejected, "sample") if rejected else "")


def _check(good: bool, name: str, seen: str, expected: str, otherwise: str = "watch") -> VerdictCheck:
    return VerdictCheck("good" if good else otherwise, name, seen, expected)


def _share(share: float, limit: float, bad: float, name: str, seen: str, late: str = "") -> VerdictCheck:
    expected = f"at most {limit:.0%}{late}; red from {bad:.0%}"
    return _check(share <= limit, name, seen, expected, "bad" if share >= bad else "watch")


def _none(name: str, seen: str, none: str = "none") -> VerdictCheck:
    """Check that something did not happen; seen: "" or what did."""
    return _check(not seen, name, seen or none, none)


def _finite(training: Training) -> Iterator[VerdictCheck]:
    names = {k for r in training.rows for k in r if k.startswith("loss/") or k == "optim/grad_norm"}
    if names:
        wrong = max(sum(n in r and not is_number(r[n]) for r in training.rows) for n in names)
        seen = f"not at {count(wrong, 'step')}" if wrong else "at every step"
        yield _check(not wrong, f"{training.kind.upper()} loss and gradients finite", seen, "at every step", "bad")


def _grpo(training: Training) -> Iterator[VerdictCheck]:
    gap, kl = training.values("sync/logprob_gap"), training.values("loss/kl")
    if len(gap):
        configured = (training.config.get("grpo") or {}).get("logprob_gap_limit")
        limit = configured if is_number(configured) else GAP_LIMIT
        name, seen = "Engines and learners hold the same weights", f"largest gap {number(gap.max())} nats"
        yield _check(gap.max() <= limit, name, seen, f"at most {limit:g}", "bad")
    if len(kl):
        late = edges(kl)[1]
        seen, expected = f"KL {number(late)} nats a token", f"at most {KL_LIMIT:g}, late"
        yield _check(late <= KL_LIMIT, "Distance from the reference", seen, expected)
    for metric, name, limit, bad in SHARES:
        shares = {n: edges(v)[1] for t, n in TASK_NAMES.items() if len(v := training.values(f"{metric}/{t}"))}
        if shares:
            seen = ", ".join(f"{task} {v:.1%}" for task, v in shares.items())
            yield _share(max(shares.values()), limit, bad, name, seen, ", late")
    entropy = training.values("policy/entropy")
    if len(entropy) >= 5 and edges(entropy)[0] > 0:
        first, last = edges(entropy)
        seen, expected = f"entropy {arrow(entropy)}", f"at least {ENTROPY_FLOOR:.0%} of the start"
        yield _check(last >= ENTROPY_FLOOR * first, "Answers stay varied", seen, expected)
    unrankable = training.values("reward/unrankable_groups")
    if len(unrankable):
        total = int(unrankable.sum())
        yield _none("Groups without a rival to rank against", count(total, "group") if total else "")


def _overfitting(training: Training) -> Iterator[VerdictCheck]:
    losses = [training.values(f"eval/loss/{t}") for t in TASK_NAMES]
    ratios = [float(v[-1] / v.min()) for v in losses if len(v) >= 2 and v.min() > 0]
    if ratios:
        worst = max(ratios)
        seen = "at its lowest at the end" if worst <= 1.0 else f"{worst - 1:.1%} above its lowest"
        yield _check(worst <= OVERFIT_LIMIT, "Held-out SFT loss", seen, "at most 5% above its lowest")
