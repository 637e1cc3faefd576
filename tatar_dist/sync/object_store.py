"""Weight push by Ray's object store: CPUs and GPUs, across nodes, engines that come late.

Full tensors are cut into buckets, which is what travels at once: `{name: Wire}`. bfloat16 has no numpy type, so tensors
travel as raw bytes with their dtype and shape.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from tatar_dist.config.schema import Config
from tatar_dist.errors import LearnersFailed
from tatar_dist.faults.waiting import TICK_S, Waits, error_of, first_line
from tatar_dist.run.failpoints import Failpoints
from tatar_dist.sync.push import PushResult, Round

if TYPE_CHECKING:
    from tatar_dist.learner.group import LearnerGroup

warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # from_wire


@dataclass(frozen=True)
class Wire:
    """A tensor on the wire: `data` (nbytes,) uint8, torch `dtype` by name, its full `shape`."""

    data: np.ndarray
    dtype: str
    shape: tuple[int, ...]


def to_wire(tensor: Any) -> Wire:
    import torch

    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return Wire(flat.numpy(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def from_wire(wire: Wire) -> Any:
    """View a tensor without a copy. Read-only: writers into Ray's object store are killed."""
    import torch

    return torch.from_numpy(wire.data).view(getattr(torch, wire.dtype)).reshape(wire.shape)


def buckets(parameters: Iterable[tuple[str, Any]], bucket_bytes: int, sender: bool) -> Iterator[dict[str, Wire]]:
    """Bucket (name, full tensor) pairs to at most `bucket_bytes`; a larger tensor travels alone.

    Every rank must exhaust it, because making the tensors is collective; only the sender yields.
    """
    held: dict[str, Wire] = {}
    size = 0
    for name, tensor in parameters:
        if not sender:
            continue
        wire = to_wire(tensor)
        if held and size + wire.data.nbytes > bucket_bytes:
            yield held
            held, size = {}, 0
        held[name] = wire
        size += wire.data.nbytes
    if held:
        yield held


class ObjectStoreSender:
    """A learner rank's side."""

    def __init__(self, zero3: Any, rank: int, failpoints: Failpoints) -> None:
        self._zero3, self._rank, self._failpoints = zero3, rank, failpoints

    def buckets(self, bucket_bytes: int) -> Iterator[dict[str, Any]]:
        """Stream the weights in buckets of at least one tensor and about `bucket_bytes`. Collective.
        Rank 0 yields {"bucket": {name: Wire}}; the other ranks gather along and yield nothing."""
        self._failpoints.reach("learner.gather")
        for bucket in buckets(self._zero3.full_parameters(), bucket_bytes, self._rank == 0):
            yield {"bucket": bucket}


def load(model: Any, bucket: Mapping[str, Wire]) -> None:
    """Load one bucket into vLLM's model, on an engine worker."""
    model.load_weights((name, from_wire(wire)) for name, wire in bucket.items())


class ObjectStorePush:
    """The controller's side. One bucket is loaded at a time; the next one is gathered meanwhile."""

    def __init__(self, config: Config, waits: Waits, log: Callable[..., None]) -> None:
        self._bucket, self._limit = config.rollout.bucket_mib << 20, config.rollout.push_timeout_s
        self._waits, self._log = waits, log

    def push(self, learners: LearnerGroup, engines: Mapping[int, Any], version: int) -> PushResult:
        """Push (`WeightPush`). All buckets are consumed even if engines fail: it is collective."""
        push, sent = Round(engines, version, self._limit, self._waits, self._log), 0
        push.call("weight push", lambda _, e: e.start_update.remote(version))
        for bucket in stream(learners, self._bucket):
            sizes = push.call("weight push", lambda _, e, part=bucket: e.update.remote(part), given=bucket)
            sent += max(sizes, default=0)
        push.call("weight push", lambda _, e: e.finish_update.remote())
        return PushResult(sent, push.failed)


def stream(learners: LearnerGroup, bucket_bytes: int) -> Iterator[Any]:
    """Yield references to the buckets of rank 0 while all ranks gather.

    Raises:
        LearnersFailed: a rank died or failed, or the next bucket is late.
    """
    call = ("object_store", "buckets", bucket_bytes)
    others = [a.push_stream.options(num_returns="streaming").remote(*call) for a in learners.actors[1:]]
    lead = learners.actors[0].push_stream.options(num_returns="streaming", _generator_backpressure_num_objects=2)
    yield from _items(learners, lead.remote(*call))
    for stream_of_rank in others:
        for failed in _items(learners, stream_of_rank):  # they yield nothing, but an error comes as an item
            raise LearnersFailed(f"gathering weights: {first_line(error_of(failed) or RuntimeError('one item'))}")


def _items(learners: LearnerGroup, streaming: Any) -> Iterator[Any]:
    """Yield the references of a streaming call, each within the deadline."""
    timeout, since = learners.config.rollout.call_timeout_s, time.monotonic()
    while True:
        ready, _ = ray.wait([streaming], timeout=TICK_S, fetch_local=False)
        learners.waits.check()
        if not ready:
            if time.monotonic() - since > timeout:
                raise LearnersFailed(f"gathering weights: nothing for {timeout:g} s")
            continue
        try:
            reference = next(streaming)
        except StopIteration:
            return
        except ray.exceptions.RayError as e:
            raise LearnersFailed(f"gathering weights: {first_line(e)}") from e
        yield reference
        since = time.monotonic()
