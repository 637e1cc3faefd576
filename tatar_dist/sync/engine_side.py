"""The engine's side of the GPU weight pushes, and sleep: written from vLLM 0.32's source, never run on a GPU.

`PushEngine` runs in every vLLM worker and takes an update by what it carries: a bucket from Ray's object store, an NCCL
broadcast of learner rank 0, or CUDA IPC handles of learners on the same GPUs. One engine for all three, because one
that joins late gets its weights through the object store, whatever the others use. `GpuPushes` and `Sleeping` are the
methods of `RolloutEngine` that go with it. Workers of a tensor-parallel engine are processes of their own, which learn
of `PushEngine` by importing this module for `EXTENSION`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.weight_transfer.base import WeightTransferInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from tatar_dist.errors import RunError
from tatar_dist.sync.object_store import ObjectStoreWeightTransferEngine

BACKEND = "tatar"
EXTENSION = "tatar_dist.sync.engine_side.Extension"  # LLM(worker_extension_cls=…)


class Extension:
    """Adds nothing to a worker; importing it registers the backend there."""


@dataclass
class PushInit(WeightTransferInitInfo):
    """`nccl`: fields of vLLM's NCCLWeightTransferInitInfo, to join a group; empty for the other two ways."""

    nccl: dict[str, Any] = field(default_factory=dict)


class PushEngine(ObjectStoreWeightTransferEngine):
    init_info_cls = PushInit

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._arguments = args
        self._nccl: Any = None
        self._ipc: Any = None

    def init_transfer_engine(self, init_info: PushInit) -> None:
        if not init_info.nccl:
            return
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferInitInfo

        self.shutdown()  # the group of a former set of engines
        self._nccl = NCCLWeightTransferEngine(*self._arguments)
        self._nccl.init_transfer_engine(NCCLWeightTransferInitInfo(**init_info.nccl))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if "bucket" in update_info:
            super().update_weights(update_info)
        elif "ipc_handles" in update_info:
            self._from_ipc(update_info)
        else:
            self._from_nccl(**update_info)

    def _from_ipc(self, update_info: dict[str, Any]) -> None:
        import torch
        from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferInitInfo

        if self._ipc is None:
            self._ipc = IPCWeightTransferEngine(*self._arguments)
            self._ipc.init_transfer_engine(IPCWeightTransferInitInfo(packed=True))
        self._ipc.receive_weights(self._ipc.update_info_cls(**update_info))
        torch.cuda.synchronize(self.device)

    def _from_nccl(self, timeout_s: float, **update_info: Any) -> None:
        """Raises RunError after `timeout_s`: NCCL itself would wait for a dead sender for ever."""
        import torch

        assert self._nccl is not None, "an NCCL update before a group was joined"
        late = threading.Event()

        def abort() -> None:
            late.set()
            self._nccl.shutdown()

        watch = threading.Timer(timeout_s, abort)
        watch.start()
        try:
            self._nccl.receive_weights(self._nccl.update_info_cls(**update_info))
            torch.cuda.synchronize(self.device)
        finally:
            watch.cancel()
            if late.is_set():
                self._nccl = None
                raise RunError(f"the NCCL weight push was given up after {timeout_s:g} s")

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        if self._ipc is not None:
            self._ipc.shutdown()  # let the learner have its buffer back

    def shutdown(self) -> None:
        if self._nccl is not None:
            self._nccl.shutdown()
            self._nccl = None


def register() -> None:
    """Make the backend known to vLLM in this process; safe to call again."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, PushEngine)


register()


class GpuPushes:
    """`RolloutEngine`'s calls of a GPU push, between `start_update` and `finish_update`."""

    llm: Any

    def nccl_join(self, unique_id: str, rank: int, world_size: int, bucket_bytes: int) -> None:
        """Join the group of `unique_id`; this engine's workers have the ranks from `rank` on. Waits for all others."""
        nccl = {
            "nccl_unique_id_b64": unique_id,
            "rank_offset": rank,
            "world_size": world_size,
            "packed": True,
            "packed_buffer_size_bytes": bucket_bytes,
        }
        self.llm.init_weight_transfer_engine({"init_info": {"nccl": nccl}})

    def nccl_update(self, names: list[str], dtype_names: list[str], shapes: list[list[int]], timeout_s: float) -> None:
        """Receive all weights, while learner rank 0 broadcasts them."""
        update = {"names": names, "dtype_names": dtype_names, "shapes": shapes, "timeout_s": timeout_s}
        self.llm.update_weights({"update_info": update})

    def ipc_update(self, chunk: dict[str, Any]) -> None:
        """Copy one chunk out of a learner's memory on the same GPU."""
        self.llm.update_weights({"update_info": chunk})


class Sleeping:
    """Engines that share the learners' GPUs give their memory back while those work; on a CPU nothing happens."""

    llm: Any
    asleep = False

    def sleep(self) -> None:
        """Free weights and KV cache. Weights are outdated by the update anyway, a push follows every wake-up."""
        if self._can_sleep() and not self.asleep:
            self.llm.sleep(level=2)
        self.asleep = True

    def wake_for_update(self) -> None:
        """Memory for weights, before a push into them; the KV cache's comes with `wake`."""
        if self._can_sleep() and self.asleep:
            self.llm.wake_up(tags=["weights"])

    def wake(self) -> None:
        """Memory for the KV cache, after a push: the engine can generate again."""
        if self._can_sleep() and self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.asleep = False

    def _can_sleep(self) -> bool:
        return bool(self.llm.llm_engine.vllm_config.model_config.enable_sleep_mode)
