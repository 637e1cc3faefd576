"""Weight push by Ray's object store: CPUs and GPUs, across nodes, engines that come late.

Full tensors are cut into buckets, which is what travels at once: `{name: Wire}`. bfloat16 has no numpy type, so tensors
travel as raw bytes with their dtype and shape. On the way out of a GPU and into one they lie in pinned memory, which
torch keeps and gives again once its copy is done: the copies of one bucket run while Ray stores the one before.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from tatar_dist.config.schema import Config
from tatar_dist.errors import LearnersFailed, PushCutShort
from tatar_dist.faults.waiting import TICK_S, Waits, error_of, first_line
from tatar_dist.run.failpoints import Failpoints
from tatar_dist.sync.push import PushResult, Round

if TYPE_CHECKING:
    from tatar_dist.learner.group import LearnerGroup

warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # from_wire
PIECE = 1 << 20  # bytes; Ray copies more at once with six threads
STORED, AHEAD = 2, 2  # buckets that wait in the store, and with engines: one is loaded, Ray fetches the other


@dataclass(frozen=True)
class Wire:
    """A tensor on the wire: `data` (nbytes,) uint8, torch `dtype` by name, its full `shape`.

    `idle`: no engine computes on the cores of the sender, so that Ray's six threads do not wait for each other.
    """

    data: np.ndarray
    dtype: str
    shape: tuple[int, ...]
    idle: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        step = max(PIECE, self.data.nbytes * self.idle)
        pieces = [self.data[i : i + step] for i in range(0, max(1, self.data.nbytes), step)]
        return joined, (pieces, self.dtype, self.shape)


def joined(pieces: list[np.ndarray], dtype: str, shape: tuple[int, ...]) -> Wire:
    """View pieces that Ray has put next to each other as one; others are copied."""
    at = np.array([p.ctypes.data for p in pieces])
    if np.array_equal(np.diff(at), [p.nbytes for p in pieces[:-1]]):
        size = sum(p.nbytes for p in pieces)
        return Wire(np.lib.stride_tricks.as_strided(pieces[0], (size,), writeable=False), dtype, shape)
    return Wire(np.concatenate(pieces), dtype, shape)


def staged(tensor: Any, device: Any) -> Any:
    """Start a copy from or to a GPU through pinned memory; on a CPU return the tensor itself."""
    if tensor.device.type == device.type:
        return tensor
    try:
        if tensor.device.type != "cpu":
            return tensor.to(device, non_blocking=True)  # torch pins what it copies to a CPU
        tensor = tensor.pin_memory()
    except RuntimeError as e:
        warnings.warn(f"weights are pushed through pageable memory, which is slower: {first_line(e)}", stacklevel=2)
        return tensor.to(device)
    return tensor.to(device, non_blocking=True)


def to_wire(tensor: Any) -> Wire:
    """View a tensor; one of a GPU is copied, and there once the current stream is synchronised."""
    import torch

    flat = staged(tensor.detach().contiguous(), torch.device("cpu")).reshape(-1).view(torch.uint8)
    name = str(tensor.dtype).removeprefix("torch.")
    return Wire(flat.numpy(), name, tuple(tensor.shape), idle=tensor.device.type == "cuda")


def from_wire(wire: Wire) -> Any:
    """View a tensor without a copy. Read-only: writers into Ray's object store are killed."""
    import torch

    return torch.from_numpy(wire.data).view(getattr(torch, wire.dtype)).reshape(wire.shape)


def buckets(parameters: Iterable[tuple[str, Any]], sizes: Iterator[int], sender: bool) -> Iterator[dict[str, Wire]]:
    """Bucket (name, full tensor) pairs to at most the next of `sizes` bytes.

    A larger tensor travels alone. Every rank must exhaust it, because making the tensors is collective; only the sender
    yields.
    """
    held: dict[str, Wire] = {}
    size, limit = 0, next(sizes)
    for name, tensor in parameters:
        if not sender:
            continue
        if held and size + tensor.nbytes > limit:
            yield held
            held, size, limit = {}, 0, next(sizes)
        held[name] = to_wire(tensor)
        size += tensor.nbytes
    if held:
        yield held


