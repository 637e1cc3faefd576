"""Ranks meet through a Ray actor: gloo groups stand on it, late ranks are named, and no socket is left that answers."""

from __future__ import annotations

import os
import socket
import threading
from datetime import timedelta

import pytest
import ray
import torch.distributed

from tatar_dist.errors import RunError
from tatar_dist.learner.process_group import RayStore, share_within_nodes
from tatar_dist.learner.rendezvous import Rendezvous, listening, silence
from tatar_dist.rollout.options import COMMON_ENV

pytestmark = pytest.mark.usefixtures("shared_ray")
AS_OURS = {"env_vars": COMMON_ENV}


@pytest.fixture
def rendezvous():
    return ray.remote(Rendezvous).options(num_cpus=0, runtime_env=AS_OURS).remote()


@ray.remote(num_cpus=1, runtime_env=AS_OURS)
class Rank:
    def __init__(self, rendezvous, rank, timeout_s):
        self.store, self.rank = RayStore(rendezvous, timeout_s), rank

    def join(self, world_size):
        return self.store.join(self.rank, world_size, f"host-{self.rank}")

    def sums(self, world_size):
        """The sum of all ranks in the default group and in a second one; ports opened on the way."""
        import torch
        import torch.distributed as dist

        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        before = listening()
        wait = timedelta(seconds=300)
        dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=world_size, timeout=wait)
        self.opened = listening() - before
        return self._sum(), self._sum(dist.new_group(list(range(world_size)))), torch.get_num_threads() > 0

    def _sum(self, group=None):
        import torch
        import torch.distributed as dist

        total = torch.tensor(self.rank)
        dist.all_reduce(total, group=group)
        return int(total)

    def ports(self):
        ports = []
        for fd in self.opened:
            with socket.socket(fileno=os.dup(fd)) as s:
                ports.append(s.getsockname()[1])
        return ports

    def silence(self):
        silence(self.opened)

    def again(self):
        return self._sum()

    def share(self, hosts, size, timeout_s):
        """The ranks of this rank's node and the timeout of their group; None without a group."""
        import torch.distributed as dist
        from deepspeed.utils import groups

        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        share_within_nodes(hosts, self.rank, size, timedelta(seconds=timeout_s))
        if (group := groups._ZERO_PARAM_INTRA_PARALLEL_GROUP) is None:
            return None
        groups._create_zero_param_parallel_group(size)  # by DeepSpeed, for every model: it must not make another
        assert group is groups._get_zero_param_intra_parallel_group()
        limit = group._get_backend(torch.device("cpu")).options._timeout
        return dist.get_process_group_ranks(group), limit.total_seconds()


def answers(port):
    with socket.socket() as s:
        s.settimeout(2)
        return s.connect_ex(("127.0.0.1", port)) == 0


def test_gloo_groups_stand_on_it_and_their_listeners_can_be_silenced(rendezvous):
    ranks = [Rank.remote(rendezvous, r, 300) for r in range(3)]
    assert ray.get([r.join.remote(3) for r in ranks], timeout=300) == [["host-0", "host-1", "host-2"]] * 3
    assert ray.get([r.sums.remote(3) for r in ranks], timeout=300) == [(3, 3, True)] * 3
    ports = sum(ray.get([r.ports.remote() for r in ranks]), [])
    assert len(ports) >= 3 and all(answers(p) for p in ports)  # the hole: gloo accepts anybody
    ray.get([r.silence.remote() for r in ranks])
    assert not any(answers(p) for p in ports)
    assert ray.get([r.again.remote() for r in ranks], timeout=300) == [3, 3, 3]


def test_ranks_of_a_node_share_a_copy_wherever_ray_put_them(rendezvous):
    ranks = [Rank.remote(rendezvous, r, 300) for r in range(4)]
    ray.get([r.sums.remote(4) for r in ranks], timeout=300)

    def shared(hosts, size):
        return ray.get([r.share.remote(hosts, size, 77) for r in ranks], timeout=300)

    assert shared("abba", 2) == [([0, 3], 77), ([1, 2], 77), ([1, 2], 77), ([0, 3], 77)]
    assert shared("aaaa", 2) == [([0, 1], 77), ([0, 1], 77), ([2, 3], 77), ([2, 3], 77)]
    assert shared("abbb", 2) == [None] * 4  # as fewer came back


def test_a_rank_that_does_not_come_is_named(rendezvous):
    ranks = [Rank.remote(rendezvous, r, 5) for r in (0, 2)]
    ray.get([actor.__ray_ready__.remote() for actor in (rendezvous, *ranks)])
    with pytest.raises(RunError, match=r"rank\(s\) \[1\] did not join the process group within 5 s"):
        ray.get([r.join.remote(3) for r in ranks], timeout=300)


def test_store_does_what_a_store_does(rendezvous):
    RayStore(rendezvous, 300).check(["a"])  # the actor is up
    store = RayStore(rendezvous, 5)
    store.set("a", "x")
    assert store.get("a") == b"x"
    assert store.check(["a"]) and not store.check(["a", "b"])
    assert store.add("n", 2) == 2 and store.add("n", -5) == -3 and store.get("n") == b"-3"
    assert store.delete_key("a") and not store.delete_key("a")
    with pytest.raises(Exception, match="late: not set within 5 s"):
        store.get("late")
    threading.Timer(1, lambda: store.set("late", b"1")).start()
    store.wait(["late", "n"], timedelta(seconds=300))
    copy = torch.distributed.PrefixStore("group", store).clone()  # NCCL's watchdog works on one
    copy.set("a", b"y")
    assert copy.get("a") == store.get("group/a") == b"y"
