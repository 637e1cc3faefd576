"""Discrete-event simulation of one GRPO step: engine calls, reward, learners and weight push.

Takes `StepCosts`, a `Setup` (sizes and split) and completion lengths in tokens (P prompts, G a group); returns
`StepTimes`. With staleness 0 the parts run in sequence, as in grpo.py; otherwise generation and scoring overlap with
learning. Within a part, the calls of rollout/pool.py and the micro-batches of learner/packing.py are simulated.

The time of a part is linear in its costs. The functions here return the *work*, the vector that multiplies the costs,
so that measured.py fits costs with the same model.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError
from tatar_dist.learner.packing import pack
from tatar_dist.models.costs import Unit
from tatar_dist.plan.simulate.costs import EngineCosts, LearnerCosts, StepCosts, prompt_tokens


@dataclass(frozen=True)
class Setup:
    """Parameters of a step. `cores`: CPU cores shared by all processes; None = dedicated hardware."""

    learners: int
    engines: int
    prompts: int
    group_size: int
    micro_tokens: int
    max_num_seqs: int
    prompt_tokens: int = 0
    staleness: int = 0
    pinned: bool = False  # cluster.pin_cores
    iqa_fraction: float = 0.5
    deterministic: bool = False
    colocated: bool = False
    tensor_parallel: int = 1
    gpus_per_node: int = 0
    bucket_mib: int = 256
    cores: int | None = None

    @classmethod
    def of(cls, config: Config, learners: int, engines: int, cores: int | None) -> Setup:
        g, r, c = config.grpo, config.rollout, config.cluster
        return cls(
            learners=learners,
            engines=engines,
            prompts=g.prompts_per_step,
            group_size=g.group_size,
            micro_tokens=g.micro_tokens,
            max_num_seqs=r.max_num_seqs,
            prompt_tokens=prompt_tokens(config),
            staleness=g.staleness,
            pinned=c.pin_cores,
            iqa_fraction=config.data.iqa_fraction,
            deterministic=r.deterministic,
            colocated=c.placement == "colocated",
            tensor_parallel=r.tensor_parallel,
            gpus_per_node=c.gpus_per_node,
            bucket_mib=r.bucket_mib,
            cores=cores,
        )

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size

    @property
    def side_cores(self) -> int | None:
        """Cores of the engines, and of the learners: all if they run in turns, else half."""
        return self.cores and max(1, self.cores // (2 if self.staleness or self.pinned else 1))

    def threads(self, processes: int) -> int:
        """Threads of each of `processes` engines or learners, as in Cluster.threads."""
        return max(1, self.side_cores // processes) if self.side_cores else 1

    @property
    def gpus(self) -> int:
        engines = self.engines * self.tensor_parallel
        return max(self.learners, engines) if self.colocated else self.learners + engines


@dataclass(frozen=True)
class StepTimes:
    """Seconds by part, and busy seconds summed over engines."""

    generate: float
    reward: float
    learn: float
    sync: float
    other: float
    switch: float
    engines_busy: float
    overlap: bool = False

    @property
    def step(self) -> float:
        """Seconds of the step; with `overlap` the learners work beside the sampling of a later batch."""
        first, second = self.generate + self.reward, self.learn
        work = max(first, second) if self.overlap else first + second
        return work + self.sync + self.other + self.switch


@dataclass(frozen=True)
class Service:
    """Schedule of a queue of calls: seconds, busy engine-seconds, and the calls of each engine in order."""

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


def amdahl(serial: float, threads: int) -> float:
    """Ratio of the time with `threads` threads to that with one (Amdahl 1967)."""
    return serial + (1 - serial) / threads


def calls(setup: Setup) -> list[range]:
    """Split the prompts into engine calls, as RolloutPool.chunks does."""
    size = 1
    if not setup.deterministic:
        share = -(-setup.prompts // setup.engines)
        size = max(1, min(share, setup.max_num_seqs // setup.group_size))
    return [range(i, min(i + size, setup.prompts)) for i in range(0, setup.prompts, size)]


def call_work(lengths: np.ndarray, slots: int) -> np.ndarray:
    """Return the (4,) work of a call: 1, decode steps, tokens, prompts. `lengths`: (prompts, G).

    Sequences beyond the engine's `slots` wait for a free one (continuous batching).
    """
    steps = lengths.max() if lengths.size <= slots else serve(lengths.ravel().tolist(), slots).seconds
    return np.array([1.0, steps, lengths.sum(), len(lengths)])


def generate(costs: EngineCosts, setup: Setup, lengths: np.ndarray) -> tuple[Service, np.ndarray]:
    """Return the schedule of a step's calls, and the (4,) work of the last engine, scaled by its slow-down."""
    work = np.array([call_work(lengths[r.start : r.stop], setup.max_num_seqs) for r in calls(setup)])
    cores, threads = setup.side_cores, setup.threads(setup.engines)
    factor = amdahl(costs.serial, threads)

    def speed(busy: int) -> float:
        return min(1.0, cores / (busy * threads)) if cores else 1.0

    per_unit = np.array([costs.per_call, costs.per_step, costs.per_token, costs.per_prompt])
    seconds = work @ per_unit * factor
    service = serve(seconds.tolist(), setup.engines, speed)
    last = max(service.calls, key=lambda indices: seconds[indices].sum() if indices else 0.0)
    alone = seconds[last].sum()
    return service, work[last].sum(axis=0) * (service.seconds / alone if alone else 1.0) * factor


