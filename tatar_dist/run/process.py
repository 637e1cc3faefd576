"""A process of a run: its log, where it runs, its cores.

A process writes to RUN/logs, by its name in the run:

    NAME.jsonl   one object a line: time (Unix seconds), level, logger, host, pid, message, and the traceback if any
    NAME.out     what is printed, also by native libraries (vLLM, NCCL, gloo) and by a process that crashes

The event `process/started` records where it runs, so that it can be found while it starts, too. A process that cannot
see the run directory (no shared file system) logs to its machine's temporary directory and prints that path there.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import json
import logging
import os
import socket
import stat
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tatar_dist.errors import UserError
from tatar_dist.run.events import Events

CACHES = {
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",  # made at the import; a home may be read-only
    "CUDA_CACHE_PATH": "cuda",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "extensions",
    "VLLM_CACHE_ROOT": "vllm",
}
VISIBLE = "CUDA_VISIBLE_DEVICES"  # Ray sets it for each actor that asked for GPUs
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, 2**64 - 1  # prctl(2)

log = logging.getLogger(__name__)


class JsonLines(logging.Formatter):
    """Format a log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        row = {
            "time": round(record.created, 3),
            "level": record.levelname,
            "logger": record.name,
            "host": socket.gethostname(),
            "pid": record.process,
            "message": record.getMessage(),
        }
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row)


def open_log(run: str | Path, name: str, printed: bool = True) -> Path:
    """Send this process's log records to RUN/logs/NAME.jsonl alone. Returns the directory.

    Records of tatar_dist count from INFO, of other packages from WARNING.

    Args:
        run: the run directory; without one, this machine is taken not to see it.
        name: controller, learner-0, engine-1, reward.
        printed: also send what this process prints to NAME.out; not for one that has a user's terminal.
    """
    visible = Path(run).is_dir() and os.access(run, os.W_OK)
    directory = Path(run) / "logs" if visible else Path(tempfile.mkdtemp(prefix=f"{Path(run).name}-{name}-"))
    directory.mkdir(exist_ok=True)
    handler = logging.FileHandler(directory / f"{name}.jsonl")
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], force=True)  # force: an earlier run of this process has one
    logging.getLogger("tatar_dist").setLevel(logging.INFO)
    if printed:
        _redirect(directory / f"{name}.out")
    _permit_tracing()
    facts = process_facts()
    gpus = f", {VISIBLE}: {facts['gpu']}" if facts["gpu"] else ""
    log.info("%s starts on node %s%s", name, facts["node"], gpus)
    if visible:
        Events(Path(run)).log("process/started", name=name, **facts)
    else:
        log.warning("%s does not see %s: %s logs to %s there", facts["host"], run, name, directory)
    return directory


def _redirect(path: Path) -> None:
    """Send both output streams to a file, below Python: C and C++ libraries write there, too."""
    sys.stdout.flush()
    sys.stderr.flush()
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    faulthandler.enable(file=2, all_threads=True)


def _permit_tracing() -> None:
    """Let any process of the user trace this one: lifts Yama's limit (faults/README.md)."""
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(PR_SET_PTRACER_ANY))  # fails, unneeded, without Yama


def interface_of(ip: str) -> str | None:
    """Return the network interface that has this address, or None."""
    import psutil

    if ip.startswith("127."):  # psutil lists only one of loopback's addresses
        return "lo"
    names = [name for name, addresses in psutil.net_if_addrs().items() if ip in {a.address for a in addresses}]
    return names[0] if names else None


@contextmanager
def importing() -> Iterator[None]:
    """Exempt what big imports create from garbage collection: a third of a small engine's start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # or triton would list what is left when the interpreter is taken down
        gc.enable()


def short_temp_dir(below: str = "/ray") -> Path:
    """Return a directory for temporary files in which Ray's sockets have short enough names.

    A name holds 107 bytes (unix(7)). Ray adds its session's directory to `below`, the path from here to its own.

    Raises:
        UserError: none of TMPDIR, /tmp, /var/tmp and /dev/shm is short and can be written.
    """
    longest = 107 - len(below + "/session_YYYY-MM-DD_hh-mm-ss_micros_process/sockets/plasma_store")
    for place in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        if len(os.fsencode(place)) <= longest and os.access(place, os.W_OK | os.X_OK):
            return Path(place)
    raise UserError(
        f"TMPDIR={tempfile.gettempdir()}: too long for the sockets that Ray makes in it, and none of /tmp, /var/tmp "
        f"and /dev/shm can be written: set TMPDIR to a directory of at most {longest} characters"
    )


def use_node_caches() -> None:
    """Keep compiled kernels on this node's disk, because nodes may not share a cache.

    Variables that are set stay. The directory is this user's alone, because kernels in it are executed.
    """
    directory = Path(tempfile.gettempdir()) / f"tatar-dist-{os.getuid()}"
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    facts = directory.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        directory = Path(tempfile.mkdtemp(prefix=f"{directory.name}-"))
    for name, part in CACHES.items():
        os.environ.setdefault(name, str(directory / part))


def process_facts() -> dict[str, Any]:
    """Return pid, host name, Ray's node id (None outside Ray), CUDA_VISIBLE_DEVICES or None."""
    ray = sys.modules.get("ray")  # a process that has not imported it belongs to no node
    node = ray.get_runtime_context().get_node_id() if ray and ray.is_initialized() else None
    return {"pid": os.getpid(), "host": socket.gethostname(), "node": node, "gpu": os.environ.get(VISIBLE)}


def check_gpu(configured: int, seen: bool) -> None:
    """Raise UserError if torch sees no GPU, though `configured` GPUs a node are to be used."""
    if configured and not seen:
        raise UserError(
            f"cluster.gpus_per_node={configured}, but torch sees no GPU on {socket.gethostname()} ({VISIBLE}: "
            f"{os.environ.get(VISIBLE, 'not set') or 'empty'}): install with DEVICE=cuda, or set 0 for the CPU; "
            "`tatar-dist doctor` there looks for what else is wrong"
        )


def pin(_: Any, side: int, index: int, count: int) -> None:
    """Pin process `index` of `count` to its share of the first or second half (`side`) of cores.

    Called on an actor, the first argument. Where there are fewer cores than processes, some share one.
    """
    cores = sorted(os.sched_getaffinity(0))
    middle = len(cores) // 2
    half = (cores[middle:] if side else cores[:middle]) or cores
    keep_on(half[index * len(half) // count : (index + 1) * len(half) // count] or [half[index % len(half)]])


def keep_on(cores: Collection[int]) -> None:
    """Move every thread of this process to these cores; later threads inherit it."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it ended meanwhile
            os.sched_setaffinity(int(thread), cores)


def check_visible_gpus() -> None:
    """Raise UserError if this actor sees more GPUs than Ray gave to it: it would use the first."""
    ray = sys.modules.get("ray")
    own = ray.get_gpu_ids() if ray and ray.is_initialized() else []
    visible = os.environ.get(VISIBLE)
    if own and (visible is None or visible.count(",") >= len(own)):
        raise UserError(
            f"{socket.gethostname()}: Ray gave GPU {','.join(map(str, own))} to this process, which sees "
            f"{visible or 'all'}: unset RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES where Ray is started"
        )
