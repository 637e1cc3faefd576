"""HTML page that compares runs: `write([run, run, …], file)`, `tatar-dist report RUN RUN …`.

The runs are run or demo directories of any kind. The page shows which run learned more, the final figures, the
configuration keys that differ, overlaid curves and the health checks of each run. Held-out SRCC is compared if two runs
have it for the same data set, otherwise the gain in reward. A run is called better only if chance does not explain the
difference. On the same held-out images, the SRCC difference is bootstrapped, by source photograph where predictions
name one. On unpaired images, Fisher's z values are compared. A gain in reward is compared with its spread over steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tatar_dist.errors import UserError
from tatar_dist.evaluate.compare import compare_rows
from tatar_dist.evaluate.metrics import srcc
from tatar_dist.report.charts import line_chart, number, percent
from tatar_dist.report.gallery import key_of
from tatar_dist.report.html import differing, write_page
from tatar_dist.report.panels import Panel, line
from tatar_dist.report.reading import RunFiles, Training, clean, is_number, read_run
from tatar_dist.report.verdict import ARROW, TASK_NAMES, arrow, checks, count, edges, listed

ROUNDS = 1000
SCORES = ("srcc", "plcc", "mae", "n", "n_parsed")
SHARED = 0.9  # of the images of either run: fewer are no paired comparison
SURE = 1.96  # standard errors
FISHER = 1.06  # variance of Fisher's z of SRCC, times n - 3 (Fieller, Hartley & Pearson 1957)
DASH = "\N{EM DASH}"
MINUS = "\N{MINUS SIGN}"
FILE = "compare.html"
LETTERS = "ABCDEFGHIJKLMNOP"
COLORS = 8  # --r0 to --r7 of the page; runs beyond them get dashed lines
# Panels: (stage, metric, title, caption, least upper end of the axis from 0 or None for the range of the data).
# {task} and {name} stand for every task, {dataset} for every held-out data set, {term} for every reward term of a task.
Curves = tuple[tuple[str, str, str, str, float | None], ...]
MAIN: Curves = (
    ("grpo", "reward/total/{task}", "Reward, {name}", "Mean sum of all terms.", None),
    ("sft", "eval/{dataset}/srcc", "Held-out SRCC, {dataset} (SFT)", "During training, on validation images.", 1.0),
    ("grpo", "eval/{dataset}/srcc", "Held-out SRCC, {dataset}", "During training, on validation images.", 1.0),
    ("grpo", "loss/kl", "KL", "Distance from the reference, nats a token.", 1e-6),
    ("grpo", "completion/tokens/{task}", "Length, {name}", "Tokens a completion.", 1.0),
    ("sft", "loss/total", "SFT loss", "Training, nats a token.", None),
    ("sft", "eval/loss/{task}", "Held-out SFT loss, {name}", "Held-out images, nats a token.", None),
)
MORE: Curves = (
    ("grpo", "reward/{term}/{task}", "{term}, {name}", "Reward term for {name}, mean.", 1.0),
    ("grpo", "completion/parse_failures/{task}", "Not parsed, {name}", "Share of the sampled completions.", 0.05),
    (
        "grpo",
        "reward/frac_zero_std/total/{task}",
        "Groups that teach nothing, {name}",
        "Share of groups with one reward for all.",
        1.0,
    ),
    ("grpo", "policy/entropy", "Entropy", "Nats a token.", 1e-6),
    ("grpo", "sync/logprob_gap", "Sync gap", "Nats a token.", 1e-9),
    ("sft", "time/step", "SFT step time", "Seconds.", 1e-6),
    ("grpo", "time/step", "GRPO step time", "Seconds.", 1e-6),
)


@dataclass(frozen=True)
class Entrant:
    """One run of the comparison. letter: its label in charts, tables; color: its CSS variable."""

    letter: str
    name: str
    run: RunFiles
    color: str


def write(runs: Sequence[Path], file: Path) -> Path:
    """Write the comparison page and return its path.

    Raises:
        UserError: fewer than two runs or more than `LETTERS`, a run given twice, a directory without a run, or a page
            that cannot be written.
    """
    if not 2 <= len(runs) <= len(LETTERS):
        raise UserError(f"{len(runs)} runs: compare 2 to {len(LETTERS)}")
    paths = [Path(r).resolve() for r in runs]
    if len(set(paths)) < len(paths):
        twice = next(p for p in paths if paths.count(p) > 1)
        raise UserError(f"{twice}: given twice, a run is not compared with itself")
    named = enumerate(zip(LETTERS, short_names(paths), runs, strict=False))
    entrants = [Entrant(letter, clean(name), read_run(run), f"r{i % COLORS}") for i, (letter, name, run) in named]
    checks_of = [{c.name: c for c in checks(e.run)} for e in entrants]
    check_names = dict.fromkeys(name for by_name in checks_of for name in by_name)
    return write_page(
        file,
        "compare.html.j2",
        headline=headline(entrants),
        entrants=entrants,
        steps=[", ".join(count(len(t.rows), f"{t.kind.upper()} step") for t in e.run.trainings) for e in entrants],
        tables=tables(entrants),
        configurations=_configurations(entrants),
        panels=panels(entrants, MAIN),
        more=panels(entrants, MORE),
        summary=[(e, list(by_name.values())) for e, by_name in zip(entrants, checks_of, strict=True)],
        health={name: [by_name.get(name) for by_name in checks_of] for name in check_names},
        notes=[f"{e.letter}: {note}" for e in entrants for note in dict.fromkeys(e.run.notes)],
    )


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest unique path suffixes of equal depth: r/a/sft, r/b/sft -> a/sft, b/sft."""
    depth = 1
    while len({p.parts[-depth:] for p in paths}) < len(paths):
        depth += 1
    return ["/".join(p.parts[-depth:]) for p in paths]


