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

from tatar_dist.assets import looked_in
from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError
from tatar_dist.plan.plan import resolve
from tatar_dist.plan.simulate.costs import EngineCosts, LearnerCosts, OtherCosts, PushCosts, RewardCosts, StepCosts
from tatar_dist.plan.simulate.step import Setup, generate, learn_factor, learn_work, push_work
from tatar_dist.run.directory import read_metrics
from tatar_dist.run.events import read_events
from tatar_dist.run.status import RunHistory
from tatar_dist.types import TASKS

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
    tasks: tuple[str, ...]
    seconds: dict[str, float]
    model_gb: float


@dataclass(frozen=True)
class MeasuredRun:
    """Contents of a run directory."""

    path: Path
    config: Config
    steps: list[Observed]
    checkpoint: float | None  # median seconds that the loop stood still for one


def read_run(path: Path) -> MeasuredRun:
    """Read a run. Raises UserError: no GRPO run, staleness above 0, unknown keys, no timed step, bad rollouts."""
    metrics_file = path / "metrics.jsonl"
    if not path.is_dir():
        raise UserError(f"{path}: no such directory{looked_in(path)}")
    if not (path / "config.yaml").is_file() or not metrics_file.is_file():
        raise UserError(f"{path}: no run directory of GRPO (config.yaml and metrics.jsonl), give one that has trained")
    config = load_config([str(path / "config.yaml")], [])
    if config.grpo.staleness:
        raise UserError(
            f"{path / 'config.yaml'}: grpo.staleness={config.grpo.staleness}: times of parts that ran side by side do "
            "not tell what each costs; measure with grpo.staleness=0, the simulator lays them side by side itself"
        )
    lines = [row for row in read_metrics(path) if _is_timed(row)]
    if not lines:
        raise UserError(f"{metrics_file}: no step with time/generate: give the directory of a GRPO run")
    lines = lines[WARM_UP:] if len(lines) > 2 * WARM_UP else lines[-1:]
    median = float(np.median([m["time/step"] for m in lines]))
    lines = [m for m in lines if m["time/step"] <= SLOW * median][-NEWEST:]
    try:
        plan = resolve(config, "grpo")
    except UserError as e:
        raise UserError(f"{path / 'config.yaml'}: {e}") from None
    cores = None if config.cluster.gpus_per_node else config.cluster.threads or len(os.sched_getaffinity(0))
    setup = Setup.of(config, plan.learners, plan.engines, cores)
    steps = [_observed(path, setup, m) for m in lines]
    waits = RunHistory(read_events(path)).checkpoint_seconds
    return MeasuredRun(path, config, steps, float(np.median(waits)) if waits else None)


def _is_timed(row: dict[str, Any]) -> bool:
    times = [row.get(f"time/{part}") for part in (*PARTS, "step")]
    return all(isinstance(t, float | int) for t in times) and isinstance(row.get("step"), int)


def _observed(path: Path, setup: Setup, metrics: dict[str, Any]) -> Observed:
    import pyarrow.parquet as pq

    file = path / "rollouts" / f"step_{metrics['step']:06d}.parquet"
    try:
        table = pq.read_table(file, columns=["group_id", "index", "task", "tokens"])
    except (OSError, ValueError) as e:  # pyarrow's errors are ValueErrors
        raise UserError(f"{file}: cannot read the completions of a measured step: {str(e).splitlines()[0]}") from None
    columns = table.to_pydict()
    if set(columns["task"]) - set(TASKS):
        raise UserError(f"{file}: holds a task that is none of {', '.join(TASKS)}")
    groups: dict[str, list[int]] = {}
    task_of = dict(zip(columns["group_id"], columns["task"], strict=True))
    for group, tokens in zip(columns["group_id"], columns["tokens"], strict=True):
        groups.setdefault(group, []).append(tokens)
    names = sorted(groups, key=lambda g: TASKS.index(task_of[g]))
    if len(names) != setup.prompts or any(len(groups[g]) != setup.group_size for g in names):
        raise UserError(
            f"{file}: holds {len(names)} groups, config.yaml says {setup.prompts} of {setup.group_size} completions"
        )
    seconds = {part: float(metrics[f"time/{part}"]) for part in PARTS}
    seconds["other"] = max(0.0, float(metrics["time/step"]) - sum(seconds.values()))
    gb = float(metrics.get("sync/bytes") or 0.0) / setup.engines / 1e9
    return Observed(setup, np.array([groups[g] for g in names]), tuple(task_of[g] for g in names), seconds, gb)


