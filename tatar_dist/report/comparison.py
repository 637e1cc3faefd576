"""Compare several runs: which learned more, on what, and whether the difference exceeds chance.

Pure functions of two or more `RunFiles` that return the headline and the tables of the page. Held-out SRCC is compared
if two runs have it for the same data set, otherwise the gain in reward. A run is called better only if chance does not
explain the difference. On the same held-out images, the SRCC difference is bootstrapped, by source photograph where
predictions name one. On unpaired images, Fisher's z values are compared. A gain in reward is compared with its spread
over steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tatar_dist.evaluate.compare import paired_difference
from tatar_dist.evaluate.metrics import srcc
from tatar_dist.report.charts import number, percent
from tatar_dist.report.gallery import key_of
from tatar_dist.report.reading import RunFiles, Training, is_number
from tatar_dist.report.verdict import ARROW, TASK_NAMES, Headline, arrow, edges, listed

ROUNDS = 1000
SCORES = ("srcc", "plcc", "mae", "n", "n_parsed")
SHARED = 0.9  # of the images of either run: fewer are no paired comparison
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


def datasets(entrants: Sequence[Entrant]) -> dict[str, str]:
    """Return the task of every data set with held-out scores of any run, quality before aesthetics."""
    tasks: dict[str, str] = {}
    for e in entrants:
        tasks |= {d: e.run.task(d) for d in e.run.datasets}
        for t in e.run.trainings:
            tasks = {d: "iaa" if "iaa" in d else "iqa" for d in t.held_out} | tasks
    return dict(sorted(tasks.items(), key=lambda item: (item[1] != "iqa", item[0])))


def held_out(entrant: Entrant, dataset: str) -> dict[str, float]:
    """Return scores of the last evaluation with the data set, else of the last training that logged it.

    The keys are SCORES, `parsed`, the share of the answers with a score, and `start`, the SRCC before training; those
    that are not known are absent.
    """
    scores: dict[str, Any] = {}
    for training in entrant.run.trainings:
        for key in ("srcc", "plcc"):
            if len(curve := training.values(f"eval/{dataset}/{key}")):
                scores[key] = float(curve[-1])
                if key == "srcc":
                    scores["start"] = float(curve[0]) if len(curve) > 1 else None
    metrics = [e.metrics[dataset] for e in entrant.run.evaluations if dataset in e.metrics]
    if metrics:
        scores = {key: metrics[-1].get(key) for key in SCORES}
        scores["start"] = metrics[0].get("srcc") if len(metrics) > 1 else None
    known = {k: v for k, v in scores.items() if is_number(v)}
    return known | ({"parsed": known["n_parsed"] / known["n"]} if known.get("n") and "n_parsed" in known else {})


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
    tasks = datasets(entrants)
    findings = [f for d in tasks if (f := _held_out_finding(entrants, d, tasks))]
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


def _held_out_finding(entrants: Sequence[Entrant], dataset: str, tasks: Mapping[str, str]) -> Finding | None:
    scored = [(e, scores) for e in entrants if "srcc" in (scores := held_out(e, dataset))]
    if len(scored) < 2:
        return None
    scored.sort(key=lambda pair: -pair[1]["srcc"])
    clear, test = _difference(scored[0], scored[1], dataset)
    task = tasks[dataset]
    alone = list(tasks.values()).count(task) == 1
    figures = []
    for e, scores in scored:
        start = f"{_three(scores['start'])} {ARROW} " if "start" in scores else ""
        parsed = f", {percent(scores['parsed'])} parsed" if "parsed" in scores else ""
        n = f"n = {scores['n']:,}{parsed}" if "n" in scores else "n not logged"
        figures.append(f"{e.letter} {start}{_three(scores['srcc'])} ({n})")
    line = f"SRCC on {dataset}: {', '.join(figures)}. {test}"
    return Finding(TASK_NAMES.get(task, dataset) if alone else dataset, [e.letter for e, _ in scored], clear, line)


def _difference(
    best: tuple[Entrant, dict[str, float]], second: tuple[Entrant, dict[str, float]], dataset: str
) -> tuple[bool | None, str]:
    """Return (whether the difference exceeds chance, None if untested; the sentence that reports it)."""
    names = f"{best[0].letter} {MINUS} {second[0].letter}"
    pairs = _pairs(second[0].run, best[0].run, dataset)
    entry = paired_difference(srcc, pairs, rounds=ROUNDS) if pairs else {"ci95": None}
    if entry["ci95"]:
        lo, hi = entry["ci95"]
        missing = sum(not (is_number(a["prediction"]) and is_number(b["prediction"])) for a, b in pairs)
        unparsed = f", {missing:,} with an answer that does not parse, which counts as 50" if missing else ""
        figures = f"{entry['difference']:+.3f} (95 % {lo:+.3f} to {hi:+.3f})".replace("-", MINUS)
        by = "source photograph" if all(a["source"] for a, _ in pairs) else "image"
        return lo > 0, f"{names}: {figures}, the same {len(pairs):,} images resampled by {by}{unparsed}."
    counts = [scores.get("n_parsed", 0) for _, scores in (best, second)]
    if min(counts) > 3:
        z = [math.atanh(min(max(scores["srcc"], -0.9999), 0.9999)) for _, scores in (best, second)]
        apart = (z[0] - z[1]) / math.sqrt(sum(FISHER / (n - 3) for n in counts))
        return apart > SURE, f"{names}: {number(apart)} standard errors of Fisher's z, images taken as not paired."
    return None, "Nothing tells how far chance moves these figures: evaluate both for that."


def _pairs(a: RunFiles, b: RunFiles, dataset: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the answers of the last evaluations of both runs by shared image; empty if they share too few."""
    rows = [[of for e in run.evaluations if (of := e.of(dataset))] for run in (a, b)]
    of_a, of_b = ({key_of(r): r for of in evaluations[-1:] for r in of} for evaluations in rows)
    pairs = [(of_a[k], of_b[k]) for k in of_a if k in of_b and of_a[k]["target"] == of_b[k]["target"]]
    return pairs if len(pairs) >= SHARED * max(len(of_a), len(of_b)) else []


