"""Tables of a `Forecast` for rich: the configured split by part, and the best splits by number of GPUs."""

from __future__ import annotations

from typing import Any

from tatar_dist.plan.simulate.search import Forecast, Prediction


def duration(seconds: float | None) -> str:
    """Format with about three significant digits and a suitable unit."""
    if seconds is None:
        return "—"
    for limit, unit, divisor in ((1.0, "ms", 1e-3), (120.0, "s", 1.0), (7200.0, "min", 60.0), (172_800.0, "h", 3600.0)):
        if seconds < limit:
            return f"{_figures(seconds / divisor)} {unit}"
    return f"{_figures(seconds / 86_400)} days"


def _figures(x: float) -> str:
    return f"{x:.{2 if x < 10 else 1 if x < 100 else 0}f}"


def split_text(p: Prediction) -> str:
    return f"{p.learners}+{p.engines}"


def tables(forecast: Forecast) -> list[Any]:
    return [_own(forecast), _by_gpus(forecast), *_notes(forecast)]


def _own(f: Forecast) -> Any:
    from rich.table import Table

    p = f.own
    table = Table(title="grpo: a step as configured", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("split", f"{p.learners} learners + {p.engines} engines, {p.placement}")
    parts = ", ".join(f"{name} {duration(s)}" for name, s in p.parts.items() if s)
    table.add_row("step", f"{duration(p.step_seconds)} (95 % under {duration(p.step_p95)})")
    table.add_row("parts", parts)
    table.add_row("idle", f"engines {p.rollout_idle:.0%}, learners {p.learner_idle:.0%} of a step")
    table.add_row("tokens", f"{p.tokens_per_second:,.0f} a second")
    whole = f.run_seconds(p)
    cost = f", {whole * f.plan.gpus / 3600:,.1f} GPU-hours" if whole and f.plan.gpus else ""
    run = f"{duration(whole)}, {f.plan.steps} steps{cost}" if whole else "unknown: manifests not there yet"
    table.add_row("run", run)
    table.add_row("times", f.costs.source)
    return table


def _by_gpus(f: Forecast) -> Any:
    from rich.table import Table

    what = "processes" if f.costs.cores else "GPUs"
    table = Table(title=f"Best split, learners + engines, on N {what}", title_justify="left")
    for name in (
        "N",
        "disagg-\nregated",
        "step",
        "colo-\ncated",
        "step",
        *(f"{x}\nidle" for x in ("E", "L", "all")),
        "effi-\nciency",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    efficiency = f.efficiency()
    for n, found in f.rows:
        apart, together = found["disaggregated"], found["colocated"]
        both = [p for p in (apart, together) if p]
        if not both:
            table.add_row(str(n), *["—"] * 8)
            continue
        best = min(both, key=lambda p: p.step_seconds)
        cells = [str(n)]
        for p in (apart, together):
            mark = "bold" if p is best else "none"
            cells += [f"[{mark}]{split_text(p)}[/]", f"[{mark}]{duration(p.step_seconds)}[/]"] if p else ["—", "—"]
        idle = [f"{share:.0%}" for share in (best.rollout_idle, best.learner_idle, best.gpu_idle)]
        table.add_row(*cells, *idle, f"{efficiency[n]:.0%}")
    table.caption = (
        f"Bold: the faster one. Of it: shares of a step without work for engines (E), learners (L), all {what}; "
        "efficiency: GPU-seconds of a step on the smallest N that fits, over those here. —: does not fit."
    )
    table.caption_justify = "left"
    return table


def _notes(f: Forecast) -> list[Any]:
    from rich.text import Text

    return [Text(f"note: {n}") for n in f.notes]
