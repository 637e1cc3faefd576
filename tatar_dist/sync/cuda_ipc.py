"""Push weights by CUDA IPC to engines on the learners' GPUs (vLLM 0.32; never run on one)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tatar_dist.config.schema import Config
from tatar_dist.faults.waiting import Waits
from tatar_dist.run.failpoints import Failpoints
from tatar_dist.sync.push import PushResult, Round, ask_learners

if TYPE_CHECKING:
    from tatar_dist.learner.group import LearnerGroup


class IpcSender:
    """The sender in a learner rank."""

    def __init__(self, zero3: Any, rank: int, failpoints: Failpoints) -> None:
        self._zero3 = zero3
        self._chunks: Iterator[dict[str, Any]] | None = None

    def next_chunk(self, bucket_bytes: int) -> dict[str, Any] | None:
        """Free the previous chunk of weights, return IPC handles to the next or None. Collective."""
        if self._chunks is None:
            self._chunks = self._gathered(bucket_bytes)
        chunk = next(self._chunks, None)
        if chunk is None:
            self._chunks = None
        return chunk

    def _gathered(self, bucket_bytes: int) -> Iterator[dict[str, Any]]:
        """Yield chunks of full tensors, as metadata and handles for vLLM's receiver on the same GPU."""
        import torch
        from torch.multiprocessing.reductions import reduce_tensor
        from vllm.distributed.weight_transfer.packed_tensor import pack_tensors

        gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        parameters = self._zero3.full_parameters(everywhere=True)
        while (chunk := pack_tensors(parameters, lambda pair: pair[1], bucket_bytes)) is not None:
            torch.cuda.current_stream().synchronize()
            yield {
                "names": chunk.names,
                "dtype_names": [str(d).removeprefix("torch.") for d in chunk.dtypes],
                "shapes": chunk.shapes,
                "tensor_sizes": chunk.tensor_sizes,
                "ipc_handles": {gpu: reduce_tensor(chunk.packed_tensor)[1]},
            }
            del chunk  # everybody has copied it when the next one is asked for
            torch.cuda.ipc_collect()


class IpcReceiver:
    """The receiver in an engine worker. `arguments`: for the constructor of vLLM's IPC engine."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self._arguments = arguments
        self._engine: Any = None

    def receive(self, update_info: dict[str, Any]) -> None:
        """Copy one chunk out of a learner's memory on the same GPU."""
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferInitInfo

        if self._engine is None:
            self._engine = IPCWeightTransferEngine(*self._arguments)
            self._engine.init_transfer_engine(IPCWeightTransferInitInfo(packed=True))
        self._engine.receive_weights(self._engine.update_info_cls(**update_info))

    def finish(self) -> None:
        """Release the learner's buffer."""
        if self._engine is not None:
            self._engine.shutdown()


class IpcPush:
    """Push chunk by chunk: each engine copies from the memory of the learner on its GPU."""

    def __init__(self, config: Config, waits: Waits, log: Callable[..., None]) -> None:
        self.limit, self.bucket = config.rollout.push_timeout_s, config.rollout.bucket_mib << 20
        self._waits, self._log = waits, log

    def push(self, learners: LearnerGroup, engines: Mapping[int, Any], version: int) -> PushResult:
        push, sent = Round(engines, version, self.limit, self._waits, self._log), 0
        push.call("starting a weight push", lambda i, e: e.start_update.remote(version))
        while True:  # to the end, whoever fails: gathering is collective
            calls = [a.push.remote("cuda_ipc", "next_chunk", self.bucket) for a in learners.actors]
            parts = ask_learners(learners, calls, self.limit, "gathering")
            if parts[0] is None:
                break
            handles = {gpu: handle for part in parts for gpu, handle in part["ipc_handles"].items()}
            chunk = {**parts[0], "ipc_handles": handles}
            sent += sum(chunk["tensor_sizes"])
            push.wait("weight push", {i: e.update.remote(chunk) for i, e in push.left.items()})
        push.call("finishing a weight push", lambda i, e: e.finish_update.remote())
        return PushResult(sent, push.failed)
