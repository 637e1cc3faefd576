"""Give this process a GPU that computes nothing, where torch is a CUDA build. Imported before torch."""

from __future__ import annotations

from tempfile import TemporaryDirectory

from pretended_driver.cuda import cuda_build, load_cuda

CUDA = cuda_build() is not None
if CUDA:
    with TemporaryDirectory() as directory:
        load_cuda(directory, "81920 9 0 0 NVIDIA H100 80GB HBM3")
