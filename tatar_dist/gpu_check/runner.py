"""Run the parts, each in a process of its own, with a deadline for each and one for all.

Whatever a part has started is in its session (setsid(2)), also what outlives it: Ray's processes, engines, ranks. All
of it is ended with the part.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from tatar_dist.errors import RunError, UserError
from tatar_dist.gpu_check.parts import PARTS, CheckSetting, NotHere, Part
from tatar_dist.rollout.options import COMMON_ENV
from tatar_dist.run import proofs
from tatar_dist.run.files import write_whole
from tatar_dist.run.gpus import Gpu, Machine

BUDGET_S = 600.0
POLL_S, PATIENCE_S = 0.05, 5.0
STACKS_S, EXIT_S = 2.0, 10  # before a deadline a process writes its stacks to its log; for its exit
PR_SET_PDEATHSIG = 1  # prctl(2)
ENV = {"HF_HUB_OFFLINE": "1", "RAY_ADDRESS": ""}  # all models are here, and no other machine is asked
CPU_ENV = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
WELL, RAN = ("passed", "skipped"), ("passed", "failed", "late")  # the latter are recorded

Result = dict[str, Any]  # {"part", "required", "status", "seconds", "text", "figures"}


class Running:
    """A part that runs. Its log and its files are LOGS/NAME.log and LOGS/NAME/."""

    def __init__(self, part: Part, setting: CheckSetting, logs: Path, limit_s: float) -> None:
        self.part, self.limit_s, self.start = part, limit_s, time.monotonic()
        self.log, self.file = logs / f"{part.name}.log", logs / f"{part.name}.json"
        (place := logs / part.name).mkdir()
        there = asdict(replace(setting, place=str(place)))
        job = {"run": part.run, "variant": part.variant, "setting": there, "limit_s": limit_s}
        job |= {"file": str(self.file), "parent": os.getpid()}
        path = os.pathsep.join(p for p in sys.path if p)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tatar_dist.gpu_check.runner", json.dumps(job)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={**COMMON_ENV, **os.environ, **ENV, "PYTHONPATH": path, **(CPU_ENV if setting.pretend else {})},
            )  # fmt: skip

    def result(self) -> Result | None:
        """Return the result once the process has ended or is late; end what it started."""
        seconds = time.monotonic() - self.start
        if self.process.poll() is None and seconds < self.limit_s:
            return None
        found = self._found()
        self.end()
        return blank(self.part, "", "") | {"seconds": round(seconds, 1)} | found

    def _found(self) -> Result:
        with suppress(OSError, ValueError):
            found = json.loads(self.file.read_text())
            if isinstance(found, dict) and {"status", "text"} <= found.keys():
                return found
        code = self.process.poll()
        if code is None:
            return {"status": "late", "text": f"no result within {self.limit_s:.0f} s; the log ends with its stacks"}
        how = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        said = f": {lines[-1][:200]}" if lines else ""
        return {"status": "failed", "text": f"its process ended without a result ({how}){said}"}

    def end(self) -> None:
        """End every process of the part's session."""
        mine = [p for p in psutil.process_iter(["status"]) if _session(p.pid) == self.process.pid]
        left = [p for p in mine if p.info["status"] != psutil.STATUS_ZOMBIE]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in left:
                with suppress(psutil.Error):
                    process.send_signal(number)
            _, left = psutil.wait_procs(left, PATIENCE_S)
        self.process.poll()


def blank(part: Part, status: str, text: str) -> Result:
    """Return the result of a part that was not started."""
    shown = {"part": part.name, "required": part.required, "status": status}
    return {**shown, "seconds": 0.0, "text": text, "figures": {}}


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:  # it has ended
        return None


