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
from tatar_dist.report.charts import number, percent
from tatar_dist.report.gallery import Key, key_of
from tatar_dist.report.reading import RunFiles, Training, is_number
from tatar_dist.report.verdict import ARROW, TASK_NAMES, Headline, arrow, edges, listed

ROUNDS = 1000
SCORES = ("srcc", "plcc", "mae", "n", "n_parsed")
LEAST_CLUSTERS = 3  # photographs: fewer cannot be resampled, then images are
SURE = 1.96  # standard errors
FISHER = 1.06  # variance of Fisher's z of SRCC, times n - 3 (Fieller, Hartley & Pearson 1957)
DASH = "\N{EM DASH}"
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

    srcc: float | None = None
    plcc: float | None = None
    mae: float | None = None
    n: int | None = None
    n_parsed: int | None = None
    start: float | None = None

    @property
    def parsed(self) -> float | None:
        """Share of the answers that have a score."""
        return self.n_parsed / self.n if self.n and self.n_parsed is not None else None


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
        values = {k: v for k, v in of_set[-1].items() if k in SCORES and is_number(v)}
        before = of_set[0].get("srcc") if len(of_set) > 1 else None
        return HeldOut(**values, start=before if is_number(before) else None)
    for training in reversed(entrant.run.trainings):
        srcc, plcc = (training.series(f"eval/{dataset}/{k}")[1].tolist() for k in ("srcc", "plcc"))
        if srcc:
            return HeldOut(srcc[-1], plcc[-1] if plcc else None, start=srcc[0] if len(srcc) > 1 else None)
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
    findings = [f for d in names if (f := _held_out_finding(entrants, d, names))]
    lines, best, ending = [f.line for f in findings], "{} scores {} best", ""
    if not findings:
        findings, best = [f for t in TASK_NAMES if (f := _reward_finding(entrants, t))], "{} gained most reward on {}"
        lines = [f.line for f in findings]
        if findings and not _same_reward(entrants):
            ending = ", but the rewards differ"
            lines.append("The rewards are configured differently: compare their terms, or evaluate the runs.")
    if not findings:
        return Headline("Nothing that these runs share says which learned more", [])
    subjects_of: dict[tuple[Any, ...], list[str]] = {}  # (clear, letters named) -> subjects
    for f in findings:
        letters = sorted(f.order[:2]) if f.clear is False else f.order[:1]
        subjects_of.setdefault((f.clear, *letters), []).append(f.subject)
    parts = []
    for (clear, *letters), subjects in subjects_of.items():
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
    scored = [(h.srcc, e, h) for e in entrants if (h := held_out(e, dataset)) and h.srcc is not None]
    if len(scored) < 2:
        return None
    scored.sort(key=lambda s: -s[0])
    clear, test = _difference(scored[0], scored[1], dataset)
    task = next((t for _, e, _ in scored if (t := e.run.task(dataset))), "iaa" if "iaa" in dataset else "iqa")
    alone = sum(("iaa" in d) == ("iaa" in dataset) for d in names) == 1
    subject = TASK_NAMES.get(task, dataset) if alone else dataset
    figures = []
    for srcc, e, h in scored:
        start = f"{_three(h.start)} {ARROW} " if h.start is not None else ""
        parsed = f", {percent(h.parsed)} parsed" if h.parsed is not None else ""
        figures.append(
            f"{e.letter} {start}{_three(srcc)} ({'n not logged' if h.n is None else f'n = {h.n:,}{parsed}'})"
        )
    return Finding(subject, [e.letter for _, e, _ in scored], clear, f"SRCC on {dataset}: {', '.join(figures)}. {test}")


def _difference(
    best: tuple[float, Entrant, HeldOut], second: tuple[float, Entrant, HeldOut], dataset: str
) -> tuple[bool | None, str]:
    """Return (whether the difference exceeds chance, None if untested; the sentence that reports it)."""
    names = f"{best[1].letter} {MINUS} {second[1].letter}"
    paired = _pairs(best[1].run, second[1].run, dataset)
    if paired is not None:
        target, after, before, cluster, by = paired
        i = paired_srcc_difference(target, before, after, cluster, rounds=ROUNDS)
        if math.isfinite(i.lo) and math.isfinite(i.estimate):
            missing = int((np.isnan(after) | np.isnan(before)).sum())
            unparsed = f", {missing:,} with an answer that does not parse, which counts as 50" if missing else ""
            figures = f"{i.estimate:+.3f} (95 % {i.lo:+.3f} to {i.hi:+.3f})".replace("-", MINUS)
            return i.lo > 0, f"{names}: {figures}, the same {len(target):,} images resampled by {by}{unparsed}."
    counts = [h.n_parsed or 0 for _, _, h in (best, second)]
    if min(counts) > 3:
        z = [math.atanh(min(max(srcc, -0.9999), 0.9999)) for srcc, *_ in (best, second)]
        apart = (z[0] - z[1]) / math.sqrt(sum(FISHER / (n - 3) for n in counts))
        return apart > SURE, f"{names}: {number(apart)} standard errors of Fisher's z, images taken as not paired."
    return None, "Nothing tells how far chance moves these figures: evaluate both for that."


def _answers(run: RunFiles, dataset: str) -> dict[Key, dict[str, Any]]:
    """Return the answers of the last evaluation on a data set by image; empty without any."""
    rows = [of for e in run.evaluations if (of := e.of(dataset))]
    return {key_of(r): r for r in rows[-1]} if rows else {}


