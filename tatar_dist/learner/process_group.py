"""The learners' process group: `init_process_group`, and the store torch.distributed uses.

The store calls a `Rendezvous` actor: no port listens, and every call carries the cluster's token.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist

from tatar_dist.config.schema import ClusterConfig
from tatar_dist.errors import LearnersFailed
from tatar_dist.learner.backend import start_backend
from tatar_dist.run.process import check_gpu, interface_of

log = logging.getLogger(__name__)


def local_device(c: ClusterConfig) -> torch.device:
    """Return the first visible GPU, else the CPU. Raises UserError if a GPU is configured."""
    found = torch.cuda.is_available()
    check_gpu(c.gpus_per_node, found)
    return torch.device("cuda", 0) if found else torch.device("cpu")


def init_process_group(rendezvous: Any, rank: int, world_size: int, device: torch.device, c: ClusterConfig) -> Any:
    """Start torch.distributed and DeepSpeed: gloo on CPU, NCCL on GPUs. Returns the store.

    Keep the store: torch calls into it, but does not keep its Python part alive. Every collective of the run fails
    after `cluster.collective_timeout_s`. gloo stays on loopback on a single node, else it takes the interface of the
    node's address in the cluster (a host's name may resolve to loopback). NCCL is only told of
    `cluster.network_interface`.

    Raises:
        LearnersFailed: naming ranks that did not come within half of `cluster.start_timeout_s`.
    """
    # half: late ranks are named here, before whoever waits for this call gives up on all of them
    store = RayStore(rendezvous, c.start_timeout_s / 2)
    hosts = store.join(rank, world_size, ray.get_runtime_context().get_node_id())
    gloo = c.network_interface or interface_of(ray.util.get_node_ip_address())
    if device.type == "cpu" and len(set(hosts)) == 1:
        gloo = "lo"
    if gloo:
        os.environ["GLOO_SOCKET_IFNAME"] = gloo
    if c.network_interface:
        os.environ["NCCL_SOCKET_IFNAME"] = c.network_interface
    wait = timedelta(seconds=c.collective_timeout_s)
    start_backend(store, rank, world_size, device, wait)
    if c.zero_hpz_partition_size > 1:
        share_within_nodes(hosts, rank, c.zero_hpz_partition_size, wait)
    return store


def share_within_nodes(hosts: Sequence[str], rank: int, size: int, timeout: timedelta) -> None:
    """Make groups of `size` ranks of a node that keep a copy of all weights (hpZ). Collective.

    DeepSpeed takes the group that it finds. Its own would have no timeout and consecutive ranks, wherever they are, and
    the reference model, for which it makes one again, would fail (DeepSpeed #4901). No group is made where `size` does
    not divide the ranks of every node: fewer learners came back after a lost node.
    """
    from deepspeed.utils import groups

    nodes: dict[str, list[int]] = {}
    for r, host in enumerate(hosts):
        nodes.setdefault(host, []).append(r)
    if any(len(ranks) % size for ranks in nodes.values()):
        if rank == 0:
            counts = ", ".join(str(len(ranks)) for ranks in nodes.values())
            log.warning("cluster.zero_hpz_partition_size=%d does not divide the ranks of nodes (%s): off", size, counts)
        return
    groups._create_zero_param_parallel_group = lambda _: None
    for block in (ranks[i : i + size] for ranks in nodes.values() for i in range(0, len(ranks), size)):
        group = dist.new_group(block, timeout=timeout)  # all ranks make all groups, in the same order
        if rank in block:
            groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = group


class RayStore(dist.Store):
    """A rank's view of a `Rendezvous`. Every wait ends within `timeout_s`, with DistStoreError."""

    def __init__(self, rendezvous: Any, timeout_s: float) -> None:
        super().__init__()
        self._rendezvous, self._timeout_s = rendezvous, timeout_s

    def _ask(self, method: str, *args: Any) -> Any:
        return ray.get(getattr(self._rendezvous, method).remote(*args), timeout=self._timeout_s)

    def _get(self, keys: Sequence[str], timeout_s: float) -> list[bytes]:
        call = self._rendezvous.get.remote(list(keys), timeout_s)
        values: list[bytes] | None = ray.get(call, timeout=timeout_s + self._timeout_s)
        if values is None:
            raise dist.DistStoreError(f"{', '.join(self._ask('missing', list(keys)))}: not set within {timeout_s:g} s")
        return values

    def set(self, key: str, value: bytes | str) -> None:
        self._ask("set", key, value.encode() if isinstance(value, str) else value)

    def get(self, key: str) -> bytes:
        return self._get([key], self._timeout_s)[0]

    def add(self, key: str, value: int) -> int:
        return self._ask("add", key, value)

    def check(self, keys: list[str]) -> bool:
        return not self._ask("missing", keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._get(keys, self._timeout_s if timeout is None else timeout.total_seconds())

    def delete_key(self, key: str) -> bool:
        return self._ask("delete", key)

    def clone(self) -> RayStore:
        """Return itself: an actor's calls share a connection, and torch would not keep a copy."""
        return self

    deleteKey = delete_key  # what torch's C++ side calls it

    def join(self, rank: int, world_size: int, host: str) -> list[str]:
        """Return each rank's `host` once all are here. Raises LearnersFailed that names late ones."""
        self.set(f"host/{rank}", host)
        keys = [f"host/{r}" for r in range(world_size)]
        try:
            return [h.decode() for h in self._get(keys, self._timeout_s)]
        except dist.DistStoreError:
            late = [int(k.removeprefix("host/")) for k in self._ask("missing", keys)]
            raise LearnersFailed(
                f"learner rank(s) {late} did not join the process group within {self._timeout_s:g} s"
            ) from None