def _reward_finding(entrants: Sequence[Entrant], task: str) -> Finding | None:
    gains = []
    for e in entrants:
        training = e.run.training("grpo")
        values = training.values(f"reward/total/{task}") if training else np.empty(0)
        if training and len(values) >= 2:
            k = max(1, len(values) // 5)
            first, last = edges(values)
            variance = (np.var(values[:k]) + np.var(values[-k:])) / k
            failures = training.values(f"completion/parse_failures/{task}")
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
    sections = [t.config.get("reward") for e in entrants if (t := e.run.training("grpo"))]
    return all(s == sections[0] for s in sections)


Row = tuple[str, list[str], set[int]]  # name, one cell per run, positions of the best values
LATE = (  # rows of the last table: (name, metric)
    ("seconds a step", "time/step"),
    ("tokens a second", "perf/tokens_per_second"),
    ("KL to the reference, nats", "loss/kl"),
    ("entropy, nats", "policy/entropy"),
    ("sync gap, nats", "sync/logprob_gap"),
    ("loss", "loss/total"),
)


def tables(entrants: Sequence[Entrant]) -> list[tuple[str, str, list[Row]]]:
    """Return (heading, task or "", rows) of the figures that at least one run has."""
    parts = []
    for dataset, task in datasets(entrants).items():
        scores = [held_out(e, dataset) for e in entrants]
        rows = [
            _row("SRCC", [s.get("srcc") for s in scores], _three, max),
            _row("PLCC", [s.get("plcc") for s in scores], _three, max),
            _row("MAE, points", [s.get("mae") for s in scores], lambda v: f"{v:.1f}", min),
            _row("parsed", [s.get("parsed") for s in scores], percent),
            _row("images", [s.get("n") for s in scores], lambda v: f"{v:,.0f}"),
        ]
        parts.append((f"Held-out images, {dataset}", task, rows))
    grpo = [e.run.training("grpo") for e in entrants]
    for task, name in TASK_NAMES.items():
        terms = sorted({x for t in grpo if t for x in t.terms(task)})
        rows = [
            _row("reward", _late(grpo, f"reward/total/{task}"), _three),
            *(_row(f"\N{EN DASH} {x}", _late(grpo, f"reward/{x}/{task}"), _three) for x in terms),
            _row("tokens a completion", _late(grpo, f"completion/tokens/{task}"), number),
            _row("not parsed", _late(grpo, f"completion/parse_failures/{task}"), percent),
        ]
        parts.append((f"Sampled for {name}, last fifth of the steps", task, rows))
    last = [e.run.trainings[-1] if e.run.trainings else None for e in entrants]
    rows = [_row("steps", [len(t.rows) if t else None for t in last], lambda v: f"{v:,.0f}")]
    rows += [_row(name, _late(last, metric), number) for name, metric in LATE]
    parts.append(("Training, last fifth of the steps", "", rows))
    kept = [(heading, task, [r for r in rows if set(r[1]) != {DASH}]) for heading, task, rows in parts]
    return [part for part in kept if part[2]]


def _late(trainings: Sequence[Training | None], metric: str) -> list[float | None]:
    """Return the mean of a metric over the last fifth of the steps of each run, None where it was not logged."""
    curves = [t.values(metric) if t else np.empty(0) for t in trainings]
    return [edges(values)[1] if len(values) else None for values in curves]


def _row(
    name: str, values: Sequence[float | None], text: Callable[[float], str], best: Callable[..., float] | None = None
) -> Row:
    known = {v for v in values if v is not None}
    top = best(known) if best and len(known) > 1 else None
    places = {i for i, v in enumerate(values) if v is not None and v == top}
    return name, [DASH if v is None else text(v) for v in values], places


def _three(value: float) -> str:
    return f"{value:.3f}".replace("-", MINUS)
