"""The learners' side of the GPU weight pushes: written from vLLM 0.32's source, never run on a GPU.

Tensors are gathered and packed on the default stream: gathering inside vLLM's own side streams can deadlock. Chunks are
cut where vLLM's receiver cuts them, after the tensor that exceeds `bucket_bytes`.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tatar_dist.errors import RunError

POLL_S = 0.005


def unique_id() -> str:
    """A new NCCL group's identity, which is also its secret: it travels through Ray alone, and no store listens."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return base64.b64encode(bytes(NCCLLibrary().ncclGetUniqueId().internal)).decode()


class NcclSender:
    """Rank 0 of a group with all workers of all engines."""

    def __init__(self, unique_id: str, world_size: int, timeout_s: float) -> None:
        """Raises RunError when the others have not all joined in time; NCCL cannot be told to stop waiting for them."""
        self._communicator: Any = None
        failed: list[Exception] = []
        import torch

        device = torch.cuda.current_device()

        def join() -> None:
            from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

            try:
                self._communicator = PyNcclCommunicator.from_unique_id_bytes(
                    base64.b64decode(unique_id), rank=0, world_size=world_size, device=device
                )
            except Exception as e:  # handed to the thread that waits
                failed.append(e)

        thread = threading.Thread(target=join, daemon=True)
        thread.start()
        thread.join(timeout_s)
        if failed:
            raise RunError(f"NCCL group of {world_size}: {failed[0]}") from failed[0]
        if self._communicator is None:
            raise RunError(f"NCCL group of {world_size}: not all engines joined within {timeout_s:g} s")

    def broadcast(self, parameters: Iterable[tuple[str, Any]], bucket_bytes: int, timeout_s: float) -> int:
        """Send all; bytes sent. Raises RunError when receivers do not take a chunk within `timeout_s`."""
        import torch
        from vllm.distributed.weight_transfer.packed_tensor import pack_tensors

        sent, pairs = 0, iter(parameters)
        while (chunk := pack_tensors(pairs, lambda pair: pair[1], bucket_bytes)) is not None:
            self._communicator.broadcast(chunk.packed_tensor, src=0)
            done = torch.cuda.Event()
            done.record()
            end = time.monotonic() + timeout_s
            while not done.query():
                if time.monotonic() > end:
                    self.leave()
                    raise RunError(f"the NCCL weight push stood still for {timeout_s:g} s")
                time.sleep(POLL_S)
            sent += chunk.packed_tensor.numel()
        return sent

    def leave(self) -> None:
        """Abort what is under way; the group is gone on this side."""
        if self._communicator is not None:
            self._communicator.destroy()
            self._communicator = None


def ipc_chunks(parameters: Iterable[tuple[str, Any]], bucket_bytes: int) -> Iterator[dict[str, Any]]:
    """Chunks of full tensors in this GPU's memory, as what vLLM's receiver on the same GPU needs to copy them.

    Ask for the next one only when everybody has copied the last: its memory goes then.
    """
    import torch
    from torch.multiprocessing.reductions import reduce_tensor
    from vllm.distributed.weight_transfer.packed_tensor import pack_tensors

    gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    pairs = iter(parameters)
    while (chunk := pack_tensors(pairs, lambda pair: pair[1], bucket_bytes)) is not None:
        torch.cuda.current_stream().synchronize()
        yield {
            "names": chunk.names,
            "dtype_names": [str(d).removeprefix("torch.") for d in chunk.dtypes],
            "shapes": chunk.shapes,
            "tensor_sizes": chunk.tensor_sizes,
            "ipc_handles": {gpu: reduce_tensor(chunk.packed_tensor)[1]},
        }
        del chunk
        torch.cuda.ipc_collect()
