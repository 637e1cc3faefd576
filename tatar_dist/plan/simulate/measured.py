"""Fit costs to measured runs: the time of each step, explained by its work.

Reads run directories of GRPO (config.yaml, metrics.jsonl, rollouts/step_*.parquet, optional events.jsonl). Returns
`StepCosts`; its notes list what these runs cannot determine.

Every part of a step is linear in its costs, which are fitted by non-negative least squares (Lawson and Hanson 1974) on
relative errors, with Huber weights against disturbed steps. Runs of one size do not determine how the time divides
among units of work; a weak prior of equal shares resolves what the data leave open. Runs of several sizes (learners,
engines, prompts_per_step, max_num_seqs) leave less open.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tatar_dist.assets import looked_in
from tatar_dist.config.load import load_config
from tatar_dist.errors import UserError
from tatar_dist.plan.plan import resolve
from tatar_dist.plan.simulate.costs import EngineCosts, LearnerCosts, OtherCosts, PushCosts, RewardCosts, StepCosts
from tatar_dist.plan.simulate.step import Setup, generate, learn_work, push_work
from tatar_dist.run.directory import read_metrics
from tatar_dist.run.events import read_events
from tatar_dist.run.status import RunHistory
from tatar_dist.types import TASKS, Task

WARM_UP = 2  # first steps of a run: kernels are compiled, caches filled
SLOW = 2.0  # a step that took longer than this many medians was disturbed: a restart, a stall
NEWEST = 50  # steps of a run that are read
PRIOR = 0.02  # of the observations' weight
HUBER = 0.1  # relative error from which an observation counts less
PARTS = ("generate", "reward", "learn", "sync")


@dataclass(frozen=True)
class Observed:
    """One measured step. `lengths` (P, G), IQA prompts first; `seconds` by part."""

    setup: Setup
    lengths: np.ndarray
    tasks: tuple[Task, ...]
    seconds: dict[str, float]
    model_gb: float


@dataclass(frozen=True)
class MeasuredRun:
    """Contents of a run directory."""

    setup: Setup
    steps: list[Observed]
    checkpoints: list[float]  # seconds that the loop stood still for each


def read_run(path: Path) -> MeasuredRun:
    """Read a run. Raises UserError: not GRPO, staleness set, bad keys, no times, bad rollouts."""
    file = path / "config.yaml"
    if not file.is_file():
        where = "" if path.is_dir() else looked_in(path)
        raise UserError(f"{path}: no run directory of GRPO, config.yaml and metrics.jsonl are not in it{where}")
    config = load_config([str(file)], [])
    if config.grpo.staleness:
        raise UserError(
            f"{file}: grpo.staleness={config.grpo.staleness}: times of parts that ran side by side do not tell what "
            "each costs; measure with grpo.staleness=0, the simulator lays them side by side itself"
        )
    names = {"step", "time/step", *(f"time/{part}" for part in PARTS)}
    rows = [row for row in read_metrics(path) if row.keys() >= names]
    if not rows:
        raise UserError(f"{path}/metrics.jsonl: no step with time/generate: give the directory of a GRPO run")
    rows = rows[WARM_UP:] if len(rows) > 2 * WARM_UP else rows[-1:]
    median = float(np.median([row["time/step"] for row in rows]))
    rows = [row for row in rows if row["time/step"] <= SLOW * median][-NEWEST:]
    try:
        plan = resolve(config, "grpo")
    except UserError as e:
        raise UserError(f"{file}: {e}") from None
    cores = None if config.cluster.gpus_per_node else config.cluster.threads or len(os.sched_getaffinity(0))
    setup = Setup(config, plan.learners, plan.engines, cores)
    steps = [_observed(path, setup, row) for row in rows]
    return MeasuredRun(setup, steps, RunHistory(read_events(path)).checkpoint_seconds)


def _observed(path: Path, setup: Setup, metrics: dict[str, Any]) -> Observed:
    file = path / "rollouts" / f"step_{metrics['step']:06d}.parquet"
    try:
        table = pq.read_table(file, columns=["group_id", "task", "tokens"])
        grouped = table.group_by("group_id", use_threads=False).aggregate([("tokens", "list"), ("task", "min")])
        groups = sorted(grouped.to_pylist(), key=lambda group: TASKS.index(group["task_min"]))
    except (OSError, ValueError) as e:  # pyarrow's errors are ValueErrors; so is a task that is none of TASKS
        raise UserError(f"{file}: cannot read the completions of a measured step: {str(e).splitlines()[0]}") from None
    g = setup.config.grpo
    if len(groups) != g.prompts_per_step or any(len(group["tokens_list"]) != g.group_size for group in groups):
        raise UserError(
            f"{file}: holds {len(groups)} groups, config.yaml says {g.prompts_per_step} of {g.group_size} completions"
        )
    seconds = {part: float(metrics[f"time/{part}"]) for part in PARTS}
    seconds["other"] = max(0.0, float(metrics["time/step"]) - sum(seconds.values()))
    gb = float(metrics.get("sync/bytes") or 0.0) / setup.engines / 1e9
    lengths = np.array([group["tokens_list"] for group in groups])
    return Observed(setup, lengths, tuple(group["task_min"] for group in groups), seconds, gb)


def fit(work: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Fit costs c >= 0 to work @ c = seconds in relative error, as in the module's docstring.

    work: (n, k), seconds: (n,). Returns (k,); work that never occurs costs 0.
    """
    from scipy.optimize import nnls

    seconds = np.maximum(seconds, 1e-9)
    used = np.flatnonzero(work.any(axis=0))
    relative = work[:, used] / seconds[:, None]
    scale = relative.mean(axis=0)  # so that an unknown is the share of the time that its kind of work takes
    prior = np.sqrt(PRIOR * len(work)) * np.eye(len(used))
    target = prior.sum(axis=1) / len(used)
    weight = np.ones(len(work))
    for _ in range(5):
        rows = np.vstack([weight[:, None] * relative / scale, prior])
        share, _ = nnls(rows, np.concatenate([weight, target]))
        error = np.abs(relative / scale @ share - 1)
        weight = np.sqrt(np.minimum(1.0, HUBER / np.maximum(error, 1e-9)))
    costs = np.zeros(work.shape[1])
    costs[used] = share / scale
    return costs


