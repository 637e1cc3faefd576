"""What a learner hands to NCCL: vLLM's real communicator, on a recorder in place of libnccl."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tatar_dist.run.failpoints import Failpoints
from tatar_dist.sync.nccl import NcclSender

STREAM = 7  # the address of the learner's stream


class Library:
    """Records the arguments of each ncclBroadcast."""

    def __init__(self) -> None:
        self.broadcasts: list[tuple[Any, ...]] = []

    def ncclBroadcast(self, *arguments: Any) -> None:  # noqa: N802  libnccl's name
        self.broadcasts.append(arguments)


@pytest.fixture
def library(monkeypatch) -> Library:
    stream = SimpleNamespace(cuda_stream=STREAM)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, query=lambda: True))
    return Library()


def sender_of(tensors: dict[str, torch.Tensor], library: Library) -> NcclSender:
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

    sender = NcclSender(SimpleNamespace(full_parameters=lambda: iter(tensors.items())), 0, Failpoints([], ""))
    communicator = PyNcclCommunicator.__new__(PyNcclCommunicator)
    vars(communicator).update(disabled=False, rank=0, device=torch.device("cpu"), nccl=library, comm=None)
    sender._communicator = communicator
    return sender


@pytest.mark.filterwarnings("ignore:Tensor 'layer.1.weight' has size")
def test_all_bytes_are_sent_on_the_stream_on_which_they_were_packed(library):
    tensors = {f"layer.{i}.weight": torch.zeros(3, n, dtype=torch.bfloat16) for i, n in enumerate((5, 50, 2))}
    sent, problem = sender_of(tensors, library).broadcast(100, 1.0)
    assert problem is None and sent == sum(t.nbytes for t in tensors.values())
    assert [b[2] for b in library.broadcasts] == [330, 12]  # a chunk ends after the tensor that exceeds 100 bytes
    assert {b[-1].value for b in library.broadcasts} == {STREAM}
