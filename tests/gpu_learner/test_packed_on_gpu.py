"""The packed forward on one CUDA GPU, with torch and transformers alone: `python -m pytest tests/gpu_learner`.

What it must equal is the packed forward on the CPU, which tests/unit compares with padded rows. The same comparison is
`tatar-dist gpu-check --part packed`. Never run on a GPU: none was at hand. Without a GPU it fails, it does not skip.
"""

from __future__ import annotations

import pytest
import torch

from tatar_dist.gpu_check.learner_parts import Packed, apart, packed_row, result


@pytest.fixture(scope="module")
def row() -> Packed:
    assert torch.cuda.is_available(), "needs a GPU that torch sees"
    torch.backends.cudnn.allow_tf32 = False  # the patch embedding is a convolution
    return packed_row()


def test_in_float32_it_is_the_cpus(row):
    right, found = result(row, "cpu"), result(row, "cuda")
    assert apart(found[0], right[0]) < 1e-5 and apart(found[1], right[1]) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_bfloat16_flash_kernels_are_as_near_as_bfloat16_is(row, checkpointing):
    right, low = result(row, "cpu"), torch.bfloat16
    on_cpu, found = result(row, "cpu", low, checkpointing), result(row, "cuda", low, checkpointing)
    for i in (0, 1):
        assert 0 < apart(found[i], right[i]) < 2 * apart(on_cpu[i], right[i])
