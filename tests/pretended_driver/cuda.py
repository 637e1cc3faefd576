"""A pretended GPU for code that calls CUDA: torch's CUDA build and vLLM's wheel run on it, and nothing is computed.

    environment = pretended_cuda(tmp_path, gpus=2)  # for processes that a test starts
    give_gpus(tmp_path, gpus=2)                     # for this process and those it starts, before it imports torch

The GPUs and NVML are those of `pretended_driver`; cuda.c says what CUDA does.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from pretended_driver import NAME as NVML
from pretended_driver import pretended_driver

NAME = "libcuda.so.1"


def cuda_build() -> str | None:
    """The CUDA version of the installed torch, which is not imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None, "torch is not installed"
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"]


def pretended_cuda(directory: Path, memory: bool = True, **gpus: Any) -> dict[str, str]:
    """The environment in which a process has these GPUs. `memory`: they hold tensors, and kernels return at once."""
    environment = pretended_driver(directory, **gpus)
    library = directory / NAME
    if not library.exists():
        spec = importlib.util.find_spec("nvidia")
        assert spec is not None and spec.submodule_search_locations, "the packages of torch's CUDA build are missing"
        (include,) = Path(spec.submodule_search_locations[0]).glob("cu[0-9]*/include")
        compile_library(library, "cuda.c", f"-I{include}", "-Wno-unused")
    # freed memory goes back at once: what no kernel has filled is zeros, not an old tensor
    work = {"PRETENDED_MEMORY": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if memory else {}
    return {**environment, **work, "LD_PRELOAD": str(library)}


def give_gpus(directory: Path, memory: bool = True, **gpus: Any) -> None:
    assert "torch" not in sys.modules, "torch is imported already and has asked the real CUDA"
    os.environ.update(pretended_cuda(directory, memory, **gpus))
    for name in (NVML, NAME):
        library = ctypes.CDLL(str(directory / name), ctypes.RTLD_GLOBAL)
    assert library.cudaGetDeviceCount(ctypes.byref(ctypes.c_int())) == 0


def pretended_nccl(directory: Path) -> Path:
    """The library that vLLM takes for NCCL where VLLM_NCCL_SO_PATH names it."""
    return compile_library(directory / "libnccl.so.2", "nccl.c")


def compile_library(library: Path, source: str, *words: str) -> Path:
    """Compile a file of this directory."""
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-Wl,-soname,{library.name}", *words]
    subprocess.run(
        [*command, "-o", str(library), str(Path(__file__).with_name(source)), "-ldl", "-lpthread"], check=True
    )
    return library
