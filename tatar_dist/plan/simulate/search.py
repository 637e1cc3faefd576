"""Search the best split of learners and engines for each number of GPUs, and predict its step time.

Takes a configuration, `StepCosts` and numbers of GPUs; returns a `Forecast`. All candidate splits are simulated with
the same draws of completion lengths (fixed seed), so that they differ only by the split:
    learners   every divisor of the global batch that fits (others work too, and are rarely better)
    engines    every number that makes the calls smaller than one engine fewer would, up to one per prompt
both `disaggregated` (separate GPUs) and `colocated` (each engine shares a learner's GPU in turns, as in plan.resolve).
Generation depends only on the engines and learning only on the learners, so each is simulated once. Colocated splits
are not simulated with staleness, as the engines sleep while the learners work, or with tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError
from tatar_dist.plan.plan import Plan, resolve
from tatar_dist.plan.simulate.costs import StepCosts
from tatar_dist.plan.simulate.step import Setup, StepTimes, amdahl, simulate_step

GPUS = tuple(1 << k for k in range(11))
DRAWS = 48
MEMORY = 0.85  # of a GPU for weights, gradients, optimiser; the rest for activations
STATE_BYTES = 16  # a parameter: bf16 weight and gradient, fp32 master copy, two moments (ZeRO, arXiv 1910.02054, 3.1)
REFERENCE_BYTES = 2  # a parameter of the frozen start model that the KL is against
ENGINE_BYTES = 2
KV_SHARE = 0.1  # of a GPU, the least an engine needs beside its weights
PLACEMENTS = ("disaggregated", "colocated")


@dataclass(frozen=True)
class Prediction:
    """Predicted step of a split. Idle shares as in metrics.jsonl (perf/*_idle); `gpu_idle`: of GPU-seconds."""

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


def fastest(predictions: dict[str, Prediction | None]) -> Prediction | None:
    """Return the prediction with the shortest step; None if no placement fits."""
    return min((p for p in predictions.values() if p), key=lambda p: p.step_seconds, default=None)


def draw_lengths(costs: StepCosts, setup: Setup, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """Draw (draws, P, G) completion lengths, IQA prompts first.
    Each prompt takes the G lengths from one measured group with replacement, so completions of a prompt stay similar.

    Raises:
        UserError: a task of the batch has no lengths.
    """
    rng = np.random.default_rng(seed)
    n_iqa = round(setup.prompts * setup.iqa_fraction)
    parts = []
    for task, n in (("iqa", n_iqa), ("iaa", setup.prompts - n_iqa)):
        if not n:
            continue
        groups = costs.lengths.get(task)
        if not groups:
            raise UserError(f"no completion lengths of task {task}, which has {n} of {setup.prompts} prompts in a step")
        picked = rng.integers(len(groups), size=(draws, n))
        sizes = np.array([len(g) for g in groups])
        table = np.zeros((len(groups), sizes.max()), int)
        for i, group in enumerate(groups):
            table[i, : len(group)] = group
        within = (rng.random((draws, n, setup.group_size)) * sizes[picked][..., None]).astype(int)
        parts.append(table[picked[..., None], within])
    return np.concatenate(parts, axis=1)


class Simulator:
    """Simulate splits of one configuration with the same draws, and cache the results."""

    def __init__(self, config: Config, costs: StepCosts, shared_cores: bool = False, seed: int = 0) -> None:
        # On CPUs a table over more processes supposes for each the cores that one had.
        self.config, self.costs = config, costs
        cores = costs.cores if shared_cores else None
        if costs.cores and not shared_cores:
            self.costs = alone(costs)
        self.setup = replace(Setup.of(config, 1, 1, cores), colocated=False)
        self.lengths = draw_lengths(costs, self.setup, seed)
        self._engines = cache(self._simulate_engines)
        self._learners = cache(self._simulate_learners)

    def _simulate_engines(self, engines: int) -> list[StepTimes]:
        setup = replace(self.setup, engines=engines)
        return [simulate_step(self.costs, setup, lengths) for lengths in self.lengths]

    def _simulate_learners(self, learners: int) -> np.ndarray:
        setup = replace(self.setup, learners=learners)
        return np.array([simulate_step(self.costs, setup, lengths).learn for lengths in self.lengths])

    def predict(self, learners: int, engines: int, placement: str) -> Prediction:
        """Predict a step. Raises UserError for fewer rows than learners, or if all costs are zero."""
        setup = replace(self.setup, learners=learners, engines=engines, colocated=placement == "colocated")
        times, learn = self._engines(engines), self._learners(learners)
        switch = self.costs.switch if setup.colocated else 0.0
        names = ("generate", "reward", "sync", "other")
        parts = {name: np.array([getattr(t, name) for t in times]) for name in names} | {"learn": learn}
        step = np.array([replace(t, learn=x, switch=switch).step for t, x in zip(times, learn.tolist(), strict=True)])
        if not step.all():
            raise UserError(f"a step takes no time by these times ({self.costs.source}): give engine and learner some")
        busy = np.array([t.engines_busy for t in times]) * setup.tensor_parallel + learners * learn
        mean = {name: float(parts[name].mean()) for name in ("generate", "reward", "learn", "sync", "other")}
        return Prediction(
            placement=placement,
            learners=learners,
            engines=engines,
            gpus=setup.gpus,
            step_seconds=float(step.mean()),
            step_p95=float(np.quantile(step, 0.95)),
            parts=mean | ({"switch": switch} if setup.colocated else {}),
            rollout_idle=float(np.mean(1 - parts["generate"] / step)),
            learner_idle=float(np.mean(1 - learn / step)),
            gpu_idle=float(np.mean(1 - busy / (setup.gpus * step))),
            tokens_per_second=float(np.mean(self.lengths.sum(axis=(1, 2)) / step)),
        )

    def splits(self, gpus: int, placement: str) -> list[tuple[int, int]]:
        """Return candidate (learners, engines) that fit into the memory of `gpus` GPUs."""
        s, tp = self.setup, self.setup.tensor_parallel
        if placement == "colocated" and (tp > 1 or s.staleness):
            return []
        calls = {-(-s.prompts // k) for k in range(1, s.prompts + 1)}  # engines that make the calls smaller
        splits: list[tuple[int, int]] = []
        for learners in (n for n in range(1, min(gpus, s.rows) + 1) if s.rows % n == 0):
            if not self.fits(learners, placement):
                continue
            room = learners if placement == "colocated" else (gpus - learners) // tp
            engines = {n for n in calls if n <= room} | {min(room, s.prompts)}
            splits += [(learners, e) for e in sorted(engines) if e]
        return splits

    def fits(self, learners: int, placement: str) -> bool:
        """Whether GPUs hold a learner's shard and an engine's weights, together if colocated; True if unknown."""
        c = self.costs
        if not c.parameters or c.cores:
            return True
        gpu = c.gpu_gib * 2**30
        state = c.parameters * (STATE_BYTES + (REFERENCE_BYTES if self.config.grpo.kl_beta else 0)) / learners
        weights = c.parameters * ENGINE_BYTES / self.setup.tensor_parallel
        if placement == "colocated" and state + weights > (1 - KV_SHARE) * gpu:
            return False
        return state <= MEMORY * gpu and weights <= (1 - KV_SHARE) * gpu

    def best(self, gpus: int, placement: str) -> Prediction | None:
        """Return the split with the shortest step, on ties with the fewest GPUs; None if nothing fits."""
        predictions = [self.predict(*split, placement) for split in self.splits(gpus, placement)]
        return min(predictions, key=lambda p: (round(p.step_seconds, 9), p.gpus), default=None)


def alone(costs: StepCosts) -> StepCosts:
    """Convert CPU costs to those of a process that uses all `cores`, as for dedicated hardware."""
    assert costs.cores
    scaled = {}
    for role in ("engine", "learner"):
        part = getattr(costs, role)
        factor = amdahl(part.serial, costs.cores)
        values = {k: v * factor for k, v in asdict(part).items() if v is not None and k != "serial"}
        scaled[role] = replace(part, **values)
    return replace(costs, **scaled)


@dataclass(frozen=True)
class Forecast:
    """The split of `plan`, and the best ones by number of GPUs and placement (None: nothing fits)."""

    plan: Plan
    own: Prediction
    rows: tuple[tuple[int, dict[str, Prediction | None]], ...]
    costs: StepCosts
    notes: tuple[str, ...]
    checkpoints: int | None  # in the whole run

    def run_seconds(self, p: Prediction) -> float | None:
        """Seconds of the whole run, without start and evaluations; None if the number of steps is unknown."""
        if self.plan.steps is None or self.checkpoints is None:
            return None
        return self.plan.steps * p.step_seconds + self.checkpoints * self.costs.checkpoint

    def efficiency(self) -> dict[int, float]:
        """Return n -> GPU-seconds of a step on the fewest GPUs that work, over those on n, each with the best split."""
        steps = {n: best.step_seconds for n, predictions in self.rows if (best := fastest(predictions))}
        return {n: steps[min(steps)] * min(steps) / (n * s) for n, s in steps.items()}

    def to_dict(self) -> dict[str, Any]:
        efficiency = self.efficiency()

        def shown(p: Prediction | None) -> dict[str, Any] | None:
            return {**asdict(p), "run_seconds": self.run_seconds(p)} if p else None

        table = []
        for n, predictions in self.rows:
            best = fastest(predictions)
            row = {"gpus": n, "best": best and best.placement, "efficiency": efficiency.get(n)}
            table.append(row | {placement: shown(p) for placement, p in predictions.items()})
        return {
            "source": self.costs.source,
            "notes": list(self.notes),
            "steps": self.plan.steps,
            "configured": shown(self.own),
            "table": table,
            "costs": asdict(self.costs),
        }


def forecast(config: Config, costs: StepCosts, gpus: Sequence[int] = GPUS) -> Forecast:
    """Simulate the configured split and the best splits for each number of `gpus`.

    Raises:
        UserError: a number below 1, times of CPUs for a cluster of GPUs or the reverse, more learners than completions.
    """
    if wrong := [n for n in gpus if n < 1]:
        raise UserError(f"--gpus {wrong[0]}: must be at least 1")
    plan = resolve(config, "grpo")
    if bool(costs.cores) == bool(config.cluster.gpus_per_node):
        kind = ("CPUs", "GPUs") if costs.cores else ("GPUs", "CPUs")
        raise UserError(
            f"times of {kind[0]} ({costs.source}) say nothing about {kind[1]}: measure there, "
            f"or set cluster.gpus_per_node={0 if costs.cores else 8}"
        )
    own = Simulator(config, costs, shared_cores=True).predict(plan.learners, plan.engines, config.cluster.placement)
    many = Simulator(config, costs)
    rows = tuple((n, {p: many.best(n, p) for p in PLACEMENTS}) for n in sorted(set(gpus)))
    every, steps = config.checkpoint.every, plan.steps
    saved = None if steps is None else (steps // every + (steps % every > 0) if every else 1)
    return Forecast(plan, own, rows, costs, tuple(_notes(config, costs, many)), saved)


def _notes(config: Config, costs: StepCosts, simulator: Simulator) -> list[str]:
    notes = list(costs.notes)
    if costs.cores:
        notes.append("CPUs: the table supposes for every process the cores that the measured ones shared")
    if not costs.switch:
        notes.append("colocated: what putting engines to sleep and waking them costs was not measured, 0 is taken")
    if not simulator.fits(1, "disaggregated"):
        least = next((n for n in range(2, simulator.setup.rows + 1) if simulator.fits(n, "disaggregated")), None)
        if least:
            notes.append(f"memory: the learners' state takes at least {least} GPUs of {costs.gpu_gib:g} GiB")
        else:
            cure = "raise rollout.tensor_parallel, or take larger ones"
            notes.append(f"memory: no split fits GPUs of {costs.gpu_gib:g} GiB: {cure}")
    return notes
