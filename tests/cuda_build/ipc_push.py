"""A push by CUDA IPC from a learner's sender to an engine's receiver in one process: what arrives is what was sent.

A process of its own, because torch shares only memory of its caching allocator (test_packages.py runs it).
"""

from __future__ import annotations

import os
from types import SimpleNamespace

os.environ.pop("PYTORCH_NO_CUDA_MEMORY_CACHING")

import torch
from kernels import concatenation
from vllm.config.weight_transfer import WeightTransferConfig

from tatar_dist.sync.cuda_ipc import IpcReceiver, IpcSender

sent = {f"layer.{i}.weight": torch.arange(float(64 * (i + 1))).to(torch.bfloat16).reshape(8, -1) for i in range(5)}
arrived: dict[str, torch.Tensor] = {}
model = SimpleNamespace(load_weights=lambda pairs: arrived.update((n, t.cpu()) for n, t in pairs))
engine = SimpleNamespace(parallel_config=None, model_config=None)
receiver = IpcReceiver((WeightTransferConfig(backend="ipc"), engine, torch.device("cuda", 0), model))
parameters = SimpleNamespace(full_parameters=lambda everywhere: iter([(n, t.cuda()) for n, t in sent.items()]))
sender = IpcSender(parameters, 0, None)
with concatenation():
    for push in range(2):
        arrived.clear()
        chunks = 0
        while (chunk := sender.next_chunk(512)) is not None:
            receiver.receive(chunk)
            chunks += 1
        receiver.finish()
        assert chunks > 1, "one chunk tests no border between two"
        assert arrived.keys() == sent.keys() and all(torch.equal(arrived[n], t) for n, t in sent.items()), push
