"""`tatar-dist gpu-check --pretend` from end to end: every part that has a CPU form, on real Ray, vLLM and DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PASSED = {"devices", "packed", "engine", "zero3", "push-object-store", "sleep", "grpo", "speed-3b"}
FOR_GPUS = {"engine-v2", "push-cuda-ipc", "push-nccl", "engine-tp2", "speed-7b"}
LIMITS = {
    "packed": {"float32 gradient": 1e-9},
    "engine": {"gap": 1e-4},
    "zero3": {"float32": 1e-4},
    "grpo": {"gap": 1e-4},
}


def test_pretend_walks_all_parts_records_nothing_and_leaves_no_process(tmp_path):
    places = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "tatar_dist", "gpu-check", "--pretend", "--json"]
    done = subprocess.run(words, env={**os.environ, **places}, cwd=tmp_path, capture_output=True, text=True)
    found = json.loads(done.stdout)
    status = {result["part"]: (result["status"], result["text"]) for result in found["parts"]}
    assert {name for name, (how, _) in status.items() if how == "passed"} == PASSED, status
    assert {name for name, (how, text) in status.items() if text == "runs on GPUs only"} == FOR_GPUS
    assert done.returncode == 0 and done.stderr == "" and found["ok"] and found["pretend"] and found["notes"] == []
    figures = {result["part"]: result["figures"] for result in found["parts"]}
    for part, limits in LIMITS.items():
        assert all(0 <= figures[part][name] < limit for name, limit in limits.items()), (part, figures[part])
    assert len(figures["grpo"]["step_seconds"]) == 3 and figures["push-object-store"]["sync/bytes"] > 1e6
    assert not (tmp_path / "cache").exists()
    left = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("XDG_CACHE_HOME") == places["XDG_CACHE_HOME"]:
                left.append(process.cmdline())
    assert left == []
