"""The engine's side of the GPU weight pushes: written from vLLM 0.32's source, never run on a GPU.

`PushEngine` runs in every vLLM worker and takes an update by what it carries: a bucket from Ray's object store, an NCCL
broadcast of learner rank 0, or CUDA IPC handles of learners on the same GPUs. One engine for all three, because one
that joins late gets its weights through the object store, whatever the others use. `engine_calls.py` has the methods of
`RolloutEngine` that go with it. Workers of a tensor-parallel engine are processes of their own, which learn of
`PushEngine` by importing this module for `EXTENSION`.
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