def _configurations(entrants: Sequence[Entrant]) -> list[tuple[str, list[Entrant], list[tuple[str, list[str]]]]]:
    """Return (stage, runs, [(key, value of each run)]) of differing keys, for stages of 2+ runs."""
    configs = {
        "sft": [(e, t.config) for e in entrants if (t := e.run.training("sft"))],
        "grpo": [(e, t.config) for e in entrants if (t := e.run.training("grpo"))],
        "evaluate": [(e, e.run.config) for e in entrants if not e.run.trainings],
    }
    stages = []
    for stage, of_stage in configs.items():
        known = [(e, config) for e, config in of_stage if config]
        if len(known) >= 2:
            rows = differing([config for _, config in known], stage)
            stages.append((stage, [e for e, _ in known], [row for row in rows if row[0] != "output"]))
    return stages


def panels(entrants: Sequence[Entrant], table: Curves) -> list[Panel]:
    """Draw the panels of a table, one line per run; metrics that no run logged are omitted."""
    tasks = [{"task": task, "name": name} for task, name in TASK_NAMES.items()]
    grpo = [t for e in entrants if (t := e.run.training("grpo"))]
    terms = [s | {"term": x} for s in tasks for x in dict.fromkeys(x for t in grpo for x in t.terms(s["task"]))]
    subjects = {"{term}": terms, "{task}": tasks, "{dataset}": [{"dataset": d} for d in datasets(entrants)]}
    result = []
    for stage, metric, title, caption, top in table:
        for names in next((s for placeholder, s in subjects.items() if placeholder in metric), [{}]):
            lines = [
                line(training, metric.format(**names), e.letter, e.color, dashed=i >= COLORS)
                for i, e in enumerate(entrants)
                if (training := e.run.training(stage))
            ]
            heading = title.format(**names)
            chart = line_chart(lines, f"{heading} of each run", y_range=None if top is None else (0.0, top))
            if chart:
                result.append(Panel(heading, caption.format(**names), [chart]))
    return result


def datasets(entrants: Sequence[Entrant]) -> dict[str, str]:
    """Return the task by data set with held-out scores of any run, quality before aesthetics."""
    tasks: dict[str, str] = {}
    for e in entrants:
        tasks |= {d: e.run.task(d) for d in e.run.datasets}
        for t in e.run.trainings:
            tasks = {d: "iaa" if "iaa" in d else "iqa" for d in t.held_out} | tasks
    return dict(sorted(tasks.items(), key=lambda item: (item[1] != "iqa", item[0])))


