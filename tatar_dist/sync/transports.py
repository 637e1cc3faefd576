"""The controller's side of the GPU weight pushes: written from vLLM 0.32's source, never run on a GPU.

`push(learners, engines, version)` loads the learners' weights into the engines, {index: actor handle}, and returns what
became of those that failed, {index: reason}, and the bytes each engine was sent. An engine that failed half-way holds
neither the old weights nor the new: it must be restarted, and gets the current weights through the object store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import ray

from tatar_dist.config.schema import Config
from tatar_dist.errors import LearnersFailed
from tatar_dist.faults.waiting import first_line

if TYPE_CHECKING:
    from tatar_dist.learner.group import LearnerGroup

Engines = dict[int, Any]


class Push(Protocol):
    def push(self, learners: LearnerGroup, engines: Engines, version: int) -> tuple[dict[int, str], int]: ...


class _Round:
    """One push: the engines still in it, and why the others are not."""

    def __init__(self, engines: Engines, limit: float) -> None:
        self.left, self.failed, self.limit = dict(engines), dict[int, str](), limit

    def call(self, what: str, call: Callable[[int, Any], Any]) -> None:
        self.wait(what, {i: call(i, engine) for i, engine in self.left.items()})

    def wait(self, what: str, calls: dict[int, Any]) -> None:
        """Until all have answered or the limit is over; engines that died, failed or are late leave the push."""
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=self.limit) if calls else None
        for i, ref in calls.items():
            try:
                ray.get(ref, timeout=0)
            except ray.exceptions.GetTimeoutError:
                self.lose(i, f"{what}: no answer within {self.limit:g} s")
            except ray.exceptions.RayError as e:
                self.lose(i, f"{what}: {first_line(e)}")

    def lose(self, index: int, reason: str) -> None:
        self.failed[index] = reason
        self.left.pop(index, None)


def _learners(learners: LearnerGroup, refs: list[Any], limit: float, what: str) -> list[Any]:
    """Raises LearnersFailed: a rank died, failed or is late, and which one."""
    try:
        return learners.wait(refs, limit)
    except LearnersFailed as e:
        raise LearnersFailed(f"{what}: {e}") from e
    except OSError as e:  # a connection, here: no full disk
        raise LearnersFailed(f"{what}: {first_line(e)}") from e


class NcclPush:
    """One NCCL group of learner rank 0 and every worker of every engine; made anew when the engines change.

    NCCL knows no partial failure: when a receiver dies during the broadcast, both sides abort at their deadlines and
    every engine of the group has failed, the dead one first among the reasons.
    """

    def __init__(self, config: Config) -> None:
        self.limit, self.bucket = config.rollout.push_timeout_s, config.rollout.bucket_mib << 20
        self.workers = config.rollout.tensor_parallel  # of one engine
        self._group: tuple[Any, Engines] = (None, {})  # who is in it: the sender and the engines

    def push(self, learners: LearnerGroup, engines: Engines, version: int) -> tuple[dict[int, str], int]:
        sync, lead = _Round(engines, self.limit), learners.actors[0]
        sync.call("starting a weight push", lambda i, e: e.start_update.remote(version))
        if not sync.left:
            return sync.failed, 0
        if (lead, sync.left) != self._group:  # handles: a restarted engine or learner is another one
            self._connect(learners, sync)
        if not sync.left:
            return sync.failed, 0
        (meta,) = _learners(learners, [lead.weight_metadata.remote()], self.limit, "weight metadata")
        calls = {i: e.nccl_update.remote(**meta, timeout_s=self.limit) for i, e in sync.left.items()}
        sends = [a.nccl_broadcast.remote(self.bucket, self.limit) for a in learners.actors]
        # each chunk has its own deadline on the sender; all of them together are bounded by the learners' calls
        (sent, problem), *_ = _learners(learners, sends, learners.config.rollout.call_timeout_s, "weight broadcast")
        sync.wait("weight push", calls)
        if problem or sync.failed:
            self._group = (None, {})
            for i in list(sync.left):
                sync.lose(i, f"weight push: {problem or 'another engine of the NCCL group failed'}")
        sync.call("finishing a weight push", lambda i, e: e.finish_update.remote())
        return sync.failed, sent

    def _connect(self, learners: LearnerGroup, sync: _Round) -> None:
        lead = learners.actors[0]
        (unique,) = _learners(learners, [lead.nccl_unique_id.remote()], self.limit, "NCCL")
        world = 1 + self.workers * len(sync.left)
        ranks = {i: 1 + n * self.workers for n, i in enumerate(sync.left)}
        joins = {i: e.nccl_join.remote(unique, ranks[i], world, self.bucket) for i, e in sync.left.items()}
        (problem,) = _learners(learners, [lead.nccl_join.remote(unique, world, self.limit)], 2 * self.limit, "NCCL")
        sync.wait("joining the NCCL group", joins)
        if problem or sync.failed:
            for i in list(sync.left):  # they are in a group that will never be whole
                sync.lose(i, f"joining the NCCL group: {problem or 'another engine did not'}")
        self._group = (lead, dict(sync.left))


class IpcPush:
    """Engines copy out of the memory of the learners whose GPUs they share; all chunks pass one after the other."""

    def __init__(self, config: Config) -> None:
        self.limit, self.bucket = config.rollout.push_timeout_s, config.rollout.bucket_mib << 20

    def push(self, learners: LearnerGroup, engines: Engines, version: int) -> tuple[dict[int, str], int]:
        sync, sent = _Round(engines, self.limit), 0
        sync.call("starting a weight push", lambda i, e: e.start_update.remote(version))
        while True:  # to the end, whoever fails: gathering is collective
            parts = _learners(
                learners, [a.ipc_next.remote(self.bucket) for a in learners.actors], self.limit, "gathering"
            )
            if parts[0] is None:
                break
            handles = {gpu: handle for part in parts for gpu, handle in part["ipc_handles"].items()}
            chunk = {**parts[0], "ipc_handles": handles}
            sent += sum(chunk["tensor_sizes"])
            sync.wait("weight push", {i: e.ipc_update.remote(chunk) for i, e in sync.left.items()})
        sync.call("finishing a weight push", lambda i, e: e.finish_update.remote())
        return sync.failed, sent


def gpu_push(config: Config) -> Push | None:
    """The transport of `rollout.push`; None: the pool's own, through the object store."""
    kinds: dict[str, Callable[[Config], Push]] = {"nccl": NcclPush, "cuda_ipc": IpcPush}
    kind = kinds.get(config.rollout.push)
    return kind(config) if kind else None
