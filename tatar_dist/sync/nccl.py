"""The weight push by NCCL between GPUs: written from vLLM 0.32's source, never run on a GPU.

Tensors are gathered and packed on the default stream: gathering inside vLLM's own side streams can deadlock. Chunks are
cut where vLLM's receiver cuts them, after the tensor that exceeds `bucket_bytes`.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from tatar_dist.config.schema import Config
from tatar_dist.errors import RunError
from tatar_dist.faults.waiting import Waits, first_line
from tatar_dist.run.failpoints import Failpoints
from tatar_dist.sync.push import PushResult, Round, ask_learners

if TYPE_CHECKING:
    from tatar_dist.learner.group import LearnerGroup

POLL_S = 0.005


class NcclSender:
    """A learner rank's side. Rank 0 sends, the others gather along."""

    def __init__(self, zero3: Any, rank: int, failpoints: Failpoints) -> None:
        self._zero3, self._rank = zero3, rank
        self._communicator: Any = None  # of rank 0 with all workers of all engines

    def metadata(self) -> dict[str, list[Any]]:
        """Return names, dtypes and shapes of all weights, in the order in which they are sent."""
        names, dtypes, shapes = zip(*self._zero3.metadata(), strict=True)
        return {"names": list(names), "dtype_names": [str(d)[6:] for d in dtypes], "shapes": list(shapes)}

    def unique_id(self) -> str:
        """Make a group's identity and secret: it travels through Ray alone, and no store listens."""
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        return base64.b64encode(bytes(NCCLLibrary().ncclGetUniqueId().internal)).decode()

    def join(self, unique: str, world_size: int, timeout_s: float) -> str | None:
        """Form a new NCCL group of rank 0 and engines' workers. Returns what went wrong, or None.

        A thread waits for the workers, because NCCL cannot be told to stop waiting.
        """
        import torch

        self._leave()
        formed: Future[Any] = Future()
        device = torch.cuda.current_device()

        def form() -> None:
            try:
                from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

                secret = base64.b64decode(unique)
                formed.set_result(PyNcclCommunicator.from_unique_id_bytes(secret, 0, world_size, device=device))
            except Exception as e:  # handed to the thread that waits
                formed.set_exception(e)

        threading.Thread(target=form, daemon=True).start()
        try:
            self._communicator = formed.result(timeout_s)
        except TimeoutError:
            return f"NCCL group of {world_size}: not all engines joined within {timeout_s:g} s"
        except Exception as e:
            return f"NCCL group of {world_size}: {first_line(e)}"
        return None

    def broadcast(self, bucket_bytes: int, timeout_s: float) -> tuple[int, str | None]:
        """Send all weights to the group. Collective. Returns (bytes sent, what went wrong or None)."""
        parameters, sent, problem = self._zero3.full_parameters(), 0, None
        if self._rank == 0:
            sent, problem = self._send(parameters, bucket_bytes, timeout_s)
        for _ in parameters:  # to the end also after a failure: the other ranks gather with us
            pass
        return sent, problem

    def _send(self, parameters: Iterator[Any], bucket_bytes: int, timeout_s: float) -> tuple[int, str | None]:
        import torch
        from vllm.distributed.weight_transfer.packed_tensor import pack_tensors

        sent = 0
        while (chunk := pack_tensors(parameters, lambda pair: pair[1], bucket_bytes)) is not None:
            # without it vLLM would make another stream the current one of this thread, for all later training
            self._communicator.broadcast(chunk.packed_tensor, src=0, stream=torch.cuda.current_stream())
            done = torch.cuda.Event()
            done.record()
            end = time.monotonic() + timeout_s
            while not done.query():
                if time.monotonic() > end:
                    self._leave()
                    return sent, f"the NCCL weight push stood still for {timeout_s:g} s"
                time.sleep(POLL_S)
            sent += chunk.packed_tensor.numel()
        return sent, None

    def _leave(self) -> None:
        """Abort what is under way; the group is gone on this side."""
        if self._communicator is not None:
            self._communicator.destroy()
            self._communicator = None