def run_parts(
    parts: Sequence[Part],
    setting: CheckSetting,
    logs: Path,
    until: float,
    together: int = 1,
    started: Callable[[Part], None] = lambda part: None,
) -> Iterator[Result]:
    """Yield the result of each part as it comes.

    until: monotonic seconds at which all have ended.
    """
    waiting, running = deque(parts), list[Running]()
    try:
        while waiting or running:
            while waiting and len(running) < together:
                part, left = waiting.popleft(), until - time.monotonic()
                missing, limit = part.missing(setting), part.limit_s * setting.slack
                if missing or left < limit / 2:
                    yield blank(part, *(("skipped", missing) if missing else ("no time", f"{max(0, left):.0f} s left")))
                    continue
                started(part)
                running.append(Running(part, setting, logs, min(limit, left)))
            for one in list(running):
                if (result := one.result()) is not None:
                    running.remove(one)
                    yield result
            time.sleep(POLL_S)
    finally:  # interrupted
        for one in running:
            one.end()


def check(
    names: Sequence[str], pretend: bool, logs: Path, started: Callable[[Part], None] = lambda part: None
) -> dict[str, Any]:
    """Run the parts and return the object that `--json` prints.

    Every part that ran is recorded in the user's cache directory (run/proofs.py), unless it was pretended.

    names: run only these, after the devices.

    Raises:
        UserError: an unknown name; no GPU, or one that no run can use.
    """
    known = [part.name for part in PARTS]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--part {unknown[0]}: must be one of {', '.join(known)}")
    start = time.monotonic()
    chosen = [part for part in PARTS[1:] if not names or part.name in names]
    setting, notes = CheckSetting("cpu" if pretend else "cuda", 1), set[str | None]()
    until = start + BUDGET_S * setting.slack
    (devices,) = run_parts(PARTS[:1], setting, logs, until, started=started)
    if devices["status"] == "skipped":
        raise UserError(devices["text"])
    results, facts = [devices], devices["figures"].get("machine")
    if devices["status"] != "passed":
        results += [blank(part, "skipped", "the devices did not pass") for part in chosen]
        chosen = []
    machine = Machine(**{**facts, "gpus": tuple(Gpu(**gpu) for gpu in facts["gpus"])}) if facts else Machine("")
    setting = replace(setting, gpus=len(machine.gpus))
    for result in run_parts(chosen, setting, logs, until, 2 if pretend else 1, started):
        results.append(result)
        if machine.gpus and result["status"] in RAN:  # not pretended
            notes.add(proofs.add(result["part"], result["status"], machine))
    results.sort(key=lambda result: known.index(result["part"]))  # two at a time may end in another order
    return {
        "ok": all(r["status"] in WELL or not r["required"] for r in results)
        and not any(r["part"] in names and r["status"] == "skipped" for r in results),  # asked for, and not proven
        "pretend": pretend,
        "machine": facts,
        "versions": proofs.versions(),
        "seconds": round(time.monotonic() - start, 1),
        "parts": results,
        "notes": sorted(filter(None, notes)),
    }


def main() -> None:
    """Run one part in this process. Its result is a file: libraries print what they like."""
    job = json.loads(sys.argv[1])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # when gpu-check itself ends
    if os.getppid() != job["parent"]:  # it has ended already
        return
    faulthandler.dump_traceback_later(max(0.5, job["limit_s"] - STACKS_S))
    module, function = job["run"].split(":")
    try:
        text, figures = getattr(import_module(module), function)(CheckSetting(**job["setting"]), job["variant"])
        result = {"status": "passed", "text": text, "figures": figures}
    except NotHere as e:
        result = {"status": "skipped", "text": str(e)}
    except Exception as e:
        traceback.print_exc()
        kind = "" if isinstance(e, UserError | RunError) else f"{type(e).__name__}: "
        result = {"status": "failed", "text": kind + " ".join(str(e).split())[:400]}
    write_whole(Path(job["file"]), json.dumps(result))
    signal.alarm(EXIT_S)  # a library that hangs at its exit must not turn a result into a failure


if __name__ == "__main__":
    main()
