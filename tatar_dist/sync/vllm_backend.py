"""The engine's side of every weight push: a vLLM weight-transfer backend for all transports.

`PushEngine` tells the transports apart by the keys of an update: a bucket from the object store, CUDA IPC handles, or
else NCCL. One backend serves all, because an engine that joins late gets its weights through the object store,
whichever transport the others use. The workers of a tensor-parallel engine are separate processes; importing this
module for `EXTENSION` registers the backend there. Two pitfalls of vLLM 0.32 are handled here: parameters are repacked
for CPU kernels, so every update must run inside a layerwise reload, and a tied lm_head keeps its old packed copy after
a reload.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from tatar_dist.sync import object_store
from tatar_dist.sync.cuda_ipc import IpcReceiver
from tatar_dist.sync.nccl import NcclReceiver

BACKEND = "tatar"
EXTENSION = "tatar_dist.sync.vllm_backend.Extension"  # LLM(worker_extension_cls=…)


class Extension:
    """Add nothing to a worker; importing it registers the backend there."""


@dataclass
class PushInit(WeightTransferInitInfo):
    """`nccl`: fields of vLLM's NCCLWeightTransferInitInfo for joining a group; else empty."""

    nccl: dict[str, Any] = field(default_factory=dict)


@dataclass
class PushUpdate(WeightTransferUpdateInfo):
    """One bucket, already fetched from the object store."""

    bucket: dict[str, object_store.Wire]


class PushEngine(WeightTransferEngine[PushInit, PushUpdate]):
    init_info_cls = PushInit
    update_info_cls = PushUpdate

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._nccl, self._ipc = NcclReceiver(args), IpcReceiver(args)

    def init_transfer_engine(self, init_info: PushInit) -> None:
        if init_info.nccl:
            self._nccl.join(init_info.nccl)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if "bucket" in update_info:
            return self.receive_weights(self.parse_update_info(update_info))
        if "ipc_handles" in update_info:
            self._ipc.receive(update_info)
        else:
            self._nccl.receive(**update_info)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: PushUpdate) -> None:
        alone = self.parallel_config.tensor_parallel_size == 1  # else vLLM copies a worker's part of a tensor
        object_store.load(self.model, update_info.bucket, self.device if alone else torch.device("cpu"))

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        refresh_tied_head(self.model)
        self._ipc.finish()
        if self.device.type == "cuda":  # for the copies of buckets
            torch.cuda.synchronize(self.device)

    def shutdown(self) -> None:
        self._nccl.leave()


def refresh_tied_head(model: Any) -> None:
    """Rebuild the packed kernel of an lm_head that shares its weight with the embedding.

    A tied head never receives a tensor of its own, so the reload leaves the copy packed from the old values.
    """
    text = getattr(model, "language_model", model)
    head, embedding = getattr(text, "lm_head", None), text.model.embed_tokens
    if head is not None and head.weight.data_ptr() == embedding.weight.data_ptr():
        head.quant_method.process_weights_after_loading(head)


def register() -> None:
    """Make the backend known to vLLM in this process; safe to call again."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, PushEngine)


register()
