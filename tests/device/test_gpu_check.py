"""The speed of gpu-check on tensors without memory: devices, dtypes, and the memory that is counted."""

from __future__ import annotations

import pytest
import torch
from pretend import NAME, FakeAccelerator, register

from tatar_dist.gpu_check import learner_parts
from tatar_dist.gpu_check.parts import CheckSetting, NotHere
from tatar_dist.plan import memory

FREE = 70 << 30


@pytest.fixture
def device(monkeypatch):
    """A pretended accelerator of 70 GiB, whose tensors have no values."""
    register()
    mode = FakeAccelerator()
    answers = {
        "mem_get_info": (FREE, FREE),
        "synchronize": None,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "max_memory_reserved": 0,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: mode.peaks["setup"])
    with mode:
        yield CheckSetting(NAME, 1)


@pytest.mark.parametrize("name", ["3B", "7B"])
def test_an_update_takes_the_memory_that_is_counted(device, name, monkeypatch):
    hidden, inner, _, *more = memory.PUBLISHED[name]
    monkeypatch.setitem(memory.PUBLISHED, name, (hidden, inner, 2, *more))
    monkeypatch.setitem(memory.VISION, "depth", 2)
    monkeypatch.setattr(learner_parts, "ROUNDS", 1)
    text, figures = learner_parts.speed(device, name)
    assert "MFU" in text and figures["peak_gib"] == pytest.approx(figures["counted_gib"], rel=0.1)


def test_a_model_that_does_not_fit_is_no_failure(device, monkeypatch):
    monkeypatch.setitem(memory.PUBLISHED, "7B", memory.PUBLISHED["32B"])
    with pytest.raises(NotHere, match=r"^takes 1\d\d\.\d GiB, 66\.5 are free$"):
        learner_parts.speed(device, "7B")
