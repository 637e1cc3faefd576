"""A pretended CUDA runtime and driver (cuda.c) for torch's CUDA build: devices, streams and events, no computing."""

from __future__ import annotations

import ctypes
import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("cuda.c")
NAME = "libcuda.so.1"


def cuda_build() -> str | None:
    """The CUDA version of the installed torch, which is not imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None, "torch is not installed"
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"]


def make_cuda(directory: Path) -> Path:
    """Compile the library for the GPUs of `directory`/gpus (nvml.c), unless it is there."""
    library = directory / NAME
    if not library.exists():
        (include,) = Path(importlib.util.find_spec("nvidia").submodule_search_locations[0]).glob("cu[0-9]*/include")
        command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wno-unused", "-Werror", f"-Wl,-soname,{NAME}"]
        subprocess.run([*command, f"-I{include}", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


def load_cuda(directory: str | Path, *gpus: str) -> None:
    """Let this process have the GPUs, each "MiB major minor MIG name"; before it imports torch."""
    assert "torch" not in sys.modules, "torch is imported already, so it has asked the real runtime"
    Path(directory, "gpus").write_text("\n".join(["0 580.65.06 13000 1", *gpus]) + "\n")
    library = ctypes.CDLL(str(make_cuda(Path(directory))), ctypes.RTLD_GLOBAL)
    assert library.cudaGetDeviceCount(ctypes.byref(ctypes.c_int())) == 0  # has read the file