def copied(made: Iterable[dict[str, Wire]]) -> Iterator[dict[str, Wire]]:
    """Yield each bucket once it is copied from the GPU; the next one is copied meanwhile."""
    import torch

    before: dict[str, Wire] = {}
    for bucket in made:
        if before:
            yield before
        torch.cuda.current_stream().synchronize()
        before = bucket
    if before:
        yield before


class ObjectStoreSender:
    """A learner rank's side."""

    def __init__(self, zero3: Any, rank: int, failpoints: Failpoints) -> None:
        self._zero3, self._rank, self._failpoints = zero3, rank, failpoints

    def buckets(self, bucket_bytes: int) -> Iterator[dict[str, Any]]:
        """Stream the weights in buckets, `bucket_bytes` of them in flight. Collective.

        Two are stored and AHEAD with the engines; the first ones are smaller, so that engines start early. Rank 0
        yields {"bucket": {name: Wire}}; the other ranks gather along and yield nothing.
        """
        self._failpoints.reach("learner.gather")
        part = bucket_bytes // (STORED + AHEAD)
        sizes = chain((part // 4, part // 2), repeat(part))
        made = buckets(self._zero3.full_parameters(), sizes, self._rank == 0)
        for bucket in copied(made) if self._zero3.device.type == "cuda" else made:
            yield {"bucket": bucket}


def load(model: Any, bucket: Mapping[str, Wire], device: Any) -> None:
    """Load one bucket into vLLM's model on `device`, on an engine worker."""
    model.load_weights((name, staged(from_wire(wire), device)) for name, wire in bucket.items())


class ObjectStorePush:
    """The controller's side. Gathering, storing, fetching and loading run beside each other."""

    def __init__(self, config: Config, waits: Waits, log: Callable[..., None]) -> None:
        self._bucket, self._limit = config.rollout.bucket_mib << 20, config.rollout.push_timeout_s
        self._waits, self._log = waits, log

    def push(self, learners: LearnerGroup, engines: Mapping[int, Any], version: int) -> PushResult:
        """Push (`WeightPush`). All buckets are consumed even if engines fail: it is collective."""
        push, sent = Round(engines, version, self._limit, self._waits, self._log), 0
        weights = stream(learners, self._bucket)  # they gather while the engines start
        queued = deque([(push.ask(lambda _, e: e.start_update.remote(version)), None)])
        try:
            for bucket in weights:
                queued.append((push.ask(lambda _, e, part=bucket: e.update.remote(part)), bucket))
                if len(queued) == AHEAD:
                    sent += _bytes(push, *queued.popleft())
            finish = push.ask(lambda _, e: e.finish_update.remote())
            sent += sum(_bytes(push, *calls) for calls in queued)
        except LearnersFailed as e:
            push.ask(lambda _, engine: engine.abandon_update.remote())  # after the calls that it was sent before
            raise PushCutShort(str(e), push.failed) from e
        push.wait("weight push", finish)
        return PushResult(sent, push.failed)


def _bytes(push: Round, calls: Mapping[int, Any], bucket: Any) -> int:
    """Wait for a bucket's calls. Returns the bytes that each engine loaded, 0 for the start."""
    return max((size or 0 for size in push.wait("weight push", calls, given=bucket)), default=0)


def stream(learners: LearnerGroup, bucket_bytes: int) -> Iterator[Any]:
    """Let all ranks gather; the returned iterator gives references to the buckets of rank 0.

    Raises:
        LearnersFailed: (the iterator) a rank died or failed, or the next bucket is late.
    """
    call = ("object_store", "buckets", bucket_bytes)
    others = [a.push_stream.options(num_returns="streaming").remote(*call) for a in learners.actors[1:]]
    options = {"num_returns": "streaming", "_generator_backpressure_num_objects": STORED}
    return _references(learners, learners.actors[0].push_stream.options(**options).remote(*call), others)


def _references(learners: LearnerGroup, lead: Any, others: list[Any]) -> Iterator[Any]:
    yield from _items(learners, lead)
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
