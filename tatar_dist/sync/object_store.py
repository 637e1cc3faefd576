"""The engine's side of a weight push: a vLLM weight-transfer engine fed by buckets from Ray's object store.

It works on CPU and GPU, across nodes, and lets engines join or leave. Runs inside each vLLM worker, as a part of
`engine_side.PushEngine`. Two traps of vLLM 0.32 are handled here: parameters are repacked for CPU
kernels, so the layerwise reload must frame every update, and a tied lm_head keeps its old packed copy after a reload.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from tatar_dist.sync.source import Wire, from_wire


@dataclass
class ObjectStoreInit(WeightTransferInitInfo):
    """Nothing to agree on: buckets name their tensors."""


@dataclass
class ObjectStoreUpdate(WeightTransferUpdateInfo):
    """One bucket, already fetched from the object store."""

    bucket: dict[str, Wire]


class ObjectStoreWeightTransferEngine(WeightTransferEngine[ObjectStoreInit, ObjectStoreUpdate]):
    init_info_cls = ObjectStoreInit
    update_info_cls = ObjectStoreUpdate

    def init_transfer_engine(self, init_info: ObjectStoreInit) -> None:
        """No connection to make."""

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: ObjectStoreUpdate) -> None:
        self.model.load_weights((name, from_wire(wire)) for name, wire in update_info.bucket.items())

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        refresh_tied_head(self.model)

    def shutdown(self) -> None:
        """Nothing is held."""


def refresh_tied_head(model: Any) -> None:
    """Rebuild the packed kernel of an lm_head that shares its weight with the embedding.

    A tied head never receives a tensor of its own, so the reload leaves the copy packed from the old values.
    """
    text = getattr(model, "language_model", model)
    head, embedding = getattr(text, "lm_head", None), text.model.embed_tokens
    if head is not None and head.weight.data_ptr() == embedding.weight.data_ptr():
        head.quant_method.process_weights_after_loading(head)
