"""The ways of pushing weights by their name in `rollout.push`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tatar_dist.config.schema import Config
from tatar_dist.faults.waiting import Waits
from tatar_dist.run.failpoints import Failpoints
from tatar_dist.sync.cuda_ipc import IpcPush, IpcSender
from tatar_dist.sync.nccl import NcclPush, NcclSender
from tatar_dist.sync.object_store import ObjectStorePush, ObjectStoreSender
from tatar_dist.sync.push import WeightPush

SENDERS: dict[str, Callable[[Any, int, Failpoints], Any]] = {
    "object_store": ObjectStoreSender,
    "nccl": NcclSender,
    "cuda_ipc": IpcSender,
}
PUSHES: dict[str, Callable[[Config, Waits, Callable[..., None]], WeightPush]] = {
    "object_store": ObjectStorePush,
    "nccl": NcclPush,
    "cuda_ipc": IpcPush,
}


def weight_push(
    config: Config, waits: Waits | None = None, log: Callable[..., None] = lambda event, **fields: None
) -> WeightPush:
    """The controller's side of the way that `rollout.push` names."""
    return PUSHES[config.rollout.push](config, waits or Waits(), log)
