"""All ZeRO-3 ranks, addressed as one: a call goes to all and fails with its first error."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tatar_dist.config.schema import Config
from tatar_dist.errors import LearnersFailed, RunError, UserError
from tatar_dist.faults.waiting import TICK_S, Waits, error_of, first_line
from tatar_dist.learner import transfer
from tatar_dist.learner.rendezvous import Rendezvous
from tatar_dist.learner.sharding import Shard
from tatar_dist.types import StepReport

DEATH_IS_KNOWN_S = 5.0
GPU_FULL = (
    ". The learners' GPUs are full: lower sft.micro_tokens or grpo.micro_tokens, set "
    "model.gradient_checkpointing=true, or add learners; `tatar-dist plan` estimates what fits"
)


class PendingUpdate:
    """An update that runs on the learners while the controller does other work."""

    def __init__(self, group: LearnerGroup, refs: list[Any]) -> None:
        self._group, self._refs = group, refs

    def over(self) -> bool:
        """Return whether all ranks have answered, without waiting. Raises as `result` if one failed."""
        done, waiting = ray.wait(self._refs, num_returns=len(self._refs), timeout=0)
        if any(error_of(ref) for ref in done):
            self.result()
        return not waiting

    def result(self) -> StepReport:
        """Wait for all ranks. Raises LearnersFailed."""
        report: StepReport = self._group.wait(self._refs)[0]
        return report


class LearnerGroup:
    """All ZeRO-3 ranks, addressed as one. Learners are a unit: an error of one is the step's."""

    def __init__(self, config: Config, actors: list[Any], threads: int, waits: Waits) -> None:
        self.config, self.actors, self.threads, self.waits = config, actors, threads, waits

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self.wait([getattr(a, method).remote(*args) for a in self.actors])

    def wait(self, refs: list[Any], timeout: float | None = None) -> list[Any]:
        """Return all results; raise any rank's first error at once: its peers would wait for it.

        Raises:
            LearnersFailed: a rank died, is late, or raised anything but a UserError, RunError or OSError.
        """
        try:
            limit = timeout or self.config.rollout.call_timeout_s
            return self.waits.gather(refs, limit, "learner rank", LearnersFailed)
        except ray.exceptions.GetTimeoutError as e:  # an OSError to Python; of a rank that waited for another
            raise LearnersFailed(_culprit(refs, e)) from e
        except (UserError, RunError, OSError):
            raise
        except ray.exceptions.RayTaskError as e:
            raise LearnersFailed(_culprit(refs, e)) from e

    def setup(self, stage: str, total_steps: int) -> list[dict[str, Any]]:
        """Load the model on all ranks within `cluster.start_timeout_s`. Returns where each runs."""
        limit = self.config.cluster.start_timeout_s
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        meeting: Any = ray.remote(Rendezvous)
        self._rendezvous = meeting.options(num_cpus=0, scheduling_strategy=here).remote()
        arguments = (self._rendezvous, stage, total_steps, self.threads)
        return self.wait([a.setup.remote(*arguments) for a in self.actors], limit)

    def sft_step(self, shards: list[Shard], step: int, global_tokens: int) -> StepReport:
        pairs = zip(self.actors, shards, strict=True)
        return self.wait([a.sft_step.remote(rows, step, global_tokens) for a, rows in pairs])[0]

    def sft_loss(self, shards: list[Shard]) -> dict[str, float]:
        return self.wait([a.sft_loss.remote(r) for a, r in zip(self.actors, shards, strict=True)])[0]

    def grpo_step(self, shards: list[Shard], step: int) -> PendingUpdate:
        """Start an update; the caller works on and then takes its result."""
        pairs = zip(self.actors, shards, strict=True)
        return PendingUpdate(self, [a.grpo_step.remote(rows, step) for a, rows in pairs])

    def check_weights(self) -> None:
        """Raise RunError if the weights give log-probabilities that are not finite."""
        self._all("check_weights")

    def save(self, directory: Path) -> transfer.Writing:
        """Take a snapshot on all ranks and write it below `directory` in the background.

        Raises:
            OSError: the disk has no room for it.
        """
        size = sum(self._all("save"))
        if size > shutil.disk_usage(directory).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
        limit, local = self.config.rollout.call_timeout_s, self.config.checkpoint.storage == "local"
        return transfer.Writing(lambda given_up: transfer.write(self.actors, directory, local, limit, given_up))

    def load(self, directory: Path, saved_ranks: int) -> None:
        """Restore the checkpoint that any number `saved_ranks` of ranks wrote. Call after `setup`."""
        source: str | None = str(directory)
        if self.config.checkpoint.storage == "local":
            transfer.send(self.actors, directory, saved_ranks, self.config.rollout.call_timeout_s)
            source = None
        self._all("load", source, saved_ranks)


def _culprit(refs: list[Any], error: Exception) -> str:
    """Name the rank at fault: a dead rank's peers lose connections before Ray reports the death.

    For a GPU without memory, add which keys to set.
    """
    deadline = time.monotonic() + DEATH_IS_KNOWN_S
    waiting = list(refs)
    while waiting and time.monotonic() < deadline:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=TICK_S)
        for ref in done:
            if isinstance(cause := error_of(ref), ray.exceptions.RayActorError):
                return f"learner rank {refs.index(ref)} died: {first_line(cause)}"
    full = type(getattr(error, "cause", None)).__name__ == "OutOfMemoryError"  # of torch
    return first_line(error) + (GPU_FULL if full else "")
