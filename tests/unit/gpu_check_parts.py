"""Parts of gpu-check that end in every way, for test_gpu_check.py: run in processes of their own."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import time
from pathlib import Path

from tatar_dist.errors import RunError
from tatar_dist.gpu_check.parts import NotHere


def passes(setting, variant):
    print('{"status": "failed", "text": "what a library prints"}')
    return f"{variant} on {setting.device}{os.environ['RAY_ADDRESS']}", {"figure": 1.5}


def fails(setting, variant):
    raise RunError("too far\nfrom the CPU's")


def breaks(setting, variant):
    return {}["absent"]


def no_room(setting, variant):
    raise NotHere("takes 40 GiB, 20 are free")


def dies(setting, variant):
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def rubbish(setting, variant):
    Path(f"{setting.place}.json").write_text("[1, 2")
    os._exit(0)


def figures_that_are_none(setting, variant):
    return "text", {"figure": object()}


def hangs(setting, variant):
    """Leave a process behind, and ignore what asks politely."""
    child = subprocess.Popen(["sleep", "1000"])
    (Path(setting.place) / "pids").write_text(f"{os.getpid()} {child.pid}")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1000)


def exits_slowly(setting, variant):
    atexit.register(time.sleep, 1000)
    return "at last", {}


def leaves(setting, variant):
    """Pass, with a process that outlives this one."""
    child = subprocess.Popen(["sleep", "1000"])
    return str(child.pid), {}