def held_out(entrant: Entrant, dataset: str) -> dict[str, float]:
    """Return scores of the last evaluation of the data set, else of the last training with it.

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
    """Result on one data set or task. statement: for the title, {}: the subject; line: figures."""

    subject: str
    statement: str
    line: str


def headline(entrants: Sequence[Entrant]) -> tuple[str, list[str]]:
    """Return the title that names the better run, and sentences with the supporting figures."""
    tasks = datasets(entrants)
    findings = [f for d in tasks if (f := _held_out_finding(entrants, d, tasks))]
    lines, ending = [], ""
    if not findings:
        findings = [f for task in TASK_NAMES if (f := _reward_finding(entrants, task))]
        sections = [t.config.get("reward") for e in entrants if (t := e.run.training("grpo"))]
        if findings and any(section != sections[0] for section in sections):
            ending = ", but the rewards differ"
            lines = ["The rewards are configured differently: compare their terms, or evaluate the runs."]
    if not findings:
        return "Nothing that these runs share says which learned more", []
    subjects_of: dict[str, list[str]] = {}
    for f in findings:
        subjects_of.setdefault(f.statement, []).append(f.subject)
    title = "; ".join(statement.format(listed(subjects)) for statement, subjects in subjects_of.items()) + ending
    return title[0].upper() + title[1:], [f.line for f in findings] + lines


def _statement(entrants: Sequence[Entrant], letters: Sequence[str], clear: bool | None, best: str) -> str:
    """Word the title. letters: best first; clear: whether the first two differ beyond chance."""
    if clear is None:
        return f"{letters[0]} is ahead on {{}}, not tested for chance"
    among = f" between {listed(sorted(letters[:2]))}" if len(entrants) > 2 else ""
    return f"{letters[0]} {best}" if clear else f"no clear difference{among} on {{}}"


def _held_out_finding(entrants: Sequence[Entrant], dataset: str, tasks: Mapping[str, str]) -> Finding | None:
    scored = [(e, scores) for e in entrants if "srcc" in (scores := held_out(e, dataset))]
    if len(scored) < 2:
        return None
    scored.sort(key=lambda pair: -pair[1]["srcc"])
    clear, test = _difference(scored[0], scored[1], dataset)
    figures = []
    for e, scores in scored:
        start = f"{_three(scores['start'])} {ARROW} " if "start" in scores else ""
        parsed = f", {percent(scores['parsed'])} parsed" if "parsed" in scores else ""
        n = f"n = {scores['n']:,}{parsed}" if "n" in scores else "n not logged"
        figures.append(f"{e.letter} {start}{_three(scores['srcc'])} ({n})")
    alone = list(tasks.values()).count(tasks[dataset]) == 1
    subject = TASK_NAMES.get(tasks[dataset], dataset) if alone else dataset
    statement = _statement(entrants, [e.letter for e, _ in scored], clear, "scores {} best")
    return Finding(subject, statement, f"SRCC on {dataset}: {', '.join(figures)}. {test}")


def _difference(
    best: tuple[Entrant, dict[str, float]], second: tuple[Entrant, dict[str, float]], dataset: str
) -> tuple[bool | None, str]:
    """Return (whether the difference exceeds chance, None if untested; sentence reporting it)."""
    names = f"{best[0].letter} {MINUS} {second[0].letter}"
    pairs = _pairs(second[0].run, best[0].run, dataset)
    if pairs:
        entry = compare_rows(srcc, pairs, rounds=ROUNDS)
        if not entry["ci95"]:
            return None, f"{names}: {entry['reason']}."
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
    """Pair the answers of both runs' last evaluations by image; empty if they share too few."""
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
    texts = "; ".join(text for *_, text in gains)
    line = f"Mean reward for {TASK_NAMES[task]}, first to last fifth of the steps: {texts}."
    statement = _statement(entrants, [letter for *_, letter, _ in gains], clear, "gained most reward on {}")
    return Finding(TASK_NAMES[task], statement, line)


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
    """Average a metric over the last fifth of each run's steps; None where it was not logged."""
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
