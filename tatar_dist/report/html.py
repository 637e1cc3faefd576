"""Write the one-file HTML report of a run: `write(run) -> run/report.html`, also `tatar-dist report RUN`.

Takes a run directory (SFT, GRPO, evaluation) or a demo directory. The page has no scripts and fetches nothing; its
content-security policy forbids both. All texts of the run are escaped, since model output is untrusted. The verdict
comes first, then health, curves, errors and texts. Missing parts are omitted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tatar_dist import __version__
from tatar_dist.report.charts import nice_ticks, number
from tatar_dist.report.details import details
from tatar_dist.report.explanation import explanations
from tatar_dist.report.gallery import Pictures, walls
from tatar_dist.report.panels import clouds, panels, photographs
from tatar_dist.report.reading import RunFiles, clean, is_number, read_rollouts, read_run
from tatar_dist.report.verdict import TASK_NAMES, checks, headline, name_of
from tatar_dist.run.files import write_whole, writing

MINUS = "\N{MINUS SIGN}"
MOST_QUARANTINED = 20
MEASURES = {
    "srcc": "SRCC",
    "plcc": "PLCC",
    "reward_gaussian": "Gaussian reward",
    "reward_thurstone": "Thurstone reward",
    "reward_format": "format",
    "reward_length": "length",
}
FACTS = {  # kind of run -> (section, key, what the page calls it)
    "sft": (("model", "path", "starts from"), ("sft", "global_batch", "global batch")),
    "grpo": (
        ("reward", "preset", "reward preset"),
        ("grpo", "prompts_per_step", "prompts a step"),
        ("grpo", "group_size", "completions a prompt"),
    ),
}


def write(run: Path, file: Path | None = None) -> Path:
    """Write the page of a run to `file`, or to RUN/report.html, and return its path.

    Raises:
        UserError: no such directory, no run in it, or the page cannot be written there.
    """
    return replace_page(Path(file or Path(run) / "report.html"), render(read_run(run)))


def replace_page(target: Path, page: str) -> Path:
    """Write a page atomically and return its path. Raises UserError if it cannot be written."""
    with writing(target):
        write_whole(target, page.encode("utf-8", "replace"))
    return target


def environment() -> Environment:
    """Return the Jinja environment of this directory's templates, with autoescaping."""
    found = Environment(
        loader=PackageLoader("tatar_dist.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"number": number, "signed": signed, "percent": percent, "duration": duration}
    return found


def render(run: RunFiles) -> str:
    """Render the page as HTML text."""
    notes = list(run.notes)
    quarantined = [q for t in run.trainings for q in t.quarantine]
    sampled = next((t for t in reversed(run.trainings) if t.kind == "grpo"), None)
    rollouts = read_rollouts(sampled, notes) if sampled else None
    explained = explanations(sampled, rollouts, notes) if sampled else []
    pictures = Pictures(run.manifests, run.image_root, notes)
    drawn, held_out = clouds(run, rollouts)
    return (
        environment()
        .get_template("template.html.j2")
        .render(
            name=run.path.resolve().name,
            kind="Demo" if run.is_demo else ("Evaluation" if not run.trainings else run.trainings[-1].kind.upper()),
            headline=headline(run),
            strips=_strips(run),
            scores=_scores(run),
            gains=_gains(run),
            checks=checks(run),
            quarantined=[
                [clean(str(q.get(k, ""))) for k in ("sample_id", "reason")] for q in quarantined[:MOST_QUARANTINED]
            ],
            n_quarantined=len(quarantined),
            panels=panels(run),
            clouds=drawn,
            held_out=held_out,
            photographs=photographs(run),
            gallery=walls(run, rollouts, pictures),
            explained=explained,
            images={g.key: pictures.uri(g.key) for g in explained},
            task_names=TASK_NAMES,
            details=details(run),
            stages=_stages(run),
            facts=_facts(run),
            notes=list(dict.fromkeys(notes)),
            version=__version__,
        )
    )


def signed(value: float) -> str:
    """Format with sign and three decimals, such as +0.031, with a true minus sign."""
    return f"{value:+.3f}".replace("-", MINUS)


def percent(share: float) -> str:
    return f"{share:.1%}" if share < 1 else "100%"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _strips(run: RunFiles) -> dict[str, Any] | None:
    """One row per data set on an SRCC scale up to 1, with a mark per model; positions in percent."""
    rows = []
    for dataset in run.datasets:
        found = [(e.model, e.metrics.get(dataset, {}).get("srcc")) for e in run.evaluations]
        values = [(m, v) for m, v in found if is_number(v)]
        if values:
            rows.append((name_of(run, dataset), run.task(dataset), values))
    if not rows:
        return None
    lowest = min(v for *_, values in rows for _, v in values)
    lo = 0.0 if lowest >= 0 else -0.25 if lowest >= -0.25 else -1.0

    def at(value: float) -> float:
        return round(100 * (value - lo) / (1 - lo), 2)

    drawn = []
    for name, task, values in rows:
        places = [at(v) for _, v in values]
        # The last model is named below its mark, the others above, so that neighbours do not print over each other.
        marks = [(m, v, x, i == len(values) - 1) for i, ((m, v), x) in enumerate(zip(values, places, strict=True))]
        drawn.append({"name": name, "task": task, "marks": marks, "from": min(places), "to": max(places)})
    return {"rows": drawn, "ticks": [(t, at(t)) for t in nice_ticks(lo, 1.0, 4)]}


def _scores(run: RunFiles) -> list[dict[str, Any]]:
    """Table below the strips: one row per data set and model. Missing values are None, with a reason."""
    rows = []
    for dataset in run.datasets:
        of_set = [(e.model, e.metrics[dataset]) for e in run.evaluations if dataset in e.metrics]
        for i, (model, m) in enumerate(of_set):
            n, parsed = m.get("n"), m.get("n_parsed")
            reason = m.get("reason") if isinstance(m.get("reason"), dict) else {}
            rows.append(
                {
                    "name": name_of(run, dataset),
                    "task": run.task(dataset),
                    "first_of": len(of_set) if i == 0 else 0,
                    "model": model,
                    "n": n if is_number(n) else None,
                    "parsed": parsed / n if is_number(n) and is_number(parsed) and n else None,
                    "values": [
                        (m.get(k) if is_number(m.get(k)) else None, str(reason.get(k, "not computed")))
                        for k in ("srcc", "plcc", "mae")
                    ],
                }
            )
    return rows


def _gains(run: RunFiles) -> list[dict[str, Any]]:
    """Changes from SFT to GRPO; positions in percent of a scale that is symmetric about zero."""
    reach = (
        max((abs(v) for m in run.gains.values() for triple in m.values() for v in triple), default=0.0) * 1.08 or 1.0
    )
    rows = []
    for task, measures in run.gains.items():
        for measure, (value, low, high) in measures.items():
            places = [round(50 + 50 * v / reach, 2) for v in (value, low, high)]
            says = "rose" if low > 0 else "fell" if high < 0 else "no clear change"
            rows.append(
                {
                    "task": task,
                    "name": f"{TASK_NAMES.get(task, task)}, {MEASURES.get(measure, measure.replace('_', ' '))}",
                    "value": value,
                    "low": low,
                    "high": high,
                    "at": places,
                    "says": says,
                }
            )
    return rows


def _stages(run: RunFiles) -> dict[str, Any] | None:
    """Seconds and budgets of the stages; bars in percent of the longest of either."""
    budgets = [s["budget_seconds"] for s in run.stages if is_number(s.get("budget_seconds"))]
    longest = max([*budgets, *(s["seconds"] for s in run.stages)], default=0.0)
    if not longest:
        return None
    rows = []
    for s in run.stages:
        budget = s.get("budget_seconds") if is_number(s.get("budget_seconds")) else None
        rows.append(
            {
                "name": str(s.get("name", "")).replace("_", " "),
                "seconds": s["seconds"],
                "reused": bool(s.get("reused")),
                "budget": budget,
                "over": budget is not None and s["seconds"] > budget,
                "bar": round(100 * s["seconds"] / longest, 1),
                "mark": None if budget is None else round(100 * budget / longest, 1),
            }
        )
    return {"rows": rows, "seconds": sum(s["seconds"] for s in run.stages), "budget": sum(budgets)}


def _facts(run: RunFiles) -> list[tuple[str, str]]:
    """Selected configuration values for the foot of the page."""
    facts = []
    for training in run.trainings:
        kind = training.kind.upper()
        facts.append((f"{kind} steps", f"{len(training.rows):,}"))
        for section, key, text in FACTS[training.kind]:
            values = training.config.get(section)
            if isinstance(values, dict) and key in values:
                facts.append((f"{kind} {text}", str(values[key])))
    return facts
