"""Command `tatar-dist plan --simulate`: select the source of times and print the forecast.

Takes a configuration and the option values. Prints tables or JSON on stdout.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError
from tatar_dist.plan.simulate.costs import StepCosts, read_costs
from tatar_dist.plan.simulate.estimate import estimate
from tatar_dist.plan.simulate.measured import costs_of_runs
from tatar_dist.plan.simulate.search import GPUS, forecast
from tatar_dist.plan.simulate.tables import tables


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
    found = forecast(config, costs_from(config, measured, times), numbers_of_gpus(gpus))
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    from rich.console import Console

    console = Console()
    for each in tables(found):
        console.print(each)
