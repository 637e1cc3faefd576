"""Command `tatar-dist plan --simulate`: select the source of times and print the forecast as tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError
from tatar_dist.plan.simulate.costs import StepCosts, estimate, read_costs
from tatar_dist.plan.simulate.measured import costs_of_runs
from tatar_dist.plan.simulate.search import GPUS, Forecast, fastest, forecast


def costs_from(config: Config, measured: Sequence[Path], times: Path | None) -> StepCosts:
    """Return costs of measured runs, else of a file, else estimated. Raises UserError for both or for bad input."""
    if measured and times:
        raise UserError("--measured and --times both say what a step costs: give one of them")
    if measured:
        return costs_of_runs(measured)
    return read_costs(times) if times else estimate(config)


def numbers_of_gpus(text: str | None) -> Sequence[int]:
    """Parse "8,64" as numbers; None gives all powers of two up to 1024."""
    if text is None:
        return GPUS
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--gpus {text}: expected whole numbers with commas between, such as 8,64,512") from None


def run(config: Config, measured: Sequence[Path], times: Path | None, gpus: str | None, as_json: bool) -> None:
    """Print the forecast. Raises UserError for bad options or costs."""
    prediction = forecast(config, costs_from(config, measured, times), numbers_of_gpus(gpus))
    if as_json:
        print(json.dumps(prediction.to_dict()))
        return
    console = Console()
    console.print(_configured(prediction), _by_gpus(prediction), sep="\n")
    for note in prediction.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Format with about three significant digits and a suitable unit."""
    units = ((1.0, "ms", 1e-3), (120.0, "s", 1.0), (7200.0, "min", 60.0), (172_800.0, "h", 3600.0))
    _, unit, divisor = next((u for u in units if seconds < u[0]), (0, "days", 86_400))
    x = seconds / divisor
    return f"{x:.{2 if x < 10 else 1 if x < 100 else 0}f} {unit}"


def _configured(f: Forecast) -> Table:
    """Return the step of the configured split, part by part."""
    p = f.configured
    table = Table(title="grpo: a step as configured", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("split", f"{p.learners} learners + {p.engines} engines, {p.placement}")
    table.add_row("step", f"{duration(p.step_seconds)} (95 % under {duration(p.step_p95)})")
    table.add_row("parts", ", ".join(f"{name} {duration(s)}" for name, s in p.parts.items() if s))
    table.add_row("idle", f"engines {p.rollout_idle:.0%}, learners {p.learner_idle:.0%} of a step")
    table.add_row("tokens", f"{p.tokens_per_second:,.0f} a second")
    seconds = f.run_seconds(p)
    cost = f", {seconds * f.plan.gpus / 3600:,.1f} GPU-hours" if seconds and f.plan.gpus else ""
    unknown = "unknown: manifests not there yet"
    table.add_row("run", f"{duration(seconds)}, {f.plan.steps} steps{cost}" if seconds else unknown)
    table.add_row("times", f.costs.source)
    return table


def _by_gpus(f: Forecast) -> Table:
    """Return the best splits by number of GPUs."""
    what = "processes" if f.costs.cores else "GPUs"
    table = Table(title=f"Best split, learners + engines, on N {what}", title_justify="left")
    for name in "N|disagg-\nregated|step|colo-\ncated|step|E\nidle|L\nidle|all\nidle|effi-\nciency".split("|"):
        table.add_column(name, justify="right", no_wrap=True)
    efficiency = f.efficiency()
    for n, predictions in f.rows:
        best = fastest(predictions)
        if best is None:
            table.add_row(str(n), *["—"] * 8)
            continue
        cells = [str(n)]
        for p in predictions.values():
            mark = "bold" if p is best else "none"
            split = f"[{mark}]{p.learners}+{p.engines}[/]" if p else "—"
            cells += [split, f"[{mark}]{duration(p.step_seconds)}[/]" if p else "—"]
        idle = [f"{share:.0%}" for share in (best.rollout_idle, best.learner_idle, best.gpu_idle)]
        table.add_row(*cells, *idle, f"{efficiency[n]:.0%}")
    table.caption = (
        f"Bold: the faster one. Of it: shares of a step without work for engines (E), learners (L), all {what}; "
        "efficiency: GPU-seconds of a step on the smallest N that fits, over those here. —: does not fit."
    )
    table.caption_justify = "left"
    return table
