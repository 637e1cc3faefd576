"""Simulate one GRPO step by discrete events: engine calls, reward, learners, weight push.

Takes `StepCosts`, a `Setup` (configuration and split) and (P, G) completion lengths in tokens; returns the seconds of
each part. With staleness 0 they run in sequence, as in grpo.py; otherwise generation and scoring overlap with learning.
Within a part, the calls of rollout/pool.py and the micro-batches of learner/packing.py are simulated.

The time of a part is linear in its costs. The functions here return the *work*, the vector that multiplies the costs,
so that measured.py fits costs with the same model.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError
from tatar_dist.learner.packing import pack
from tatar_dist.models.costs import Unit
from tatar_dist.plan.simulate.costs import EngineCosts, LearnerCosts, StepCosts, prompt_tokens


@dataclass(frozen=True)
class Setup:
    """A step of `config` with its numbers of learners and engines.

    cores: CPU cores that all processes share or, with `dedicated`, that each process has for itself; None on GPUs.
    """

    config: Config
    learners: int
    engines: int
    cores: int | None = None
    dedicated: bool = False
    colocated: bool = False

    @property
    def rows(self) -> int:
        return self.config.grpo.prompts_per_step * self.config.grpo.group_size

    @property
    def gpus(self) -> int:
        engines = self.engines * self.config.rollout.tensor_parallel
        return max(self.learners, engines) if self.colocated else self.learners + engines

    @property
    def side_cores(self) -> int:
        """Cores of the engines, and of the learners: all if they run in turns, else half."""
        halved = self.config.grpo.staleness or self.config.cluster.pin_cores
        return max(1, (self.cores or 1) // (2 if halved and not self.dedicated else 1))

    def threads(self, processes: int) -> int:
        """Return the threads of each of `processes` engines or learners, as in Cluster.threads."""
        return self.side_cores if self.dedicated else max(1, self.side_cores // processes)

    def slow_down(self, serial: float, processes: int, busy: int) -> float:
        """Return a process's time while `busy` of `processes` work, relative to one thread alone.

        Threads share all but the `serial` part of the work (Amdahl 1967); more threads than cores take turns.
        """
        if not self.cores:
            return 1.0
        threads = self.threads(processes)
        turns = 1.0 if self.dedicated else max(1.0, busy * threads / self.side_cores)
        return (serial + (1 - serial) / threads) * turns


@dataclass(frozen=True)
class Service:
    """Schedule of a queue of calls: seconds, busy engine-seconds, each engine's calls in order."""

    seconds: float
    busy: float
    calls: list[list[int]]


def serve(work: Sequence[float], engines: int, speed: Callable[[int], float] = lambda busy: 1.0) -> Service:
    """Assign calls in order, each to the first free engine, as RolloutPool.stream does.

    `speed(busy)`: speed of each engine while `busy` of them work; below 1 if they share cores. The heap is ordered by
    work done, which advances equally for all running engines; the clock counts seconds.
    """
    calls: list[list[int]] = [[] for _ in range(engines)]
    free = list(range(engines))
    running: list[tuple[float, int]] = []
    done = clock = busy = 0.0
    i = 0
    while i < len(work) or running:
        while free and i < len(work):
            engine = heapq.heappop(free)
            calls[engine].append(i)
            heapq.heappush(running, (done + work[i], engine))
            i += 1
        seconds = (running[0][0] - done) / speed(len(running))
        clock, busy = clock + seconds, busy + seconds * len(running)
        done, engine = heapq.heappop(running)
        heapq.heappush(free, engine)
    return Service(clock, busy, calls)


