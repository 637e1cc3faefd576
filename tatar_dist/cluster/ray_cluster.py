"""Ray here or on a cluster, and the actors of a run: learners, engines, the reward actor.

The only file that makes Ray actors. On a CPU machine the actors share the cores: learners and engines take turns with
staleness 0, so each side has threads for all of them (`Cluster.threads`), and idle ones sleep; with staleness they work
at the same time, and each side has threads for half of the cores.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node, total_resources_per_node
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tatar_dist.cluster.nodes import read_nodes
from tatar_dist.cluster.ray_start import start_ray
from tatar_dist.cluster.reward import RemoteScorer, RewardScorer
from tatar_dist.config.schema import Config
from tatar_dist.errors import RunError, UserError
from tatar_dist.faults.waiting import TICK_S, Waits
from tatar_dist.learner.actor import Learner
from tatar_dist.learner.group import LearnerGroup
from tatar_dist.learner.transfer import IO
from tatar_dist.rollout.engine import RolloutEngine
from tatar_dist.rollout.options import COMMON_ENV, engine_environment
from tatar_dist.rollout.pool import RolloutPool
from tatar_dist.run.failpoints import Failpoints
from tatar_dist.run.gpus import check
from tatar_dist.run.process import VISIBLE, pin

FEWER_WAIT_S = 10.0  # for fewer learners: the nodes are there


def _with_absolute_paths(config: Config) -> Config:
    """Make output, model and preset absolute, as joined actors have another working directory."""
    model, preset = Path(config.model.path), Path(config.reward.preset)
    return replace(
        config,
        output=str(Path(config.output).absolute()) if config.output else config.output,
        model=replace(config.model, path=str(model.resolve()) if model.is_dir() else config.model.path),
        reward=replace(config.reward, preset=str(preset.resolve()) if preset.is_file() else config.reward.preset),
    )


class Cluster:
    """A connection to Ray and its actors; closing it ends them and, if started here, Ray.

    Args:
        log: takes events of the actors and nodes.
        overlap: learners and engines work at the same time.
        waits: what may end a wait for the actors made here.
    """

    def __init__(
        self,
        config: Config,
        log: Callable[..., None] = lambda event, **fields: None,
        overlap: bool = False,
        waits: Waits | None = None,
    ) -> None:
        self.config, self.log, self.waits = _with_absolute_paths(config), log, waits or Waits()
        self.address = config.cluster.address or os.environ.get("RAY_ADDRESS")
        self.gpu = config.cluster.gpus_per_node > 0
        self.colocated = config.cluster.placement == "colocated"
        self.cores = config.cluster.threads or len(os.sched_getaffinity(0))
        self._sides = 2 if overlap or config.cluster.pin_cores else 1
        self._actors: list[Any] = []
        self._learners: list[Any] = []
        self._bundles: PlacementGroup | None = None
        self._pool: RolloutPool | None = None
        self._asked = {"CPU": 0.0, "GPU": 0.0}
        self._own = not ray.is_initialized()
        if self._own:
            start_ray(self.config, self.address, self.cores)
        self._nodes = self._living()

    def smallest_gpu(self) -> float | None:
        """Check the GPUs of all nodes. Returns the GiB of the smallest; None on CPUs."""
        return check(read_nodes(), self.config.rollout.quantization == "fp8") if self.gpu else None

    def smallest_node(self) -> float:
        """Return the GiB of memory that Ray has on the smallest node with GPUs; inf without one."""
        return min((n["memory"] / 2**30 for n in total_resources_per_node().values() if n.get("GPU")), default=math.inf)

    def threads(self, processes: int) -> int:
        """Return the CPU threads of each of `processes` learners or engines that share the cores.

        A GPU node runs at most gpus_per_node of them. On CPUs several nodes may be hosts of one machine.
        """
        here = min(processes, self.config.cluster.gpus_per_node) if self.gpu else processes
        return max(1, self.cores // self._sides // here)

    def _pin(self, actor: Any, side: int, index: int, count: int) -> None:
        """Pin actor `index` to its share of half of the cores (0: engines') by `cluster.pin_cores`."""
        if self.config.cluster.pin_cores:
            actor.__ray_call__.remote(pin, side, index, count)

    @staticmethod
    def _living() -> dict[str, str]:
        """Return node id -> address of the nodes that Ray reports as alive."""
        return {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}

    def log_node_changes(self) -> None:
        """Log which nodes left and came since the last call."""
        before, self._nodes = self._nodes, self._living()
        for node in sorted(before.keys() - self._nodes.keys()):
            self.log("node/lost", node=node, host=before[node])
        for node in sorted(self._nodes.keys() - before.keys()):
            self.log("node/joined", node=node, host=self._nodes[node])

    def _actor(
        self,
        cls: type,
        *args: Any,
        cpus: float,
        gpus: float = 0,
        env: dict[str, str] | None = None,
        where: Any = "SPREAD",
    ) -> Any:
        # no restarts, no retries: a restarted actor would hold initial weights and answer as if nothing had happened
        # a second thread for what runs beside an actor's work: learners write checkpoints in it
        remote: Any = ray.remote(concurrency_groups={IO: 1})(cls) if issubclass(cls, Learner) else ray.remote(cls)
        # Ray sets it for actors with GPUs only; an actor without would see, and might use, those of all others
        variables = {**COMMON_ENV, **({} if gpus else {VISIBLE: ""}), **(env or {})}
        if Path(self.config.model.path).is_dir():
            variables["HF_HUB_OFFLINE"] = "1"  # the hub is not needed
        if not self.address:  # nodes of another cluster have their own paths
            variables["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        actor = remote.options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=where,
            runtime_env={"env_vars": variables},
        ).remote(*args)
        self._actors.append(actor)
        return actor

    def _reserve(self, what: str, count: int, cpus: float, gpus: int) -> None:
        """Raise UserError if the cluster lacks room for the actors: Ray would leave them pending."""
        has = ray.cluster_resources()
        for resource, amount, key in (("GPU", gpus, "cluster.gpus_per_node"), ("CPU", cpus, "cluster.*_cpus")):
            self._asked[resource] += amount * count
            if self._asked[resource] > has.get(resource, 0.0):
                advice = f"lower cluster.learners, rollout.engines or {key}"
                if resource == "GPU" and not has.get("GPU"):
                    advice = "train on CPUs (cluster.gpus_per_node=0), as configs/demo.yaml does for a tiny model"
                raise UserError(
                    f"{count} {what} and what was started before need {self._asked[resource]:g} {resource}s, Ray has "
                    f"{has.get(resource, 0.0):g}: add nodes, or {advice}"
                )
        rooms = [min(_fit(n, "GPU", gpus), _fit(n, "CPU", cpus)) for n in total_resources_per_node().values()]
        if sum(rooms) < count:
            raise UserError(
                f"{count} {what} of {gpus} GPUs and {cpus:g} CPUs each: no node is large enough for one, or together "
                f"the nodes hold only {sum(rooms)}"
            )

    def learners(self, count: int, again: bool = False) -> LearnerGroup:
        """Start `count` ranks in bundles of a placement group, packed by node or spread over nodes.

        Args:
            count: how many.
            again: a restart. Wait `cluster.node_wait_s` for a lost node, then start fewer ranks. Leave room for
                `rollout.min_engines` engines: those lost with the node must start, too, or the run ends.

        Raises:
            UserError: the cluster never had room for them. RunError: it has none any more.
        """
        c = self.config.cluster
        if not again:
            self._reserve("learner(s)", count, self._bundle()["CPU"], int(self.gpu))
        limit = c.node_wait_s if again else c.start_timeout_s
        placed = count if self._place(count, limit) else None
        if placed is None and again and c.elastic:
            placed = next((n for n in range(self._room(count - 1), 0, -1) if self._place(n, FEWER_WAIT_S)), None)
        if placed is None:
            missing = self._missing_engines()
            beside = f", beside {missing} engine(s) that must start again (rollout.min_engines)" if missing else ""
            raise RunError(
                f"{count} learners found no place within {limit:g} s: they "
                f"need {count * self._bundle()['CPU']:g} CPUs and {count * self.gpu} GPUs{beside}; free are {_free()}"
            )
        threads = self.threads(placed)
        env = {"OMP_NUM_THREADS": str(threads), **({} if self.gpu else {"DS_ACCELERATOR": "cpu"})}
        self._learners = [
            self._actor(
                Learner,
                self.config,
                rank,
                placed,
                cpus=c.learner_cpus,
                gpus=0.5 if self.gpu and self.colocated else float(self.gpu),
                env=env,
                where=PlacementGroupSchedulingStrategy(self._bundles, rank),
            )
            for rank in range(placed)
        ]
        for rank, learner in enumerate(self._learners):
            self._pin(learner, 1, rank, placed)
        return LearnerGroup(self.config, self._learners, threads, self.waits)

    def _place(self, count: int, timeout: float) -> bool:
        """Reserve `count` bundles for learners. Returns False without room within `timeout` seconds."""
        strategy = self.config.cluster.learner_placement.upper()
        self._bundles = placement_group([self._bundle()] * count, strategy=strategy)
        with self._places_for_engines() as held:
            needed, deadline = [g.ready() for g in (self._bundles, *held)], time.monotonic() + timeout
            while len(ray.wait(needed, num_returns=len(needed), timeout=TICK_S)[0]) < len(needed):
                self.waits.check()
                if time.monotonic() > deadline:
                    self._unplace()
                    return False
        return True

    @contextlib.contextmanager
    def _places_for_engines(self) -> Iterator[list[PlacementGroup]]:
        """Reserve places for the engines that must start until `rollout.min_engines` are alive."""
        missing = self._missing_engines()
        held = [placement_group([self._engine_needs()] * missing, strategy="PACK")] if missing else []
        try:
            yield held
        finally:
            for group in held:
                remove_placement_group(group)

    def _missing_engines(self) -> int:
        return self._pool.missing(self._living()) if self._pool and not self.colocated else 0

    def _engine_needs(self) -> dict[str, float]:
        gpus = self.config.rollout.tensor_parallel if self.gpu else 0
        return {"CPU": self.config.cluster.engine_cpus, **({"GPU": float(gpus)} if gpus else {})}

    def _bundle(self) -> dict[str, float]:
        """Return the resources of one learner and, colocated, of the engine beside it."""
        c = self.config.cluster
        cpus = c.learner_cpus + (c.engine_cpus if self.colocated else 0)
        return {"CPU": cpus, **({"GPU": 1.0} if self.gpu else {})}

    def _room(self, most: int) -> int:
        """Count the learners, 1 to `most`, that the free resources of the nodes can hold."""
        need = self._bundle()
        rooms = [min(_fit(n, r, a) for r, a in need.items()) for n in available_resources_per_node().values()]
        return max(1, min(most, sum(rooms)))

    def _unplace(self) -> None:
        if self._bundles is not None:
            remove_placement_group(self._bundles)
            self._bundles = None

    def end_learners(self) -> None:
        """Kill all ranks and release their places."""
        for actor in self._learners:
            _kill(actor)
            self._actors.remove(actor)
        self._learners = []
        self._unplace()
        self.log_node_changes()

    def engines(self, count: int, version: int = 0, cls: type[RolloutEngine] = RolloutEngine) -> RolloutPool:
        """Make a pool of `count` engines, spread over the nodes, without starting them."""
        r, c = self.config.rollout, self.config.cluster
        shared = self.colocated and self._bundles is not None  # an evaluation has engines only
        gpus = (0.5 if shared else r.tensor_parallel) if self.gpu else 0
        if not shared:
            self._reserve("engine(s)", count, c.engine_cpus, gpus)
        env = engine_environment(self.config, self.gpu, self.threads(count))

        def make(index: int) -> Any:
            # colocated with learner `index`; with fewer learners after a lost node some share
            where: Any = "SPREAD"
            if shared:
                where = PlacementGroupSchedulingStrategy(self._bundles, index % len(self._learners))
            engine = self._actor(cls, self.config, index, cpus=c.engine_cpus, gpus=gpus, env=env, where=where)
            self._pin(engine, 0, index, count)
            return engine

        places = lambda: len(self._learners) if shared else None  # noqa: E731
        self._pool = RolloutPool(self.config, count, make, version, self.log, self.waits, places)
        return self._pool

    def scorer(self) -> RemoteScorer:
        """Make the client of the reward actor; the actor starts at its first call."""
        c = self.config
        arguments = (c.reward, c.grpo, Failpoints(c.failpoints, c.output))
        make = lambda: self._actor(RewardScorer, *arguments, cpus=0)  # noqa: E731
        return RemoteScorer(make, c.rollout.call_timeout_s, self.log, self.waits)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            _kill(actor)
        self._unplace()
        if self._own:
            ray.shutdown()


def _kill(actor: Any) -> None:
    with contextlib.suppress(Exception):  # it may be dead
        ray.kill(actor)


def _fit(node: dict[str, float], resource: str, amount: float) -> int:
    """Count the actors that need `amount` of a resource and fit on a node."""
    return int(node.get(resource, 0.0) / amount + 1e-9) if amount else 1 << 30


def _free() -> str:
    free = ray.available_resources()
    return f"{free.get('CPU', 0.0):g} CPUs and {free.get('GPU', 0.0):g} GPUs on {len(Cluster._living())} node(s)"