def _pairs(a: RunFiles, b: RunFiles, dataset: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, str] | None:
    """Return (target, prediction of a, prediction of b, cluster, kind of cluster) of shared images, or None."""
    of_a, of_b = _answers(a, dataset), _answers(b, dataset)
    keys = [k for k in of_a if k in of_b and of_a[k]["target"] == of_b[k]["target"]]
    if len(keys) < 4 or len(keys) < 0.9 * max(len(of_a), len(of_b)):
        return None

    def scores(of: dict[Key, dict[str, Any]]) -> np.ndarray:
        return np.array([of[k]["prediction"] if is_number(of[k]["prediction"]) else np.nan for k in keys], np.float64)

    sources = [of_a[k].get("source") for k in keys]
    by_source = all(sources) and len(set(sources)) >= LEAST_CLUSTERS
    cluster = np.array([str(s) for s in sources]) if by_source else np.arange(len(keys))
    target = np.array([of_a[k]["target"] for k in keys], np.float64)
    return target, scores(of_a), scores(of_b), cluster, "source photograph" if by_source else "image"


def _reward_finding(entrants: Sequence[Entrant], task: str) -> Finding | None:
    gains = []
    for e in entrants:
        training = e.training("grpo")
        values = training.series(f"reward/total/{task}")[1] if training else np.empty(0)
        if training and len(values) >= 2:
            k = max(1, len(values) // 5)
            first, last = edges(values)
            variance = (np.var(values[:k]) + np.var(values[-k:])) / k
            failures = training.series(f"completion/parse_failures/{task}")[1]
            parsed = f", {percent(1 - edges(failures)[1])} parsed" if len(failures) else ""
            moved = f"{arrow(values)}, {last - first:+.2f}".replace("-", MINUS)
            text = f"{e.letter} {moved} (last {k:,} of {len(training.rows):,} steps{parsed})"
            gains.append((last - first, variance, k, e.letter, text))
    if len(gains) < 2:
        return None
    gains.sort(key=lambda g: -g[0])
    (best, variance_a, k_a, *_), (second, variance_b, k_b, *_) = gains[:2]
    tested = min(k_a, k_b) >= 3 or best == second
    clear = best - second > SURE * math.sqrt(variance_a + variance_b) if tested else None
    texts = "; ".join(g[4] for g in gains)
    line = f"Mean reward for {TASK_NAMES[task]}, first to last fifth of the steps: {texts}."
    return Finding(TASK_NAMES[task], [g[3] for g in gains], clear, line)


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


LATE = (  # rows of the last table: (name, metric)
    ("seconds a step", "time/step"),
    ("tokens a second", "perf/tokens_per_second"),
    ("KL to the reference, nats", "loss/kl"),
    ("entropy, nats", "policy/entropy"),
    ("sync gap, nats", "sync/logprob_gap"),
    ("loss", "loss/total"),
)


def tables(entrants: Sequence[Entrant]) -> list[tuple[str, str, list[ComparisonRow]]]:
    """Return (heading, task or "", rows) of the figures that at least one run has."""
    found = []
    for dataset in datasets(entrants):
        scores = [held_out(e, dataset) or HeldOut() for e in entrants]
        rows = [
            _row("SRCC", [s.srcc for s in scores], _three, max),
            _row("PLCC", [s.plcc for s in scores], _three, max),
            _row("MAE, points", [s.mae for s in scores], lambda v: f"{v:.1f}", min),
            _row("parsed", [s.parsed for s in scores], percent),
            _row("images", [s.n for s in scores], lambda v: f"{v:,.0f}"),
        ]
        found.append((f"Held-out images, {dataset}", "iaa" if "iaa" in dataset else "iqa", rows))
    grpo = [e.training("grpo") for e in entrants]
    for task, name in TASK_NAMES.items():
        terms = sorted({x for t in grpo if t for x in t.terms(task)})
        rows = [
            _row("reward", _late(grpo, f"reward/total/{task}"), _three),
            *(_row(f"\N{EN DASH} {x}", _late(grpo, f"reward/{x}/{task}"), _three) for x in terms),
            _row("tokens a completion", _late(grpo, f"completion/tokens/{task}"), number),
            _row("not parsed", _late(grpo, f"completion/parse_failures/{task}"), percent),
        ]
        found.append((f"Sampled for {name}, last fifth of the steps", task, rows))
    last = [e.last for e in entrants]
    rows = [_row("steps", [len(t.rows) if t else None for t in last], lambda v: f"{v:,.0f}")]
    rows += [_row(name, _late(last, metric), number) for name, metric in LATE]
    found.append(("Training, last fifth of the steps", "", rows))
    kept = [(heading, task, [r for r in rows if any(c != DASH for c in r.cells)]) for heading, task, rows in found]
    return [(heading, task, rows) for heading, task, rows in kept if rows]


def _late(trainings: Sequence[Training | None], metric: str) -> list[float | None]:
    """Return the mean of a metric over the last fifth of the steps of each run, None where it was not logged."""
    found = [t.series(metric)[1] if t else np.empty(0) for t in trainings]
    return [edges(values)[1] if len(values) else None for values in found]


def _row(
    name: str,
    values: Sequence[float | None],
    text: Callable[[float], str],
    best: Callable[..., float] | None = None,
) -> ComparisonRow:
    known = {v for v in values if v is not None}
    top = best(known) if best and len(known) > 1 else None
    places = frozenset(i for i, v in enumerate(values) if v is not None and v == top)
    return ComparisonRow(name, [DASH if v is None else text(v) for v in values], places)


def _three(value: float) -> str:
    return f"{value:.3f}".replace("-", MINUS)
