"""The log of a process: records as JSON lines, native output in a file, in the run directory or where it can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tatar_dist.run.events import read_events


def run_process(code: str, *args: object) -> subprocess.CompletedProcess:
    code = "import logging, os, sys\nfrom tatar_dist.run.process import open_log\n" + code
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=60)


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_records_are_lines_of_json_with_their_traceback(tmp_path):
    code = """
open_log(sys.argv[1], "learner-0")
logging.getLogger("tatar_dist.x").info("step %d\\nof two lines", 3)
logging.getLogger("other").info("not of interest")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("other").exception("failed")
"""
    done = run_process(code, tmp_path)
    assert done.returncode == 0, done.stderr
    _, first, second = rows(tmp_path / "logs" / "learner-0.jsonl")
    assert (first["level"], first["logger"], first["message"]) == ("INFO", "tatar_dist.x", "step 3\nof two lines")
    assert first["host"] == os.uname().nodename and first["pid"] > 1 and first["time"] > 1e9
    assert second["message"] == "failed" and "ZeroDivisionError" in second["traceback"]


def test_what_native_code_prints_and_the_stack_of_a_crash_are_kept(tmp_path):
    code = """
open_log(sys.argv[1], "engine-1")
print("from python", flush=True)
os.write(2, b"from C\\n")
def crash():
    import ctypes
    ctypes.string_at(0)
crash()
"""
    done = run_process(code, tmp_path)
    assert done.returncode == -11 and done.stdout == done.stderr == ""
    text = (tmp_path / "logs" / "engine-1.out").read_text()
    assert text.startswith("from python\nfrom C\n")
    assert "Segmentation fault" in text and "in crash" in text


def test_the_controller_keeps_its_terminal(tmp_path):
    done = run_process("open_log(sys.argv[1], 'controller', printed=False); print('hello')", tmp_path)
    assert done.stdout == "hello\n"
    assert not (tmp_path / "logs" / "controller.out").exists()


def test_without_a_shared_file_system_it_logs_on_its_own_machine_and_says_so(tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    code = """
print(open_log(sys.argv[1], "reward", printed=False))
logging.getLogger("tatar_dist").info("still here")
"""
    done = run_process(f"os.environ['TMPDIR'] = {str(temporary)!r}\n" + code, tmp_path / "of another machine" / "grpo")
    directory = Path(done.stdout.strip())
    assert directory.parent == temporary and directory.stat().st_mode & 0o777 == 0o700
    _, said, after = rows(directory / "reward.jsonl")
    assert "does not see" in said["message"] and str(directory) in said["message"]
    assert after["message"] == "still here"
    assert not (tmp_path / "of another machine").exists()


def test_a_process_that_opens_a_second_log_leaves_the_first(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    code = """
for run in sys.argv[1:]:
    open_log(run, "controller", printed=False)
    logging.getLogger("tatar_dist").info(run)
"""
    run_process(code, tmp_path / "a", tmp_path / "b")
    for name in ("a", "b"):
        _, said = rows(tmp_path / name / "logs" / "controller.jsonl")
        assert said["message"] == str(tmp_path / name)


def test_the_event_log_says_where_a_process_started(tmp_path):
    code = "os.environ['CUDA_VISIBLE_DEVICES'] = '2,3'; open_log(sys.argv[1], 'reward', printed=False)"
    done = run_process(f"{code}; print(os.getpid())", tmp_path)
    (event,) = read_events(tmp_path)
    assert (event["event"], event["name"], event["pid"]) == ("process/started", "reward", int(done.stdout))
    assert event["host"] == os.uname().nodename and event["gpu"] == "2,3"
    message = rows(tmp_path / "logs" / "reward.jsonl")[0]["message"]
    assert message.startswith("reward starts") and message.endswith("CUDA_VISIBLE_DEVICES: 2,3")
