"""Write one HTML page that compares runs: `write([run, run, …], file)`, also `tatar-dist report RUN RUN …`.

The runs are run or demo directories of any kind. The page resembles that of a single run (html.py). It shows which run
learned more, the final figures, the configuration keys that differ, overlaid curves and the health checks of each run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tatar_dist import __version__
from tatar_dist.errors import UserError
from tatar_dist.report.charts import line_chart
from tatar_dist.report.comparison import Entrant, datasets, headline, tables
from tatar_dist.report.details import differing
from tatar_dist.report.html import replace_page, templates
from tatar_dist.report.panels import Panel, line
from tatar_dist.report.reading import clean, read_run
from tatar_dist.report.verdict import TASK_NAMES, VerdictCheck, checks, count

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
    names = short_names(paths)
    entrants = [
        Entrant(LETTERS[i], clean(names[i]), read_run(Path(run)), f"r{i % COLORS}") for i, run in enumerate(runs)
    ]
    return replace_page(Path(file), render(entrants))


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest unique path suffixes of equal depth: runs/a/grpo, runs/b/grpo -> a/grpo, b/grpo."""
    depth = 1
    while len({p.parts[-depth:] for p in paths}) < len(paths):
        depth += 1
    return ["/".join(p.parts[-depth:]) for p in paths]


def render(entrants: Sequence[Entrant]) -> str:
    """Render the page as HTML text."""
    of_run = [checks(e.run) for e in entrants]
    return (
        templates()
        .get_template("compare.html.j2")
        .render(
            headline=headline(entrants),
            entrants=entrants,
            steps=[", ".join(count(len(t.rows), f"{t.kind.upper()} step") for t in e.run.trainings) for e in entrants],
            tables=tables(entrants),
            configurations=_configurations(entrants),
            panels=panels(entrants, MAIN),
            more=panels(entrants, MORE),
            summary=list(zip(entrants, of_run, strict=True)),
            health=_health(of_run),
            notes=[f"{e.letter}: {note}" for e in entrants for note in dict.fromkeys(e.run.notes)],
            version=__version__,
        )
    )


def _configurations(entrants: Sequence[Entrant]) -> list[tuple[str, list[Entrant], list[tuple[str, list[str]]]]]:
    """Return (stage, its runs, [(key, value of each run)]) of differing keys, for stages of at least two runs."""
    stages = []
    for stage in ("sft", "grpo", "evaluate"):
        if stage == "evaluate":
            configs = [(e, e.run.config) for e in entrants if e.run.config and not e.run.trainings]
        else:
            configs = [(e, t.config) for e in entrants if (t := e.run.training(stage)) and t.config]
        if len(configs) >= 2:
            rows = differing([(config, stage) for _, config in configs])
            stages.append((stage, [e for e, _ in configs], [r for r in rows if r[0] != "output"]))
    return stages


def _health(of_run: Sequence[list[VerdictCheck]]) -> dict[str, list[VerdictCheck | None]]:
    """Return the checks of each run by name, None where a run has no such check, in order of first appearance."""
    by_name = [{c.name: c for c in found} for found in of_run]
    return {name: [found.get(name) for found in by_name] for name in dict.fromkeys(n for f in by_name for n in f)}


def panels(entrants: Sequence[Entrant], table: Curves) -> list[Panel]:
    """Draw the panels of a table, one line per run; metrics that no run logged are omitted."""
    tasks = [{"task": task, "name": name} for task, name in TASK_NAMES.items()]
    grpo = [t for e in entrants if (t := e.run.training("grpo"))]
    terms = [s | {"term": x} for s in tasks for x in dict.fromkeys(x for t in grpo for x in t.terms(s["task"]))]
    subjects = {"{term}": terms, "{task}": tasks, "{dataset}": [{"dataset": d} for d in datasets(entrants)]}
    found = []
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
                found.append(Panel(heading, caption.format(**names), [chart]))
    return found
