"""Ray on this machine or a cluster it joins, and the actors of a run: learners, engines, the reward actor.

The only file that makes Ray actors. On a CPU machine the actors share the cores: learners and engines take turns with
staleness 0, so each side has threads for all of them (`Cluster.threads`), and idle ones sleep.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from tatar_dist.config import Config
from tatar_dist.errors import UserError
from tatar_dist.learner.actor import Learner
from tatar_dist.learner.group import LearnerGroup
from tatar_dist.rewards.actor import RewardScorer
from tatar_dist.rollout.engine import RolloutEngine
from tatar_dist.rollout.pool import RolloutPool

COMMON_ENV = {
    "TOKENIZERS_PARALLELISM": "false",
    # an idle OpenMP pool must not spin on cores that another process was handed
    "OMP_WAIT_POLICY": "PASSIVE",
    "KMP_BLOCKTIME": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}
CPU_ENGINE_ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_TARGET_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def _require_token() -> None:
    """Token authentication for the Ray we start: nobody else on this machine may submit work to it."""
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        ray._raylet.Config.initialize("")  # Ray cached the mode when it was imported


def _with_absolute_paths(config: Config) -> Config:
    """The config with absolute model and preset: actors of a joined cluster have a working directory of their own."""
    model, preset = Path(config.model.path), Path(config.reward.preset)
    found = config
    if model.is_dir():
        found = replace(found, model=replace(found.model, path=str(model.resolve())))
    if preset.is_file():
        found = replace(found, reward=replace(found.reward, preset=str(preset.resolve())))
    return found


class Cluster:
    """A connection to Ray and the actors made through it; closing it ends them and, if started here, Ray."""

    def __init__(self, config: Config) -> None:
        self.config = _with_absolute_paths(config)
        self.address = config.cluster.address or os.environ.get("RAY_ADDRESS")
        self.gpu = config.cluster.gpus_per_node > 0
        self.cores = config.cluster.threads or len(os.sched_getaffinity(0))
        self._actors: list[Any] = []
        self._asked = {"CPU": 0.0, "GPU": 0.0}
        self._own = not ray.is_initialized()
        if self._own:
            self._start()

    def _start(self) -> None:
        c = self.config.cluster
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if self.address:
                ray.init(address=self.address, **quiet)
                return
            _require_token()
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            need = 2 + max(1, c.learners) * c.learner_cpus + max(1, self.config.rollout.engines) * c.engine_cpus
            ray.init(
                num_cpus=max(self.cores, int(need + 1)),  # logical: processes on a laptop take turns on its cores
                include_dashboard=False,
                object_store_memory=c.object_store_mib << 20,
                **quiet,
            )
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as e:
            raise UserError(
                f"Ray did not start: {str(e).strip().splitlines()[0]} (cluster.address={self.address})"
            ) from e

    def threads(self, processes: int) -> int:
        """CPU threads for each of `processes` equal processes that work at the same time."""
        return max(1, self.cores // processes)

    def _actor(self, cls: type, *args: Any, cpus: float, gpus: float = 0, env: dict[str, str] | None = None) -> Any:
        # no restarts, no retries: a restarted actor would hold initial weights and answer as if nothing had happened
        remote: Any = ray.remote(cls)
        variables = {**COMMON_ENV, **(env or {})}
        if Path(self.config.model.path).is_dir():
            variables["HF_HUB_OFFLINE"] = "1"  # there is nothing to ask the hub for
        if not self.address:  # elsewhere, paths are that machine's or that job's own
            variables["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        actor = remote.options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, runtime_env={"env_vars": variables}
        ).remote(*args)
        self._actors.append(actor)
        return actor

    def _reserve(self, what: str, count: int, cpus: float, gpus: int) -> None:
        """Raises UserError where Ray could never place the actors: it would leave them waiting without a word."""
        has = ray.cluster_resources()
        for resource, amount, key in (("GPU", gpus, "cluster.gpus_per_node"), ("CPU", cpus, "cluster.*_cpus")):
            self._asked[resource] += amount * count
            if self._asked[resource] > has.get(resource, 0.0):
                raise UserError(
                    f"{count} {what} and what was started before need {self._asked[resource]:g} {resource}s, Ray has "
                    f"{has.get(resource, 0.0):g}: add nodes, or lower cluster.learners, rollout.engines or {key}"
                )

    def learners(self, count: int) -> LearnerGroup:
        c = self.config.cluster
        self._reserve("learner(s)", count, c.learner_cpus, int(self.gpu))
        threads = self.threads(count)
        env = {} if self.gpu else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        env |= {"OMP_NUM_THREADS": str(threads)}
        if not self.address:
            env |= {"GLOO_SOCKET_IFNAME": "lo"}
        actors = [
            self._actor(Learner, self.config, rank, count, cpus=c.learner_cpus, gpus=int(self.gpu), env=env)
            for rank in range(count)
        ]
        return LearnerGroup(self.config, actors, threads, local=not self.address)

    def engines(self, count: int, version: int = 0, cls: type[RolloutEngine] = RolloutEngine) -> RolloutPool:
        r = self.config.rollout
        if r.tensor_parallel > 1:
            raise UserError(
                f"rollout.tensor_parallel={r.tensor_parallel}: only 1 runs so far; use more engines, each on one GPU"
            )
        gpus = r.tensor_parallel if self.gpu else 0
        self._reserve("engine(s)", count, self.config.cluster.engine_cpus, gpus)
        env = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(r.cpu_kv_cache_gib),
            "OMP_NUM_THREADS": str(self.threads(count)),
            **({} if self.gpu else CPU_ENGINE_ENV),
        }
        actors = [
            self._actor(cls, self.config, i, cpus=self.config.cluster.engine_cpus, gpus=gpus, env=env)
            for i in range(count)
        ]
        return RolloutPool(self.config, actors, version)

    def reward_actor(self) -> Any:
        return self._actor(RewardScorer, self.config.reward, self.config.grpo, cpus=0)

    def release(self) -> None:
        """End the actors made through this object; Ray stays."""
        for actor in self._actors:
            with contextlib.suppress(Exception):  # one that died already needs no killing
                ray.kill(actor)
        self._actors.clear()
        self._asked = dict.fromkeys(self._asked, 0.0)

    def close(self) -> None:
        self.release()
        if self._own:
            ray.shutdown()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
