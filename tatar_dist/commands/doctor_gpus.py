"""Check a machine for GPU runs: its driver, its GPUs, and what compiles their kernels."""

from __future__ import annotations

import os
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tatar_dist.commands.doctor import DoctorCheck, file_system
from tatar_dist.run.gpus import ANSWERS, RULES, Machine, problems, read_here
from tatar_dist.run.process import CACHES

FREE = 0.9  # of a GPU's memory: what an engine takes (rollout.gpu_memory_utilization)
SHOWN = 3  # of what fails one check


def examine(cuda: bool) -> Iterator[DoctorCheck]:
    """Check this machine. `cuda`: the packages here are for GPUs."""
    machine = read_here()
    if machine.gpus:
        text = f"{'CUDA' if cuda else 'CPU'} builds beside {len(machine.gpus)} GPUs"
        yield DoctorCheck("packages", cuda, False, text, "to use them, delete .venv and run `make setup DEVICE=cuda`")
        yield from checks([machine], required=cuda)
        linked = "NVLink between all" if machine.nvlink else "no NVLink between some"
        hint = "sharded learners and tensor-parallel engines on them are slower"
        yield DoctorCheck("NVLink", machine.nvlink or len(machine.gpus) == 1, False, linked, hint)
    else:
        hint = f"{ANSWERS}; a machine that only plans and submits needs no GPU"
        yield DoctorCheck("GPU driver", not cuda, False, machine.error or "no GPU is visible", hint)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    hint = "install the development files of Python (python3-dev): Triton compiles kernels with them"
    yield DoctorCheck("Python.h", header.is_file(), cuda, str(header), hint)
    places = {name: os.environ.get(name) or tempfile.gettempdir() for name in CACHES}
    shared = [f"{name}={place} ({kind})" for name, place in places.items() for kind, far in [file_system(place)] if far]
    hint = "name a directory on the node's own disk: nodes that write compiled kernels to one place disturb each other"
    yield DoctorCheck("kernel caches", not shared, False, ", ".join(shared) or "on the node's own disk", hint)


def checks(machines: Sequence[Machine], where: str = "", required: bool = True) -> Iterator[DoctorCheck]:
    """Check machines that share a job. `where`: goes behind the names of the checks."""
    gpus = [gpu for m in machines for gpu in m.gpus]
    fine = {
        "GPU driver": ", ".join(sorted({m.driver for m in machines})),
        "compute capability": ", ".join(sorted({"{}.{}".format(*gpu.capability) for gpu in gpus})),
        "MIG": "off",
        "kinds of GPU": ", ".join(f"{n} x {name}" for name, n in Counter(gpu.name for gpu in gpus).items()),
    }
    found = list(problems(machines))
    for rule in RULES:
        broken = [p for p in found if p.rule == rule]
        more = f"; and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        text = "; ".join(p.found for p in broken[:SHOWN]) + more
        yield DoctorCheck(rule + where, not broken, required, text or fine[rule], broken[0].hint if broken else "")
    if not gpus:
        return
    taken = [f"{m.host}: GPU {g.index}" for m in machines for g in m.gpus if g.free < FREE * g.gib]
    text = f"{min(g.gib for g in gpus):.1f} GiB each at least, {min(g.free for g in gpus):.1f} free"
    hint = f"end the processes that hold memory of {', '.join(taken[:SHOWN])}: nvidia-smi names them"
    yield DoctorCheck("GPU memory" + where, not taken, False, text, hint)
