"""Give this process a GPU that computes nothing, where torch is a CUDA build. Imported before torch."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from pretended_driver.cuda import cuda_build, give_gpus

CUDA = cuda_build() is not None
if CUDA:
    _directory = TemporaryDirectory()
    give_gpus(Path(_directory.name), memory=False, gpus=1)
