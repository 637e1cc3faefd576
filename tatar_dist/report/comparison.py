"""Compare several runs: which learned more, on what, and whether the difference exceeds chance.

Pure functions of two or more `RunFiles` that return the headline and the tables of the page. Held-out SRCC is compared
if two runs have it for the same data set, otherwise the gain in reward. A run is called better only if chance does not
explain the difference. On the same held-out images, the SRCC difference is bootstrapped, by source photograph where
predictions name one. On unpaired images, Fisher's z values are compared. A gain in reward is compared with its spread
over steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tatar_dist.evaluate.bootstrap import paired_srcc_difference
from tatar_dist.report.charts import number
from tatar_dist.report.gallery import key_of
from tatar_dist.report.reading import EvaluationFiles, RunFiles, Training, is_number
from tatar_dist.report.verdict import TASK_NAMES, Headline, edges, listed

ROUNDS = 1000
LEAST_CLUSTERS = 3  # photographs: fewer cannot be resampled, then images are
SURE = 1.96  # standard errors
FISHER = 1.06  # variance of Fisher's z of SRCC, times n - 3 (Fieller, Hartley & Pearson 1957)
DASH = "\N{EM DASH}"
ARROW = "\N{RIGHTWARDS ARROW}"
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Entrant:
    """One run of the comparison. letter: its label in charts and tables; color: its CSS variable."""

    letter: str
    name: str
    run: RunFiles
    color: str

    def training(self, kind: str) -> Training | None:
        """Return the last training of a kind."""
        return next((t for t in reversed(self.run.trainings) if t.kind == kind), None)

    @property
    def last(self) -> Training | None:
        return self.run.trainings[-1] if self.run.trainings else None

    @property
    def kind(self) -> str:
        if self.run.is_demo:
            return "demo"
        return self.run.trainings[-1].kind.upper() if self.run.trainings else "evaluation"


@dataclass(frozen=True)
class HeldOut:
    """Final held-out scores of a run on one data set. start: SRCC before training, None if unknown.
    mae, n and n_parsed are None if the scores come from a training curve."""

    srcc: float | None
    plcc: float | None
    mae: float | None
    n: int | None
    n_parsed: int | None
    start: float | None


def datasets(entrants: Sequence[Entrant]) -> list[str]:
    """Return the data sets with held-out scores of any run, quality before aesthetics."""
    names: dict[str, str] = {}
    for e in entrants:
        names |= {d: e.run.task(d) for d in e.run.datasets}
        for t in e.run.trainings:
            for d in t.held_out:
                names.setdefault(d, "iaa" if "iaa" in d else "iqa")
    return sorted(names, key=lambda d: (names[d] != "iqa", d))


def held_out(entrant: Entrant, dataset: str) -> HeldOut | None:
    """Return scores of the last evaluation with the data set, else of the last training that logged it."""
    of_set = [e.metrics[dataset] for e in entrant.run.evaluations if dataset in e.metrics]
    if of_set:
        last = of_set[-1]
        values = {k: last[k] if is_number(last.get(k)) else None for k in ("srcc", "plcc", "mae", "n", "n_parsed")}
        before = of_set[0].get("srcc") if len(of_set) > 1 else None
        return HeldOut(**values, start=before if is_number(before) else None)
    for training in reversed(entrant.run.trainings):
        srcc, plcc = (training.series(f"eval/{dataset}/{k}")[1] for k in ("srcc", "plcc"))
        if len(srcc):
            start = float(srcc[0]) if len(srcc) > 1 else None
            return HeldOut(float(srcc[-1]), float(plcc[-1]) if len(plcc) else None, None, None, None, start)
    return None


@dataclass(frozen=True)
class Finding:
    """Result on one data set or task. order: letters, best first; line: the sentence with figures.
    clear: whether the difference of the first two exceeds chance, None if untested."""

    subject: str
    order: list[str]
    clear: bool | None
    line: str


def headline(entrants: Sequence[Entrant]) -> Headline:
    """Build the title that names the better run, with the supporting figures."""
    names = datasets(entrants)
    found = [f for d in names if (f := _held_out_finding(entrants, d, names))]
    lines, best, ending = [f.line for f in found], "{} scores {} best", ""
    if not found:
        found, best = [f for t in TASK_NAMES if (f := _reward_finding(entrants, t))], "{} gained most reward on {}"
        lines = [f.line for f in found]
        if found and not _same_reward(entrants):
            ending = ", but the rewards differ"
            lines.append("The rewards are configured differently: compare their terms, or evaluate the runs.")
    if not found:
        return Headline("Nothing that these runs share says which learned more", [])
    said: dict[tuple[Any, ...], list[str]] = {}  # what is said -> of which subjects
    for f in found:
        letters = sorted(f.order[:2]) if f.clear is False else f.order[:1]
        said.setdefault((f.clear, *letters), []).append(f.subject)
    parts = []
    for (clear, *letters), subjects in said.items():
        if clear:
            parts.append(best.format(letters[0], listed(subjects)) + ending)
        elif clear is None:
            parts.append(f"{letters[0]} is ahead on {listed(subjects)}, not tested for chance" + ending)
        else:
            among = f" between {listed(letters)}" if len(entrants) > 2 else ""
            parts.append(f"no clear difference{among} on {listed(subjects)}")
    title = "; ".join(parts)
    return Headline(title[0].upper() + title[1:], lines)


def _held_out_finding(entrants: Sequence[Entrant], dataset: str, names: Sequence[str]) -> Finding | None:
    found = [(e, h) for e in entrants if (h := held_out(e, dataset)) and h.srcc is not None]
    if len(found) < 2:
        return None
    found.sort(key=lambda f: -(f[1].srcc or 0.0))
    (first, a), (second, b) = found[:2]
    sure, test = _difference(first, a, second, b, dataset)
    task = next((t for e, _ in found if (t := e.run.task(dataset))), "iaa" if "iaa" in dataset else "iqa")
    alone = sum(("iaa" in d) == ("iaa" in dataset) for d in names) == 1
    subject = TASK_NAMES.get(task, dataset) if alone else dataset
    each = ", ".join(f"{e.letter} {_moved(h)} ({_counted(h)})" for e, h in found)
    return Finding(subject, [e.letter for e, _ in found], sure, f"SRCC on {dataset}: {each}. {test}")


def _moved(h: HeldOut) -> str:
    start = f"{_three(h.start)} {ARROW} " if h.start is not None else ""
    return start + (_three(h.srcc) if h.srcc is not None else "none")


def _counted(h: HeldOut) -> str:
    if h.n is None:
        return "n not logged"
    parsed = f", {_percent(h.n_parsed / h.n)} parsed" if h.n and h.n_parsed is not None else ""
    return f"n = {h.n:,}{parsed}"


def _difference(first: Entrant, a: HeldOut, second: Entrant, b: HeldOut, dataset: str) -> tuple[bool | None, str]:
    """Return (whether the difference exceeds chance, None if untested; the sentence that reports it)."""
    paired = _pairs(first.run, second.run, dataset)
    names = f"{first.letter} {MINUS} {second.letter}"
    if paired is not None:
        target, after, before, cluster, by = paired
        found = paired_srcc_difference(target, before, after, cluster, rounds=ROUNDS)
        if math.isfinite(found.lo) and math.isfinite(found.estimate):
            missing = int((np.isnan(after) | np.isnan(before)).sum())
            unparsed = f", {missing:,} with an answer that does not parse, which counts as 50" if missing else ""
            figures = f"{found.estimate:+.3f} (95 % {found.lo:+.3f} to {found.hi:+.3f})".replace("-", MINUS)
            return found.lo > 0, f"{names}: {figures}, the same {len(target):,} images resampled by {by}{unparsed}."
    if a.srcc is not None and b.srcc is not None and all(h.n_parsed and h.n_parsed > 3 for h in (a, b)):
        z = [math.atanh(min(max(h.srcc or 0.0, -0.9999), 0.9999)) for h in (a, b)]
        error = math.sqrt(sum(FISHER / ((h.n_parsed or 4) - 3) for h in (a, b)))
        apart = (z[0] - z[1]) / error
        return apart > SURE, f"{names}: {number(apart)} standard errors of Fisher's z, images taken as not paired."
    return None, "Nothing tells how far chance moves these figures: evaluate both for that."


def _pairs(a: RunFiles, b: RunFiles, dataset: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, str] | None:
    """Return (target, prediction of a, prediction of b, cluster, kind of cluster) of shared images, or None."""
    last = [_last_with(run, dataset) for run in (a, b)]
    if last[0] is None or last[1] is None:
        return None
    of_a, of_b = ({key_of(p): p for p in e.of(dataset)} for e in last if e is not None)
    keys = [k for k in of_a if k in of_b and of_a[k]["target"] == of_b[k]["target"]]
    if len(keys) < 4 or len(keys) < 0.9 * max(len(of_a), len(of_b)):
        return None

    def scores(of: dict[Any, dict[str, Any]]) -> np.ndarray:
        return np.array([of[k]["prediction"] if is_number(of[k]["prediction"]) else np.nan for k in keys], np.float64)

    sources = [of_a[k].get("source") for k in keys]
    by_source = all(sources) and len(set(sources)) >= LEAST_CLUSTERS
    cluster = np.array([str(s) for s in sources]) if by_source else np.arange(len(keys))
    target = np.array([of_a[k]["target"] for k in keys], np.float64)
    return target, scores(of_a), scores(of_b), cluster, "source photograph" if by_source else "image"


def _last_with(run: RunFiles, dataset: str) -> EvaluationFiles | None:
    return next((e for e in reversed(run.evaluations) if e.of(dataset)), None)


def _reward_finding(entrants: Sequence[Entrant], task: str) -> Finding | None:
    found = []
    for e in entrants:
        training = e.training("grpo")
        values = training.series(f"reward/total/{task}")[1] if training else np.empty(0)
        if training and len(values) >= 2:
            k = max(1, len(values) // 5)
            first, last = edges(values)
            error = math.sqrt((np.var(values[:k]) + np.var(values[-k:])) / k)
            found.append((last - first, error, first, last, k, e, training))
    if len(found) < 2:
        return None
    found.sort(key=lambda f: -f[0])
    (gain_a, error_a), (gain_b, error_b) = found[0][:2], found[1][:2]
    spread = math.hypot(error_a, error_b)
    tested = min(found[0][4], found[1][4]) >= 3
    parts = []
    for gain, _, first, last, k, e, training in found:
        failures = training.series(f"completion/parse_failures/{task}")[1]
        parsed = f", {_percent(1 - edges(failures)[1])} parsed" if len(failures) else ""
        moved = f"{number(first)} {ARROW} {number(last)}, {gain:+.2f}".replace("-", MINUS)
        parts.append(f"{e.letter} {moved} (last {k:,} of {len(training.rows):,} steps{parsed})")
    line = f"Mean reward for {TASK_NAMES[task]}, first to last fifth of the steps: {'; '.join(parts)}."
    clear = gain_a - gain_b > SURE * spread if tested or gain_a == gain_b else None
    return Finding(TASK_NAMES[task], [f[5].letter for f in found], clear, line)


def _same_reward(entrants: Sequence[Entrant]) -> bool:
    """Whether all GRPO runs have the same reward configuration."""
    sections = [t.config.get("reward") for e in entrants if (t := e.training("grpo"))]
    return all(s == sections[0] for s in sections)


@dataclass(frozen=True)
class ComparisonRow:
    """One table row. cells: one text per run; best: positions of the best values, empty if not ranked."""

    name: str
    cells: list[str]
    best: frozenset[int] = frozenset()


def tables(entrants: Sequence[Entrant]) -> list[tuple[str, str, list[ComparisonRow]]]:
    """Return (heading, task or "", rows) of the figures that at least one run has."""
    found = []
    for dataset in datasets(entrants):
        scores = [held_out(e, dataset) for e in entrants]
        rows = [
            _row("SRCC", [s and s.srcc for s in scores], _three, max),
            _row("PLCC", [s and s.plcc for s in scores], _three, max),
            _row("MAE, points", [s and s.mae for s in scores], lambda v: f"{v:.1f}", min),
            _row(
                "parsed", [s.n_parsed / s.n if s and s.n and s.n_parsed is not None else None for s in scores], _percent
            ),
            _row("images", [s and s.n for s in scores], lambda v: f"{v:,.0f}"),
        ]
        found.append((f"Held-out images, {dataset}", "iaa" if "iaa" in dataset else "iqa", rows))
    for task, name in TASK_NAMES.items():
        grpo = [e.training("grpo") for e in entrants]
        terms = sorted({x for t in grpo if t for x in t.terms(task)})
        rows = [_row("reward", [_late(t, f"reward/total/{task}") for t in grpo], _three)]
        rows += [_row(f"\N{EN DASH} {x}", [_late(t, f"reward/{x}/{task}") for t in grpo], _three) for x in terms]
        rows += [
            _row("tokens a completion", [_late(t, f"completion/tokens/{task}") for t in grpo], number),
            _row("not parsed", [_late(t, f"completion/parse_failures/{task}") for t in grpo], _percent),
        ]
        found.append((f"Sampled for {name}, last fifth of the steps", task, rows))
    last = [e.last for e in entrants]
    rows = [
        _row("steps", [len(t.rows) if t else None for t in last], lambda v: f"{v:,.0f}"),
        _row("seconds a step", [_late(t, "time/step") for t in last], number),
        _row("tokens a second", [_late(t, "perf/tokens_per_second") for t in last], number),
        _row("KL to the reference, nats", [_late(t, "loss/kl") for t in last], number),
        _row("entropy, nats", [_late(t, "policy/entropy") for t in last], number),
        _row("sync gap, nats", [_late(t, "sync/logprob_gap") for t in last], number),
        _row("loss", [_late(t, "loss/total") for t in last], number),
    ]
    found.append(("Training, last fifth of the steps", "", rows))
    kept = [(heading, task, [r for r in rows if any(c != DASH for c in r.cells)]) for heading, task, rows in found]
    return [(heading, task, rows) for heading, task, rows in kept if rows]


def _late(training: Training | None, metric: str) -> float | None:
    values = training.series(metric)[1] if training else np.empty(0)
    return edges(values)[1] if len(values) else None


def _row(
    name: str,
    values: Sequence[float | None],
    text: Callable[[float], str],
    best: Callable[..., float] | None = None,
) -> ComparisonRow:
    known = [v for v in values if v is not None]
    top = best(known) if best and len(known) > 1 and len(set(known)) > 1 else None
    places = frozenset(i for i, v in enumerate(values) if v is not None and v == top)
    return ComparisonRow(name, [DASH if v is None else text(v) for v in values], places)


def _three(value: float) -> str:
    return f"{value:.3f}".replace("-", MINUS)


def _percent(value: float) -> str:
    return f"{value:.1%}" if value < 1 else "100%"
