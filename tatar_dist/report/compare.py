"""Write one HTML page that compares runs: `write([run, run, …], file)`, also `tatar-dist report RUN RUN …`.

The runs are run or demo directories of any kind. The page resembles that of a single run (html.py). It shows which run
learned more, the final figures, the configuration keys that differ, overlaid curves and the health checks of each run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tatar_dist import __version__
from tatar_dist.errors import UserError
from tatar_dist.report.charts import Line, line_chart
from tatar_dist.report.comparison import Entrant, datasets, headline, tables
from tatar_dist.report.details import differing
from tatar_dist.report.html import replace_page, templates
from tatar_dist.report.panels import Panel
from tatar_dist.report.reading import clean, read_run
from tatar_dist.report.verdict import TASK_NAMES, VerdictCheck, checks

FILE = "compare.html"
LETTERS = "ABCDEFGHIJKLMNOP"
COLORS = 8  # --r0 to --r7 of the page; runs beyond them get dashed lines


def write(runs: Sequence[Path], file: Path) -> Path:
    """Write the comparison page and return its path.

    Raises:
        UserError: fewer than two runs or more than `LETTERS`, a run given twice, a directory without a run, or a page
            that cannot be written.
    """
    paths = [Path(r) for r in runs]
    if not 2 <= len(paths) <= len(LETTERS):
        raise UserError(f"{len(paths)} runs: compare 2 to {len(LETTERS)}")
    whole = [p.resolve() for p in paths]
    if len(set(whole)) < len(whole):
        twice = next(p for p in whole if whole.count(p) > 1)
        raise UserError(f"{twice}: given twice, a run is not compared with itself")
    names = short_names(whole)
    entrants = [Entrant(LETTERS[i], clean(names[i]), read_run(path), f"r{i % COLORS}") for i, path in enumerate(paths)]
    return replace_page(Path(file), render(entrants))


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest unique path suffixes of equal depth: runs/a/grpo, runs/b/grpo -> a/grpo, b/grpo."""
    depth = 1
    while len({p.parts[-depth:] for p in paths}) < len(paths):
        depth += 1
    return ["/".join(p.parts[-depth:]) for p in paths]


def render(entrants: Sequence[Entrant]) -> str:
    """Render the page as HTML text."""
    found = [(e, checks(e.run)) for e in entrants]
    main, more = curves(entrants)
    return (
        templates()
        .get_template("compare.html.j2")
        .render(
            headline=headline(entrants),
            entrants=entrants,
            steps=[_steps(e) for e in entrants],
            tables=tables(entrants),
            configurations=_configurations(entrants),
            panels=main,
            more=more,
            health=_health(found),
            summary=[(e, [c for c in of if c.state != "good"], len(of)) for e, of in found],
            notes=[f"{e.letter}: {note}" for e in entrants for note in dict.fromkeys(e.run.notes)],
            version=__version__,
        )
    )


def _configurations(entrants: Sequence[Entrant]) -> list[tuple[str, list[Entrant], list[tuple[str, list[str]]]]]:
    """Return (stage, its runs, [(key, value of each run)]) of differing keys, for stages of at least two runs."""
    found = []
    for stage in ("sft", "grpo", "evaluate"):
        of: list[tuple[Entrant, Mapping[str, Any]]] = []
        for e in entrants:
            training = e.training(stage)
            config = training.config if training else e.run.config if stage == "evaluate" and not e.last else {}
            if config:
                of.append((e, config))
        if len(of) >= 2:
            rows = differing([(config, stage) for _, config in of])
            found.append((stage, [e for e, _ in of], [r for r in rows if r[0] != "output"]))
    return found


def _steps(entrant: Entrant) -> str:
    said = [f"{len(t.rows):,} {t.kind.upper()} step{'' if len(t.rows) == 1 else 's'}" for t in entrant.run.trainings]
    return ", ".join(said)


def _health(found: Sequence[tuple[Entrant, list[VerdictCheck]]]) -> list[tuple[str, str, list[VerdictCheck | None]]]:
    """Return (name, expected, the check of each run or None), in order of first appearance."""
    by_run: list[dict[str, VerdictCheck]] = [{c.name: c for c in of} for _, of in found]
    names = dict.fromkeys(name for of in by_run for name in of)
    rows = []
    for name in names:
        cells = [of.get(name) for of in by_run]
        rows.append((name, next(c.expected for c in cells if c), cells))
    return rows


def curves(entrants: Sequence[Entrant]) -> tuple[list[Panel], list[Panel]]:
    """Return (main panels, folded panels), with one line per run; metrics that no run logged are omitted."""
    main: list[Panel] = []
    for task, name in TASK_NAMES.items():
        main += _panel(entrants, "grpo", f"reward/total/{task}", f"Reward, {name}", "Mean sum of all terms.")
    for dataset in datasets(entrants):
        for kind in ("sft", "grpo"):
            title = f"Held-out SRCC, {dataset}" + (" (SFT)" if kind == "sft" else "")
            note = "During training, on validation images."
            main += _panel(entrants, kind, f"eval/{dataset}/srcc", title, note, (0.0, 1.0), smooth=False)
    main += _panel(entrants, "grpo", "loss/kl", "KL", "Distance from the reference, nats a token.", (0.0, 1e-6))
    for task, name in TASK_NAMES.items():
        metric, note = f"completion/tokens/{task}", "Tokens a completion."
        main += _panel(entrants, "grpo", metric, f"Length, {name}", note, (0.0, 1.0))
    main += _panel(entrants, "sft", "loss/total", "SFT loss", "Training, nats a token.")
    for task, name in TASK_NAMES.items():
        metric, note = f"eval/loss/{task}", "Held-out images, nats a token."
        main += _panel(entrants, "sft", metric, f"Held-out SFT loss, {name}", note, smooth=False)
    more: list[Panel] = []
    for task, name in TASK_NAMES.items():
        terms = dict.fromkeys(x for e in entrants if (t := e.training("grpo")) for x in t.terms(task))
        for term in terms:
            note = f"Reward term for {name}, mean."
            more += _panel(entrants, "grpo", f"reward/{term}/{task}", f"{term}, {name}", note, (0.0, 1.0))
        metric, note = f"completion/parse_failures/{task}", "Share of the sampled completions."
        more += _panel(entrants, "grpo", metric, f"Not parsed, {name}", note, (0.0, 0.05))
        metric, note = f"reward/frac_zero_std/total/{task}", "Share of groups with one reward for all."
        more += _panel(entrants, "grpo", metric, f"Groups that teach nothing, {name}", note, (0.0, 1.0))
    more += _panel(entrants, "grpo", "policy/entropy", "Entropy", "Nats a token.", (0.0, 1e-6))
    more += _panel(entrants, "grpo", "sync/logprob_gap", "Sync gap", "Nats a token.", (0.0, 1e-9))
    for kind in ("sft", "grpo"):
        more += _panel(entrants, kind, "time/step", f"{kind.upper()} step time", "Seconds.", (0.0, 1e-6))
    return main, more


def _panel(
    entrants: Sequence[Entrant],
    kind: str,
    metric: str,
    title: str,
    caption: str,
    y_range: tuple[float, float] | None = None,
    smooth: bool = True,
) -> list[Panel]:
    lines: list[Line] = []
    for i, e in enumerate(entrants):
        training = e.training(kind)
        if training:
            lines.append(Line(e.letter, *training.series(metric), e.color, smooth=smooth, dashed=i >= COLORS))
    chart: Any = line_chart(lines, f"{title} of each run", y_range=y_range)
    return [Panel(title, caption, [chart])] if chart else []
