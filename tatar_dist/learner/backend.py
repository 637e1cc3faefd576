"""Start torch.distributed and DeepSpeed on a given store, without Ray."""

from __future__ import annotations

import contextlib
import io
from datetime import timedelta

import torch
import torch.distributed as dist


def start_backend(store: dist.Store, rank: int, world_size: int, device: torch.device, wait: timedelta) -> None:
    """Join the default group: gloo on CPUs, NCCL on GPUs. A collective fails after `wait`."""
    import deepspeed

    # compiled at the first use, behind a lock file: a process killed meanwhile would leave all later ones waiting for
    # ever; and only inference uses it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device_id = device if device.type == "cuda" and world_size > 1 else None
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait, device_id=device_id)
    with contextlib.redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=wait, verbose=False)
