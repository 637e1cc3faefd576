"""Predict a GRPO step and the best split by number of GPUs: `tatar-dist plan --simulate`.

All candidate splits are simulated with the same draws of completion lengths (fixed seed), so that they differ only by
the split:
    learners   every divisor of the global batch that fits (others work too, and are rarely better)
    engines    every number that makes the calls smaller than one engine fewer would, up to one per prompt
both `disaggregated` (separate GPUs) and `colocated` (each engine shares a learner's GPU in turns, as in plan.resolve).
Generation depends only on the engines and learning only on the learners, so each is simulated once. Colocated splits
are not simulated with staleness, as the engines sleep while the learners work, or with tensor parallelism.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError
from tatar_dist.models.costs import ModelSizes
from tatar_dist.plan import memory
from tatar_dist.plan.plan import Plan, resolve
from tatar_dist.plan.simulate import CardName
from tatar_dist.plan.simulate.costs import StepCosts, read_costs
from tatar_dist.plan.simulate.estimate import estimate
from tatar_dist.plan.simulate.measured import costs_of_runs
from tatar_dist.plan.simulate.step import Setup, calls, generate, learn_seconds, step_parts, step_seconds
from tatar_dist.types import TASKS

GPUS = tuple(1 << k for k in range(11))
DRAWS = 48
PLACEMENTS = ("disaggregated", "colocated")


@dataclass(frozen=True)
class Prediction:
    """Predicted step. Idle shares as in metrics.jsonl (perf/*_idle); `gpu_idle`: of GPU-seconds."""

    placement: str
    learners: int
    engines: int
    gpus: int
    step_seconds: float
    step_p95: float
    parts: dict[str, float]  # mean seconds
    rollout_idle: float
    learner_idle: float
    gpu_idle: float
    tokens_per_second: float


def draw_lengths(costs: StepCosts, config: Config, draws: int = DRAWS) -> np.ndarray:
    """Draw (draws, P, G) completion lengths, IQA prompts first, the same in every call.

    Each prompt takes the G lengths from one measured group with replacement, so completions of a prompt stay similar.

    Raises:
        UserError: a task of the batch has no lengths.
    """
    rng = np.random.default_rng(0)
    prompts, group_size = config.grpo.prompts_per_step, config.grpo.group_size
    n_iqa = round(prompts * config.data.iqa_fraction)
    parts = []
    for task, n in zip(TASKS, (n_iqa, prompts - n_iqa), strict=True):
        if not n:
            continue
        groups = costs.lengths.get(task)
        if not groups:
            raise UserError(f"no completion lengths of task {task}, which has {n} of {prompts} prompts in a step")
        sizes = np.array([len(group) for group in groups])
        first = sizes.cumsum() - sizes
        picked = rng.integers(len(groups), size=(draws, n, 1))
        within = (rng.random((draws, n, group_size)) * sizes[picked]).astype(int)
        parts.append(np.concatenate(groups)[first[picked] + within])
    return np.concatenate(parts, axis=1)


class Simulator:
    """Simulate splits of one configuration with the same draws, and cache the results.

    On CPUs all processes share the measured cores (`shared_cores`), or each is supposed to have as many of its own.
    """

    def __init__(self, config: Config, costs: StepCosts, shared_cores: bool = False) -> None:
        self.config, self.costs = config, costs
        self.setup = Setup(config, 1, 1, costs.cores, dedicated=not shared_cores)
        self.lengths = draw_lengths(costs, config)
        self._engines = cache(self._simulate_engines)
        self._learners = cache(self._simulate_learners)

    def _simulate_engines(self, engines: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (draws,) seconds and busy seconds of generation."""
        setup = replace(self.setup, engines=engines)
        services = [generate(self.costs.engine, setup, lengths)[0] for lengths in self.lengths]
        return np.array([s.seconds for s in services]), np.array([s.busy for s in services])

    def _simulate_learners(self, learners: int) -> np.ndarray:
        setup = replace(self.setup, learners=learners)
        return np.array([learn_seconds(self.costs.learner, setup, lengths) for lengths in self.lengths])

    def predict(self, learners: int, engines: int, placement: str) -> Prediction:
        """Predict a step. Raises UserError for fewer rows than learners, or if all costs are zero."""
        setup = replace(self.setup, learners=learners, engines=engines, colocated=placement == "colocated")
        (generated, engines_busy), learn = self._engines(engines), self._learners(learners)
        parts = step_parts(self.costs, setup, generated, learn)
        step = step_seconds(parts, self.config.grpo.staleness)
        if not step.all():
            raise UserError(f"a step takes no time by these times ({self.costs.source}): give engine and learner some")
        busy = engines_busy * self.config.rollout.tensor_parallel + learners * learn
        return Prediction(
            placement=placement,
            learners=learners,
            engines=engines,
            gpus=setup.gpus,
            step_seconds=float(step.mean()),
            step_p95=float(np.quantile(step, 0.95)),
            parts={name: float(np.mean(seconds)) for name, seconds in parts.items()},
            rollout_idle=float(np.mean(1 - generated / step)),
            learner_idle=float(np.mean(1 - learn / step)),
            gpu_idle=float(np.mean(1 - busy / (setup.gpus * step))),
            tokens_per_second=float(np.mean(self.lengths.sum(axis=(1, 2)) / step)),
        )

    def splits(self, gpus: int, placement: str) -> list[tuple[int, int]]:
        """Return candidate (learners, engines) that fit into the memory of `gpus` GPUs."""
        tp, prompts, rows = self.config.rollout.tensor_parallel, self.config.grpo.prompts_per_step, self.setup.rows
        shared = placement == "colocated"
        if shared and (tp > 1 or self.config.grpo.staleness):
            return []
        useful = {-(-prompts // k) for k in range(1, prompts + 1)}  # engines that make the calls smaller
        splits: list[tuple[int, int]] = []
        for learners in range(1, min(gpus, rows) + 1):
            if rows % learners == 0:
                room = learners if shared else (gpus - learners) // tp
                engines = {n for n in useful if n <= room} | {min(room, prompts)}
                splits += [(learners, n) for n in sorted(engines) if n and self.fits(learners, n, placement)]
        return splits

    @cached_property
    def sizes(self) -> tuple[Plan, ModelSizes] | None:
        """Return what plan/memory.py needs; None if the model's sizes are unknown, or on CPUs."""
        if not self.costs.parameters or self.costs.cores:
            return None
        try:
            return resolve(self.config, "grpo"), memory.sizes_of(self.config.model.path)
        except UserError:
            return None

    def fits(self, learners: int, engines: int, placement: str) -> bool:
        """Return whether a learner has room, and an engine with its call, by plan/memory.py.

        An engine gets gpu_memory_utilization or, if less is left beside a learner, that. True if sizes are unknown.
        """
        if self.sizes is None:
            return True
        (plan, sizes), room, config = self.sizes, self.costs.gpu_gib * memory.GIB, self.config
        assert plan.split is not None
        split, colocated = replace(plan.split, ranks=learners), placement == "colocated"
        plan = replace(plan, learners=learners, engines=engines, colocated=colocated, split=split)
        if not memory.learner(config, plan, sizes, room).fits:
            return False
        r, engine = config.rollout, memory.engine(config, plan, sizes, room)
        if (excess := engine.total / room - (1 - memory.HEADROOM)) > 0:
            lower = replace(r, gpu_memory_utilization=r.gpu_memory_utilization - excess - 1e-9)
            engine = memory.engine(replace(config, rollout=lower), plan, sizes, room)
        call = len(calls(replace(self.setup, engines=engines))[0]) * config.grpo.group_size
        return engine.fits and (engine.sequences or 0) >= min(call, r.max_num_seqs)

    def best(self, gpus: int, placement: str) -> Prediction | None:
        """Return the split with the shortest step, on ties the fewest GPUs; None if nothing fits."""
        predictions = [self.predict(*split, placement) for split in self.splits(gpus, placement)]
        return min(predictions, key=lambda p: (round(p.step_seconds, 9), p.gpus), default=None)


def forecast(config: Config, costs: StepCosts, gpus: Sequence[int] = GPUS) -> dict[str, Any]:
    """Return the `--json` object: the configured split, and the best splits for each of `gpus`.

    "limit": the configured split at the card's peak rates (None: no estimate). "table" has the best split of each
    placement (None: nothing fits). "efficiency": GPU-seconds of a step on the fewest GPUs that work, over those on n.
    "run_seconds" leaves out the start and evaluations; None: steps are unknown.

    Raises:
        UserError: a number below 1, times of CPUs for a cluster of GPUs or the reverse, more learners than completions.
    """
    if min(gpus) < 1:
        raise UserError(f"--gpus {min(gpus)}: must be at least 1")
    plan = resolve(config, "grpo")
    if bool(costs.cores) == bool(config.cluster.gpus_per_node):
        kind = ("CPUs", "GPUs") if costs.cores else ("GPUs", "CPUs")
        raise UserError(
            f"times of {kind[0]} ({costs.source}) say nothing about {kind[1]}: measure there, "
            f"or set cluster.gpus_per_node={0 if costs.cores else 8}"
        )
    steps, every = plan.steps or 0, config.checkpoint.every
    saving = costs.checkpoint * (-(-steps // every) if every else 1)

    def record(p: Prediction) -> dict[str, Any]:
        return asdict(p) | {"run_seconds": steps * p.step_seconds + saving if steps else None}

    shared, simulator = Simulator(config, costs, shared_cores=True), Simulator(config, costs)
    configured = shared.predict(plan.learners, plan.engines, config.cluster.placement)
    limit = None
    if costs.card and simulator.sizes:
        peak = Simulator(config, replace(estimate(config, costs.card, costs.nics, peak=True), lengths=costs.lengths))
        limit = asdict(peak.predict(plan.learners, plan.engines, config.cluster.placement))
    table: list[dict[str, Any]] = []
    least = None  # GPU-seconds of a step on the fewest GPUs that work
    for n in sorted(set(gpus)):
        splits = [p for placement in PLACEMENTS if (p := simulator.best(n, placement))]
        row: dict[str, Any] = {"gpus": n, "best": None, "efficiency": None} | dict.fromkeys(PLACEMENTS)
        if splits:
            best = min(splits, key=lambda p: p.step_seconds)
            least = least or n * best.step_seconds
            row |= {"best": best.placement, "efficiency": least / (n * best.step_seconds)}
        table.append(row | {p.placement: record(p) for p in splits})
    return {
        "source": costs.source,
        "notes": _notes(costs, simulator),
        "steps": plan.steps,
        "configured": record(configured),
        "limit": limit,
        "table": table,
        "costs": asdict(costs),
    }


def _notes(costs: StepCosts, simulator: Simulator) -> list[str]:
    notes = list(costs.notes)
    if costs.cores:
        notes.append("CPUs: the table supposes for every process the cores that the measured ones shared")
    if not costs.switch:
        notes.append("colocated: what putting engines to sleep and waking them costs was not measured, 0 is taken")
    fewest = next((n for n in range(1, simulator.setup.rows + 1) if simulator.fits(n, n, "disaggregated")), None)
    if fewest is None:
        cure = f"tatar-dist plan --gpu-memory {costs.gpu_gib:g} says what to change"
        notes.append(f"memory: no split fits GPUs of {costs.gpu_gib:g} GiB: {cure}")
    elif fewest > 1:
        notes.append(f"memory: the learners' state takes at least {fewest} GPUs of {costs.gpu_gib:g} GiB")
    return notes


def costs_from(
    config: Config, measured: Sequence[Path], times: Path | None, card: CardName | None = None, nics: int | None = None
) -> StepCosts:
    """Return costs of runs, of a file, or estimated. Raises UserError: two given, bad input."""
    if measured and times:
        raise UserError("--measured and --times both say what a step costs: give one of them")
    if (measured or times) and (card or nics):
        raise UserError("--card and --nics choose hardware to estimate for: leave out --measured and --times")
    if measured:
        return costs_of_runs(measured)
    return read_costs(times) if times else estimate(config, card or "H100", nics)


def numbers_of_gpus(text: str | None) -> Sequence[int]:
    """Parse "8,64" as numbers; None gives all powers of two up to 1024."""
    try:
        return GPUS if text is None else [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--gpus {text}: expected whole numbers with commas between, such as 8,64,512") from None


def run(config: Config, costs: StepCosts, gpus: str | None, as_json: bool) -> None:
    """Print the forecast. Raises UserError for bad options or costs."""
    prediction = forecast(config, costs, numbers_of_gpus(gpus))
    if as_json:
        print(json.dumps(prediction))
        return
    console = Console()
    console.print(_configured(prediction, config), _by_gpus(prediction), sep="\n")
    for note in prediction["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Format with about three significant digits and a suitable unit."""
    units = ((1.0, "ms", 1e-3), (120.0, "s", 1.0), (7200.0, "min", 60.0), (172_800.0, "h", 3600.0))
    _, unit, divisor = next((u for u in units if seconds < u[0]), (0, "days", 86_400))
    x = seconds / divisor
    return f"{x:.{2 if x < 10 else 1 if x < 100 else 0}f} {unit}"


def _configured(prediction: dict[str, Any], config: Config) -> Table:
    """Return the step of the configured split, part by part."""
    p, steps = prediction["configured"], prediction["steps"]
    table = Table(title="grpo: a step as configured", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("split", f"{p['learners']} learners + {p['engines']} engines, {p['placement']}")
    table.add_row("step", f"{duration(p['step_seconds'])} (95 % under {duration(p['step_p95'])})")
    for name, of in (("parts", p), ("limit", prediction["limit"])):
        if of:
            total = f"{duration(of['step_seconds'])} at peak rates: " if name == "limit" else ""
            table.add_row(name, total + ", ".join(f"{part} {duration(s)}" for part, s in of["parts"].items() if s))
    table.add_row("idle", f"engines {p['rollout_idle']:.0%}, learners {p['learner_idle']:.0%} of a step")
    table.add_row("tokens", f"{p['tokens_per_second']:,.0f} a second")
    total = "unknown: manifests not there yet"
    if (seconds := p["run_seconds"]) is not None:
        total = f"{duration(seconds)}, {steps} steps"
        if gpus := config.cluster.nodes * config.cluster.gpus_per_node:
            total += f", {seconds * gpus / 3600:,.1f} GPU-hours"
    table.add_row("run", total)
    table.add_row("times", prediction["source"])
    return table


def _by_gpus(prediction: dict[str, Any]) -> Table:
    """Return the best splits by number of GPUs."""
    what = "processes" if prediction["costs"]["cores"] else "GPUs"
    table = Table(title=f"Best split, learners + engines, on N {what}", title_justify="left")
    for name in "N|disagg-\nregated|step|colo-\ncated|step|E\nidle|L\nidle|all\nidle|effi-\nciency".split("|"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in prediction["table"]:
        cells = []
        for placement in PLACEMENTS:
            p, mark = row[placement], "bold" if placement == row["best"] else "none"
            texts = (f"{p['learners']}+{p['engines']}", duration(p["step_seconds"])) if p else ("—", "—")
            cells += [f"[{mark}]{text}[/]" for text in texts]
        shares = ["—"] * 4
        if row["best"]:
            best = row[row["best"]]
            shares = [f"{best[k]:.0%}" for k in ("rollout_idle", "learner_idle", "gpu_idle")]
            shares.append(f"{row['efficiency']:.0%}")
        table.add_row(str(row["gpus"]), *cells, *shares)
    table.caption = (
        f"Bold: the faster one. Of it: shares of a step without work for engines (E), learners (L), all {what}; "
        "efficiency: GPU-seconds of a step on the smallest N that fits, over those here. —: does not fit."
    )
    table.caption_justify = "left"
    return table
