"""A pretended NVIDIA driver for processes that a test starts; what asks it is real: Ray, vLLM, torch, the doctor.

    environment = pretended_driver(tmp_path, gpus=8)  # eight H100
    subprocess.run(["ray", "start", "--head"], env={**os.environ, **environment})

It is a device to ask about, not to compute on: there is no CUDA. A second call for the same directory changes what
running processes are told when they next open NVML.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("nvml.c")
NAME = "libnvidia-ml.so.1"


def pretended_driver(
    directory: Path,
    gpus: int = 8,
    name: str = "NVIDIA H100 80GB HBM3",
    gib: float = 80,
    capability: tuple[int, int] = (9, 0),
    driver: str = "580.65.06",
    cuda: int | None = None,
    mig: bool = False,
    nvlink: bool = True,
    error: int = 0,
    others: Mapping[int, Mapping[str, Any]] | None = None,
) -> dict[str, str]:
    """Return the environment in which a process is told of these GPUs.

    Args:
        cuda: the newest CUDA that the driver offers; by default 13.0 from 580 on, else 12.2.
        directory: takes the library; each pretended machine has its own.
        error: what nvmlInit returns: 9, no driver is loaded; 18, the driver and its library have different versions.
        others: name, gib, capability or mig of single GPUs, by index. gib=0: another job's; 1 / 1024: the CPU's memory.
    """
    library = directory / NAME
    if not library.exists():
        command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-Wl,-soname,{NAME}", "-o", str(library)]
        subprocess.run([*command, str(SOURCE), "-ldl"], check=True)
    if cuda is None:
        cuda = 13000 if int(driver.split(".")[0]) >= 580 else 12020
    lines = [f"{error} {driver} {cuda} {nvlink:d}"]
    for i in range(gpus):
        gpu = {"name": name, "gib": gib, "capability": capability, "mig": mig, **(others or {}).get(i, {})}
        major, minor = gpu["capability"]
        lines.append(f"{int(gpu['gib'] * 1024)} {major} {minor} {gpu['mig']:d} {gpu['name']}")
    table = directory / "gpus.new"
    table.write_text("\n".join(lines) + "\n")
    table.replace(directory / "gpus")
    before = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": f"{directory}:{before}" if before else str(directory)}