def _error(predicted: np.ndarray, seconds: np.ndarray) -> float:
    return float(np.median(np.abs(predicted / np.maximum(seconds, 1e-9) - 1)))


def _fit_engine(steps: Sequence[Observed], serial: float) -> tuple[EngineCosts, float]:
    """Fit an engine's costs to generation times; return (costs, median relative error).

    Iterates, because the costs determine which engine finishes last.
    """
    seconds = np.array([s.seconds["generate"] for s in steps])
    costs = EngineCosts(per_step=1.0, serial=serial)
    for _ in range(6):
        work = np.array([generate(costs, s.setup, s.lengths)[1] for s in steps])
        costs = replace(EngineCosts(*fit(work, seconds)), serial=serial)
    return costs, _error(np.array([generate(costs, s.setup, s.lengths)[0].seconds for s in steps]), seconds)


def _fit_learner(steps: Sequence[Observed], serial: float) -> tuple[LearnerCosts, float]:
    seconds = np.array([s.seconds["learn"] for s in steps])
    factors = [s.setup.slow_down(serial, s.setup.learners, s.setup.learners) for s in steps]
    work = np.array([learn_work(s.setup, s.lengths) * f for s, f in zip(steps, factors, strict=True)])
    per_unit = fit(work, seconds)
    return replace(LearnerCosts(*per_unit), serial=serial), _error(work @ per_unit, seconds)


