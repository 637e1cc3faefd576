"""Weight pushes from learners to engines: the ways by name in `rollout.push` (README.md)."""

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

# the sender of a learner rank and the controller's side
WAYS: dict[
    str, tuple[Callable[[Any, int, Failpoints], Any], Callable[[Config, Waits, Callable[..., None]], WeightPush]]
]
WAYS = {
    "object_store": (ObjectStoreSender, ObjectStorePush),
    "nccl": (NcclSender, NcclPush),
    "cuda_ipc": (IpcSender, IpcPush),
}


def weight_push(
    config: Config, way: str, waits: Waits | None = None, log: Callable[..., None] = lambda event, **fields: None
) -> WeightPush:
    """Return the controller's side of `way`, a key of WAYS (plan.push_way)."""
    return WAYS[way][1](config, waits or Waits(), log)
