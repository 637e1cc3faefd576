"""`tatar-dist rationale build` as a process that is killed -9 while it works, and what its journal says afterwards."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tatar_dist.run.journal import decode

ROOT = Path(__file__).parents[2]


def answers(journal: Path) -> list[tuple[str, int]]:
    """(sample id, attempt) of every whole answer in the journal, in order."""
    raw = journal.read_bytes().splitlines(keepends=True) if journal.exists() else []
    lines = [line for r in raw if (line := decode(r)) is not None]
    return [(line["sample_id"], line["attempt"]) for line in lines if "text" in line]


def build_and_kill(source: Path, output: Path, words: list[str], after: int, deadline: float = 900.0) -> None:
    """Start a build and kill it when its journal holds `after` more answers than now."""
    journal = output.with_name(f"{output.stem}.journal.jsonl")
    goal = len(answers(journal)) + after
    command = [sys.executable, "-m", "tatar_dist", "rationale", "build", str(source), "--output", str(output), *words]
    log = output.with_suffix(".log")
    with open(log, "w") as said, subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said) as process:
        end = time.monotonic() + deadline
        try:
            while len(answers(journal)) < goal:
                assert process.poll() is None, f"it ended by itself: {log.read_text()[-2000:]}"
                assert time.monotonic() < end, f"too slow: {log.read_text()[-2000:]}"
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def results(output: Path) -> dict[str, bytes]:
    """The files of a finished run that must not depend on what happened on the way."""
    return {e: output.with_name(f"{output.stem}.{e}").read_bytes() for e in ("parquet", "rejected.jsonl", "report.md")}


def server_environment() -> dict[str, str]:
    """Of a vLLM server on this machine's CPU."""
    return {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