class NcclReceiver:
    """An engine worker's side, around vLLM's NCCL engine. `arguments`: what vLLM makes it with."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self._arguments, self._engine = arguments, None

    def join(self, membership: dict[str, Any]) -> None:
        """Join a group; leaves the one of a former set of engines."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferInitInfo

        self.leave()
        self._engine: Any = NCCLWeightTransferEngine(*self._arguments)
        self._engine.init_transfer_engine(NCCLWeightTransferInitInfo(**membership))

    def receive(self, timeout_s: float, **update_info: Any) -> None:
        """Receive weights. Raises RunError after `timeout_s`: NCCL waits for a dead sender for ever."""
        import torch

        assert self._engine is not None, "an NCCL update before a group was joined"
        late, engine = threading.Event(), self._engine

        def abort() -> None:
            late.set()
            engine.shutdown()

        watch = threading.Timer(timeout_s, abort)
        watch.start()
        try:
            engine.receive_weights(engine.update_info_cls(**update_info))
            torch.cuda.synchronize(engine.device)
        finally:
            watch.cancel()
            if late.is_set():
                self._engine = None
                raise RunError(f"the NCCL weight push was given up after {timeout_s:g} s")

    def leave(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None


class NcclPush:
    """One NCCL group of learner rank 0 and all engine workers; made anew when engines change.

    NCCL knows no partial failure: when a receiver dies during the broadcast, both sides abort at their deadlines and
    every engine of the group has failed, the dead one first among the reasons.
    """

    def __init__(self, config: Config, waits: Waits, log: Callable[..., None]) -> None:
        self.limit, self.bucket = config.rollout.push_timeout_s, config.rollout.bucket_mib << 20
        self._waits, self._log = waits, log
        self.workers = config.rollout.tensor_parallel  # of one engine
        self._group: tuple[Any, dict[int, Any]] = (None, {})  # who is in it: the sender and the engines

    def push(self, learners: LearnerGroup, engines: Mapping[int, Any], version: int) -> PushResult:
        push, lead = Round(engines, version, self.limit, self._waits, self._log), learners.actors[0]
        push.call("starting a weight push", lambda i, e: e.start_update.remote(version))
        if not push.left:
            return PushResult(0, push.failed)
        if (lead, push.left) != self._group:  # handles: a restarted engine or learner is another one
            self._connect(learners, push)
        if not push.left:
            return PushResult(0, push.failed)
        (meta,) = ask_learners(learners, [lead.push.remote("nccl", "metadata")], self.limit, "weight metadata")
        calls = {i: e.update.remote({**meta, "timeout_s": self.limit}) for i, e in push.left.items()}
        sends = [a.push.remote("nccl", "broadcast", self.bucket, self.limit) for a in learners.actors]
        # each chunk has its own deadline on the sender; all of them together are bounded by the learners' calls
        (sent, problem), *_ = ask_learners(learners, sends, learners.config.rollout.call_timeout_s, "weight broadcast")
        push.wait("weight push", calls)
        if problem or push.failed:
            self._group = (None, {})
            for i in list(push.left):
                push.lose(i, f"weight push: {problem or 'another engine of the NCCL group failed'}")
        push.call("finishing a weight push", lambda i, e: e.finish_update.remote())
        return PushResult(sent, push.failed)

    def _connect(self, learners: LearnerGroup, push: Round) -> None:
        lead = learners.actors[0]
        (unique,) = ask_learners(learners, [lead.push.remote("nccl", "unique_id")], self.limit, "NCCL")
        world = 1 + self.workers * len(push.left)
        group = {"nccl_unique_id_b64": unique, "world_size": world, "packed": True}
        calls, rank = {}, 1
        for i, e in push.left.items():
            membership = {**group, "rank_offset": rank, "packed_buffer_size_bytes": self.bucket}
            calls[i], rank = e.join_push.remote({"nccl": membership}), rank + self.workers
        leading = [lead.push.remote("nccl", "join", unique, world, self.limit)]
        (problem,) = ask_learners(learners, leading, 2 * self.limit, "NCCL")
        push.wait("joining the NCCL group", calls)
        if problem or push.failed:
            for i in list(push.left):  # they are in a group that will never be whole
                push.lose(i, f"joining the NCCL group: {problem or 'another engine did not'}")
        self._group = (lead, dict(push.left))