def calls(setup: Setup) -> list[range]:
    """Split the prompts into engine calls, as RolloutPool.chunks does."""
    g, r = setup.config.grpo, setup.config.rollout
    share = -(-g.prompts_per_step // setup.engines)
    size = 1 if r.deterministic else max(1, min(share, r.max_num_seqs // g.group_size))
    return [range(i, min(i + size, g.prompts_per_step)) for i in range(0, g.prompts_per_step, size)]


def call_work(lengths: np.ndarray, slots: int) -> np.ndarray:
    """Return the (4,) work of a call: 1, decode steps, tokens, prompts. `lengths`: (prompts, G).

    Sequences beyond the engine's `slots` wait for a free one (continuous batching).
    """
    steps = lengths.max() if lengths.size <= slots else serve(lengths.ravel().tolist(), slots).seconds
    return np.array([1.0, steps, lengths.sum(), len(lengths)])


def generate(costs: EngineCosts, setup: Setup, lengths: np.ndarray) -> tuple[Service, np.ndarray]:
    """Return the calls' schedule, and the (4,) work of the last engine, scaled by its slow-down."""
    *per_unit, serial = astuple(costs)
    work = np.array([call_work(lengths[r.start : r.stop], setup.config.rollout.max_num_seqs) for r in calls(setup)])
    alone = setup.slow_down(serial, setup.engines, busy=1)
    seconds = work @ per_unit * alone
    service = serve(seconds.tolist(), setup.engines, lambda busy: alone / setup.slow_down(serial, setup.engines, busy))
    last = max(service.calls, key=lambda indices: seconds[indices].sum())
    busy = seconds[last].sum()
    return service, work[last].sum(axis=0) * (service.seconds / busy if busy else 1.0) * alone


def learn_work(setup: Setup, lengths: np.ndarray) -> np.ndarray:
    """Return the (6,) work of each micro-batch's slowest rank, in the order of `LearnerCosts`.

    Collectives wait for the slowest rank. Raises UserError: fewer rows than learners.
    """
    ranks, g = setup.learners, setup.config.grpo.group_size
    if setup.rows < ranks:
        raise UserError(f"{setup.rows} completions a step are too few for {ranks} learners")
    rows = (-np.sort(-lengths)).tolist()  # longest first, as the batcher has them
    prompt = prompt_tokens(setup.config)
    units = [Unit(tuple(range(i * g, i * g + g)), prompt, tuple(row)) for i, row in enumerate(rows)]
    packed = pack(units, ranks, setup.config.grpo.micro_tokens)
    # (ranks, micro-batches, 3): completions, images (parts of a prompt may meet again), completion tokens
    counts = np.array([[_counts(batch, g) for batch in batches] for batches in packed])
    n = counts.shape[1]
    return np.array([1, n, *counts.max(axis=0).sum(axis=0), n * (ranks - 1) / ranks], dtype=float)


def _counts(batch: Sequence[Unit], g: int) -> tuple[int, int, int]:
    images = {unit.rows[0] // g for unit in batch}
    return sum(len(unit.rows) for unit in batch), len(images), sum(sum(unit.lengths) for unit in batch)


def learn_seconds(costs: LearnerCosts, setup: Setup, lengths: np.ndarray) -> float:
    """Return the seconds of an update. Raises UserError as `learn_work` does."""
    *per_unit, gather, across_nodes, serial, per_shard, overlap = astuple(costs)
    if across_nodes is not None and 0 < setup.config.cluster.gpus_per_node < setup.learners:
        gather = across_nodes
    seconds = learn_work(setup, lengths) * [*per_unit, gather]
    hidden = overlap * min(seconds[2:5].sum(), seconds[5])
    slow_down = setup.slow_down(serial, setup.learners, setup.learners)
    return float(seconds.sum() - hidden + per_shard / setup.learners) * slow_down


def push_work(setup: Setup, gb: float) -> np.ndarray:
    """Return the (3,) work of a push, in the order of the first of `PushCosts`.

    Buckets are pipelined: gathering overlaps loading, so n buckets take n + 1 times the slower of these two stages,
    `per_gb`. Each further node of engines is sent a copy.
    """
    r, per_node = setup.config.rollout, setup.config.cluster.gpus_per_node
    buckets = max(1.0, np.ceil(gb * 1e9 / (r.bucket_mib << 20)))
    receivers = -(-setup.engines * r.tensor_parallel // per_node) if per_node else setup.engines
    return np.array([1.0, gb * (1 + 1 / buckets), gb * (receivers - 1)])


def push_seconds(costs: StepCosts, setup: Setup) -> float:
    """Return the seconds of a weight push."""
    push = (setup.colocated and costs.push_colocated) or costs.push
    per_push, per_gb, per_receiver, across_nodes = astuple(push)
    if across_nodes is not None and 0 < setup.config.cluster.gpus_per_node < setup.gpus:
        per_gb = across_nodes
    return float(push_work(setup, costs.model_gb) @ [per_push, per_gb, per_receiver])


def step_parts(costs: StepCosts, setup: Setup, generate: Any, learn: Any) -> dict[str, Any]:
    """Return a step's seconds by part from those of engines and learners, floats or (draws,)."""
    parts = {
        "generate": generate,
        "reward": costs.reward.per_batch + costs.reward.per_completion * setup.rows,
        "learn": learn,
        "sync": push_seconds(costs, setup),
        "other": costs.other.per_step + costs.other.per_completion * setup.rows,
    }
    return parts | ({"switch": costs.switch} if setup.colocated else {})


def step_seconds(parts: dict[str, Any], staleness: int) -> Any:
    """Return a step's seconds; with staleness the learners work during a later batch's sampling."""
    sample, learn = parts["generate"] + parts["reward"], parts["learn"]
    return sum(parts.values()) - (np.minimum(sample, learn) if staleness else 0.0)