def learn_work(setup: Setup, lengths: np.ndarray) -> np.ndarray:
    """Return the (6,) work for `learner_vector`, of each micro-batch's slowest rank, as collectives wait for it.

    Raises:
        UserError: fewer rows than learners.
    """
    ranks, g = setup.learners, setup.group_size
    if setup.rows < ranks:
        raise UserError(f"{setup.rows} completions a step are too few for {ranks} learners")
    rows = (-np.sort(-lengths)).tolist()  # longest first, as the batcher has them
    units = [Unit(tuple(range(i * g, i * g + g)), setup.prompt_tokens, tuple(row)) for i, row in enumerate(rows)]
    at_once = list(zip(*pack(units, ranks, setup.micro_tokens), strict=True))  # the k-th micro-batches of all ranks

    def slowest(what: Callable[[list[Unit]], int]) -> int:
        return sum(max(map(what, batches)) for batches in at_once)

    n = len(at_once)
    completions = slowest(lambda batch: sum(len(u.rows) for u in batch))
    images = slowest(lambda batch: len({u.rows[0] // g for u in batch}))  # parts of a prompt may meet again
    tokens = slowest(lambda batch: sum(sum(u.lengths) for u in batch))
    return np.array([1, n, completions, images, tokens, n * (ranks - 1) / ranks], dtype=float)


def learn_factor(serial: float, setup: Setup) -> float:
    """Return the slow-down of ranks that share cores, from their threads and from more threads than cores."""
    if not setup.side_cores:
        return 1.0
    threads = setup.threads(setup.learners)
    return amdahl(serial, threads) * max(1.0, setup.learners * threads / setup.side_cores)


def learner_vector(c: LearnerCosts, setup: Setup) -> np.ndarray:
    across = setup.gpus_per_node and setup.learners > setup.gpus_per_node and c.gather_across_nodes is not None
    gather = c.gather_across_nodes if across else c.gather
    return np.array([c.per_update, c.per_micro_batch, c.per_row, c.per_image, c.per_token, gather])


def push_work(setup: Setup, gb: float) -> np.ndarray:
    """Return the (3,) work of a push, in the order of `PushCosts`. Each further node of engines is sent a copy.

    Buckets are pipelined: gathering overlaps loading, so n buckets take n + 1 times the slower of these two stages,
    `per_gb`.
    """
    buckets = max(1.0, np.ceil(gb * 1e9 / (setup.bucket_mib << 20)))
    receivers = setup.engines
    if setup.gpus_per_node:
        receivers = -(-setup.engines * setup.tensor_parallel // setup.gpus_per_node)
    return np.array([1.0, gb * (1 + 1 / buckets), gb * (receivers - 1)])


def simulate_step(costs: StepCosts, setup: Setup, lengths: np.ndarray) -> StepTimes:
    """Simulate a step with completions of `lengths` (P, G), IQA prompts first, as the sampler draws them.

    Raises:
        UserError: fewer rows than learners.
    """
    service, _ = generate(costs.engine, setup, lengths)
    learn = learn_work(setup, lengths) @ learner_vector(costs.learner, setup)
    return StepTimes(
        generate=service.seconds,
        reward=costs.reward.per_batch + costs.reward.per_completion * setup.rows,
        learn=float(learn) * learn_factor(costs.learner.serial, setup),
        sync=float(push_work(setup, costs.model_gb) @ astuple(costs.push)),
        other=costs.other.per_step + costs.other.per_completion * setup.rows,
        switch=costs.switch if setup.colocated else 0.0,
        engines_busy=service.busy,
        overlap=setup.staleness > 0,
    )
