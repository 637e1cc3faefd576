"""Ask a machine's driver about its GPUs, and find those that no run can use.

Runs and `tatar-dist doctor` share the rules. The driver answers through NVML, by the binding that Ray contains and
counts GPUs with; no CUDA context is made. GPUs that CUDA_VISIBLE_DEVICES leaves out are left out here, and so are those
that only other jobs may open: CUDA does not number them.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

from tatar_dist.errors import UserError

GIB = 1 << 30
CUDA, DRIVER = (13, 0), 580  # of torch's build, and the first driver that offers it
CAPABILITY = (8, 0)  # A100: kernels for bfloat16 and the packed attention
FP8_CAPABILITY = (8, 9)  # L4, L40S, RTX 4090, H100: products of fp8 weights and activations
ANSWERS = "nvidia-smi must work there; after an update of the driver, reboot"
RULES = ("GPU driver", "compute capability", "MIG", "kinds of GPU")
OTHERS = "set CUDA_VISIBLE_DEVICES to other GPUs (before `ray start`), or take another node"


@dataclass(frozen=True)
class Gpu:
    """One GPU. gib: 0 where it has no memory of its own.

    free: GiB that no process holds; mig: it is in MIG mode, divided into slices.
    """

    index: int
    name: str
    gib: float
    free: float
    capability: tuple[int, int]
    mig: bool


@dataclass(frozen=True)
class Machine:
    """The GPUs that a run may use on a host.

    cuda: the newest that the driver offers; nvlink: between each two GPUs; error: why the driver does not answer.
    """

    host: str
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    cuda: tuple[int, int] = (0, 0)
    nvlink: bool = False
    error: str = ""


class Unusable(NamedTuple):
    """What no run can use. `rule`: one of RULES; `hint`: what to do."""

    rule: str
    found: str
    hint: str


def read(visible: Sequence[str] | None = None) -> Machine:
    """Ask this machine's driver. `visible`: the entries of CUDA_VISIBLE_DEVICES; None: all GPUs."""
    import ray._private.thirdparty.pynvml as nvml

    host = socket.gethostname()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as e:
        return Machine(host, error=str(e))
    try:
        handles: dict[Gpu, Any] = {}
        for i in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(i)
            except nvml.NVMLError_NoPermission:  # another job's
                continue
            mig, total, free = False, 0, 0
            with suppress(nvml.NVMLError):  # a GPU without MIG
                mig = nvml.nvmlDeviceGetMigMode(handle)[0] == 1
            with suppress(nvml.NVMLError_NotSupported):  # a GPU without memory of its own
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                total, free = memory.total, memory.free
            capability = nvml.nvmlDeviceGetCudaComputeCapability(handle)
            name = nvml.nvmlDeviceGetName(handle)
            handles[Gpu(len(handles), name, total / GIB, free / GIB, capability, mig)] = handle
        if visible is not None:  # in its order, which is CUDA's and Ray's
            uuids = {gpu: nvml.nvmlDeviceGetUUID(handle) for gpu, handle in handles.items()}
            handles = {gpu: handles[gpu] for v in visible for gpu in handles if _names(v, gpu, uuids[gpu])}
        pairs, linked = combinations(handles.values(), 2), False
        with suppress(nvml.NVMLError):  # GPUs that never have NVLink
            states = (nvml.nvmlDeviceGetP2PStatus(a, b, nvml.NVML_P2P_CAPS_INDEX_NVLINK) for a, b in pairs)
            linked = all(state == nvml.NVML_P2P_STATUS_OK for state in states)
        driver, cuda = nvml.nvmlSystemGetDriverVersion(), nvml.nvmlSystemGetCudaDriverVersion()  # 12020: 12.2
        return Machine(host, tuple(handles), driver, (cuda // 1000, cuda % 1000 // 10), linked)
    except nvml.NVMLError as e:
        return Machine(host, error=str(e))
    finally:
        nvml.nvmlShutdown()


def _names(entry: str, gpu: Gpu, uuid: str) -> bool:
    """Return whether an entry of CUDA_VISIBLE_DEVICES means this GPU, or a slice of it."""
    return entry == str(gpu.index) or uuid.startswith(entry) or (entry.startswith("MIG-") and gpu.mig)


def read_here(count: int | None = None) -> Machine:
    """Ask about the GPUs that this process may use. `count`: the first only."""
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    here = read(None if variable is None else [entry.strip() for entry in variable.split(",") if entry.strip()])
    return replace(here, gpus=here.gpus[:count])


def problems(machines: Sequence[Machine], fp8: bool = False) -> Iterator[Unusable]:
    """Yield what no run can use on machines that share a job; `fp8`: with rollout.quantization."""
    needed, least = "{}.{}".format(*CUDA), FP8_CAPABILITY if fp8 else CAPABILITY
    for m in machines:
        if m.error:
            yield Unusable("GPU driver", f"{m.host}: the NVIDIA driver does not answer ({m.error})", ANSWERS)
        elif m.gpus and m.cuda < CUDA and int(m.driver.split(".")[0]) < DRIVER:
            offer = f"{m.host}: NVIDIA driver {m.driver} offers CUDA {m.cuda[0]}.{m.cuda[1]}, but {needed} is needed"
            yield Unusable("GPU driver", offer, f"install driver {DRIVER} or newer")
    for where, gpu, _ in _grouped(machines, lambda gpu: gpu.capability < least):
        has = "{}.{}, but {}.{} is needed".format(*gpu.capability, *least)
        hint = f"set rollout.quantization=none, or {OTHERS}" if fp8 else OTHERS
        yield Unusable("compute capability", f"{where} has compute capability {has}", hint)
    for where, _, numbers in _grouped(machines, lambda gpu: gpu.mig):
        off = f"run nvidia-smi -i {numbers} -mig 0 there, or {OTHERS}"
        yield Unusable("MIG", f"{where} is divided by MIG, but a process needs whole GPUs", off)
    kinds = Counter(gpu.name for m in machines for gpu in m.gpus)
    most = max(kinds, key=lambda name: kinds[name], default="")
    for where, *_ in _grouped(machines, lambda gpu: gpu.name != most):
        yield Unusable("kinds of GPU", f"{where} is of another kind than the job's others ({most})", OTHERS)


def _grouped(machines: Sequence[Machine], bad: Callable[[Gpu], bool]) -> Iterator[tuple[str, Gpu, str]]:
    """Yield (host, numbers and name; one of them; numbers) of bad GPUs, by host and kind."""
    for m in machines:
        for name in dict.fromkeys(gpu.name for gpu in m.gpus if bad(gpu)):
            alike = [gpu for gpu in m.gpus if bad(gpu) and gpu.name == name]
            numbers = ",".join(str(gpu.index) for gpu in alike)
            yield f"{m.host}: GPU {numbers} ({name})", alike[0], numbers


def check(machines: Sequence[Machine], fp8: bool = False) -> float | None:
    """Return the GiB of the smallest GPU; None if there is none. Raises UserError."""
    if found := list(problems(machines, fp8)):
        more = f" (and {len(found) - 1} more: tatar-dist doctor)" if len(found) > 1 else ""
        raise UserError(f"{found[0].found}: {found[0].hint}{more}")
    return min((gpu.gib for m in machines for gpu in m.gpus), default=None)


def check_here(count: int) -> float | None:
    """Check the first `count` GPUs here, unless torch is a CPU build. Returns as `check` does."""
    import torch

    if torch.version.cuda is None:
        return None
    here = read_here()
    if not here.error and len(here.gpus) < count:
        hint = "set CUDA_VISIBLE_DEVICES and rollout.tensor_parallel, or install with DEVICE=cpu"
        raise UserError(f"{here.host}: an engine needs {count} GPUs, but sees {len(here.gpus)}: {hint}")
    smallest = check([replace(here, gpus=here.gpus[:count])])
    if not torch.cuda.is_available():
        hint = "python -c 'import torch; torch.cuda.init()' says why (no libcuda.so, no nvidia-fabricmanager)"
        raise UserError(f"{here.host}: the driver has {len(here.gpus)} GPUs, but torch can use none: {hint}")
    return smallest
