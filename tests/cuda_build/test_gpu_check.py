"""The GPU branches of gpu-check on pretended GPUs, whose kernels compute nothing: a part notices, or runs to its end.

The learner's other parts need values: tests/device runs `speed` on tensors without memory.
"""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from tatar_dist.errors import RunError
from tatar_dist.gpu_check import learner_parts
from tatar_dist.gpu_check.parts import PARTS, CheckSetting
from tatar_dist.gpu_check.runner import run_parts


@pytest.fixture
def setting(tmp_path):
    return CheckSetting("cuda", 2, str(tmp_path))


@pytest.fixture
def near(monkeypatch):
    """Let every comparison by `apart` be met."""
    monkeypatch.setattr(learner_parts, "apart", lambda found, right: 0.0)


def test_devices_notices_that_nothing_was_computed(setting):
    with pytest.raises(RunError, match=r"^cuda:0: a bfloat16 product is 1 from the CPU's$"):
        learner_parts.devices(setting, "")


def test_devices(setting, near):
    text, figures = learner_parts.devices(setting, "")
    assert text.startswith("2 x NVIDIA H100 80GB HBM3, ") and text.endswith(" of 80 GiB free, NVLink, CUDA 13.0")
    assert figures["machine"]["driver"] == "580.65.06" and len(figures["machine"]["gpus"]) == 2


def test_an_engine_sleeps_and_takes_weights_in_a_process_of_its_own(setting, tmp_path):
    part = next(part for part in PARTS if part.name == "sleep")
    (result,) = run_parts([replace(part, limit_s=900)], setting, tmp_path, time.monotonic() + 900)
    assert (result["status"], result["text"]) == ("passed", "gives back 0.0 of 0.0 GiB, then answers as before"), result