def fit(work: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Fit non-negative costs c to work @ c = seconds in relative error, with the method of the module docstring.

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
    """Fit an engine's costs to the measured generation times; return (costs, median relative error).

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
    work = np.array([learn_work(s.setup, s.lengths) * learn_factor(serial, s.setup) for s in steps])
    line = fit(work, seconds)
    return replace(LearnerCosts(*line), serial=serial), _error(work @ line, seconds)


def _best_serial(try_: Callable[[float], tuple[Any, float]], threads: set[int]) -> tuple[Any, float]:
    """Fit with the best serial share if runs differ in threads, else with 0.5; return (costs, error)."""
    candidates = np.linspace(0, 1, 11) if len(threads) > 1 else [0.5]
    return min((try_(float(s)) for s in candidates), key=lambda found: found[1])


def costs_of_runs(paths: Sequence[Path]) -> StepCosts:
    """Fit costs to all runs together. Raises UserError as `read_run` does, and for runs on different hardware."""
    runs = [read_run(p) for p in paths]
    steps = [s for run in runs for s in run.steps]
    kinds = {s.setup.cores for s in steps}
    if len(kinds) > 1:
        raise UserError(f"{paths[0]} and others ran on different hardware: give runs of one kind of machine")
    setups = {s.setup for s in steps}
    cores = steps[0].setup.cores
    threads = {role: {s.threads(getattr(s, role)) for s in setups} for role in ROLES}
    engine, engine_error = _best_serial(lambda s: _fit_engine(steps, s), threads["engines"])
    learner, learner_error = _best_serial(lambda s: _fit_learner(steps, s), threads["learners"])
    rows = np.array([[1.0, s.setup.rows] for s in steps])
    gb = np.array([s.model_gb for s in steps])
    pushes = np.array([push_work(s.setup, s.model_gb) for s in steps])

    def of(part: str, work: np.ndarray) -> np.ndarray:
        return fit(work, np.array([s.seconds[part] for s in steps]))

    groups = [(task, tuple(group)) for s in steps for task, group in zip(s.tasks, s.lengths.tolist(), strict=True)]
    model = runs[0].config.model
    waits = [r.checkpoint for r in runs if r.checkpoint is not None]
    return StepCosts(
        lengths={
            task: tuple(group for t, group in groups if t == task) for task in dict.fromkeys(t for t, _ in groups)
        },
        engine=engine,
        learner=learner,
        reward=RewardCosts(*of("reward", rows)),
        push=PushCosts(*of("sync", pushes)),
        other=OtherCosts(*of("other", rows)),
        checkpoint=float(np.median(waits)) if waits else 0.0,
        model_gb=float(np.median(gb)),
        parameters=float(np.median(gb)) * 1e9 / (2 if model.dtype == "bfloat16" else 4) if not cores else 0.0,
        cores=cores,
        source=f"measured: {len(steps)} steps of {', '.join(str(p) for p in paths)}",
        notes=tuple(_notes(runs, setups, threads, engine_error, learner_error)),
    )


ROLES = ("engines", "learners")


def _notes(
    runs: list[MeasuredRun], setups: set[Setup], threads: dict[str, set[int]], engine_error: float, learner_error: float
) -> list[str]:
    notes = [f"the fit misses measured generation by {engine_error:.0%}, learning by {learner_error:.0%} (median)"]
    if len({-(-s.prompts // s.engines) for s in setups}) == 1:
        notes.append(
            "engine calls of one size only: how their time grows with prompts is a guess; "
            "add --measured of a run with other rollout.engines or prompts_per_step"
        )
    if len({s.rows // s.learners for s in setups}) == 1:
        notes.append(
            "one number of rows a learner only: what part of learning does not shrink with more learners is a guess; "
            "add --measured of a run with other cluster.learners"
        )
    if len({s.learners for s in setups}) == 1:
        notes.append("one number of learners only: the cost of collectives is a guess")
    if all(0 < s.gpus_per_node >= s.learners for s in setups):
        notes.append("nothing measured spans nodes: beyond one, collectives and pushes are taken as fast as within one")
    if any(s.cores for s in setups):
        alike = [role for role in ROLES if len(threads[role]) == 1]
        if alike:
            notes.append(f"{' and '.join(alike)} had one number of threads only: half of their work is taken as serial")
    if not any(r.checkpoint is not None for r in runs):
        notes.append("no checkpoint was measured (events.jsonl): the whole run is without them")
    if any(r.config.grpo.zero_std == "refill" for r in runs):
        notes.append("zero_std=refill: rounds of new prompts count into the measured generation, not as rounds")
    return notes