def _best_serial(try_: Callable[[float], tuple[Any, float]], threads: set[int]) -> tuple[Any, float]:
    """Fit with the best serial share if runs differ in threads, else 0.5; return (costs, error)."""
    candidates = np.linspace(0, 1, 11) if len(threads) > 1 else [0.5]
    return min((try_(float(s)) for s in candidates), key=lambda fitted: fitted[1])


def costs_of_runs(paths: Sequence[Path]) -> StepCosts:
    """Fit costs to all runs. Raises UserError as `read_run`, and for runs on different hardware."""
    runs = [read_run(p) for p in paths]
    steps = [s for run in runs for s in run.steps]
    setups = [run.setup for run in runs]
    cores, model = setups[0].cores, setups[0].config.model
    if any(s.cores != cores for s in setups):
        raise UserError(f"{paths[0]} and others ran on different hardware: give runs of one kind of machine")
    threads = {
        "engines": {s.threads(s.engines) for s in setups},
        "learners": {s.threads(s.learners) for s in setups},
    }
    engine, engine_error = _best_serial(lambda s: _fit_engine(steps, s), threads["engines"])
    learner, learner_error = _best_serial(lambda s: _fit_learner(steps, s), threads["learners"])
    rows = np.array([[1.0, s.setup.rows] for s in steps])
    gb = float(np.median([s.model_gb for s in steps]))
    pushes = np.array([push_work(s.setup, s.model_gb) for s in steps])

    def fitted(part: str, work: np.ndarray) -> np.ndarray:
        return fit(work, np.array([s.seconds[part] for s in steps]))

    lengths: dict[Task, list[tuple[int, ...]]] = {}
    for s in steps:
        for task, group in zip(s.tasks, s.lengths.tolist(), strict=True):
            lengths.setdefault(task, []).append(tuple(group))
    waits = [seconds for run in runs for seconds in run.checkpoints]
    return StepCosts(
        lengths={task: tuple(groups) for task, groups in lengths.items()},
        engine=engine,
        learner=learner,
        reward=RewardCosts(*fitted("reward", rows)),
        push=PushCosts(*fitted("sync", pushes)),
        other=OtherCosts(*fitted("other", rows)),
        checkpoint=float(np.median(waits)) if waits else 0.0,
        model_gb=gb,
        parameters=0.0 if cores else gb * 1e9 / (2 if model.dtype == "bfloat16" else 4),
        cores=cores,
        source=f"measured: {len(steps)} steps of {', '.join(str(p) for p in paths)}",
        notes=(
            f"the fit misses measured generation by {engine_error:.0%}, learning by {learner_error:.0%} (median)",
            *_notes(setups, threads),
            *([] if waits else ["no checkpoint was measured (events.jsonl): the whole run is without them"]),
        ),
    )


def _notes(setups: list[Setup], threads: dict[str, set[int]]) -> list[str]:
    """Return what these runs leave open."""
    alike = [role for role, counts in threads.items() if len(counts) == 1]
    notes = {
        "a guess, how engine calls grow with prompts: measure a run with other rollout.engines or prompts_per_step": (
            len({-(-s.config.grpo.prompts_per_step // s.engines) for s in setups}) == 1
        ),
        "a guess, how much of learning shrinks with more learners: measure a run with other cluster.learners": (
            len({s.rows // s.learners for s in setups}) == 1
        ),
        "a guess, what collectives cost: all runs had one number of learners": len({s.learners for s in setups}) == 1,
        "no run spans nodes: collectives and pushes between nodes are taken as fast as within one": (
            all(0 < s.config.cluster.gpus_per_node >= s.learners for s in setups)
        ),
        f"{' and '.join(alike)} had one number of threads only: half of their work is taken as serial": (
            setups[0].cores and alike
        ),
        "zero_std=refill: rounds of new prompts count into the measured generation, not as rounds": (
            any(s.config.grpo.zero_std == "refill" for s in setups)
        ),
    }
    return [note for note, holds in notes.items() if holds]
