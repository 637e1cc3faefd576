"""gpu-check's processes, deadlines, exit statuses and table; its parts run in integration/test_gpu_check.py."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from pretended_driver import pretended_driver
from rich.console import Console

from tatar_dist.cli import main
from tatar_dist.errors import RunError
from tatar_dist.gpu_check import learner_parts, runner, table
from tatar_dist.gpu_check.parts import PARTS, CheckSetting, Part

ROOT = Path(__file__).parents[2]
GPU = CheckSetting("cuda", 1)


def part(function, limit_s=60.0, **more):
    return Part(function, f"gpu_check_parts:{function}", limit_s, (), "a variant", **more)


def run(tmp_path, *parts, until=1000.0, setting=GPU, together=1):
    return list(runner.run_parts(parts, setting, tmp_path, time.monotonic() + until, together))


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("function", "status", "text"),
    [
        ("passes", "passed", "^a variant on cuda$"),
        ("exits_slowly", "passed", "^at last$"),
        ("fails", "failed", "^too far from the CPU's$"),
        ("breaks", "failed", "^KeyError: 'absent'$"),
        ("no_room", "skipped", "^takes 40 GiB, 20 are free$"),
        ("dies", "failed", r"^its process ended without a result \(SIGKILL\): last words$"),
        ("rubbish", "failed", r"^its process ended without a result \(exit status 0\)$"),
        ("figures_that_are_none", "failed", r"\(exit status 1\): TypeError: Object of type object is not JSON"),
    ],
)
def test_a_part_has_one_result_however_it_ends(tmp_path, monkeypatch, function, status, text):
    monkeypatch.setenv("RAY_ADDRESS", "another machine")  # which no part must ask
    (result,) = run(tmp_path, part(function))
    assert result["status"] == status and re.search(text, result["text"])
    assert result["figures"] == ({"figure": 1.5} if function == "passes" else {})


def test_a_part_that_hangs_is_ended_at_its_deadline_with_all_that_it_started(tmp_path):
    hung, after = run(tmp_path, part("hangs", 6.0), part("passes"))
    assert (hung["status"], after["status"]) == ("late", "passed")
    pids = (tmp_path / "hangs" / "pids").read_text().split()
    assert len(pids) == 2 and not any(alive(int(pid)) for pid in pids)
    assert "in hangs" in (tmp_path / "hangs.log").read_text()  # its stack


def test_what_outlives_a_part_is_ended(tmp_path):
    (result,) = run(tmp_path, part("leaves"))
    assert result["status"] == "passed" and not alive(int(result["text"]))


def test_a_budget_ends_the_running_part_and_starts_no_other(tmp_path):
    cut, after = run(tmp_path, part("hangs", 8.0), part("passes"), until=5.0)
    assert (cut["status"], after["status"]) == ("late", "no time") and 4.5 < cut["seconds"] < 8
    assert not (tmp_path / "passes").exists()


def test_an_interruption_ends_the_parts_that_run(tmp_path):
    results = runner.run_parts([part("hangs"), part("no_room")], GPU, tmp_path, time.monotonic() + 99, together=2)
    assert next(results)["part"] == "no_room"
    pids = tmp_path / "hangs" / "pids"
    deadline = time.monotonic() + 60
    while not pids.exists() or len(pids.read_text().split()) < 2:  # it starts in a process of its own
        assert time.monotonic() < deadline
        time.sleep(0.05)
    results.close()
    assert not any(alive(int(pid)) for pid in pids.read_text().split())


def test_a_part_needs_gpus_and_packages(tmp_path):
    parts = part("passes", gpus=2), part("passes", on_cpu=False), Part("x", "absent:f", 1, ("no_such", "json"))
    assert [p.missing(GPU) for p in parts] == ["needs 2 GPUs", None, "no_such not installed"]
    assert [p.missing(CheckSetting("cpu", 0)) for p in parts] == [None, "runs on GPUs only", "no_such not installed"]
    assert [r["status"] for r in run(tmp_path, parts[0], parts[2])] == ["skipped", "skipped"]


def command(tmp_path, *words, **environment):
    (tmp_path / "tmp").mkdir()
    places = {"TMPDIR": str(tmp_path / "tmp"), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "tatar_dist", "gpu-check", *words],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **places, **environment},  # no GPU, also where there is one
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a script started with &
    )  # fmt: skip


def started(process):
    """Wait until the command has started a part; return what it has started."""
    while not (children := psutil.Process(process.pid).children()):
        assert process.poll() is None
        time.sleep(0.02)
    return children


def test_ctrl_c_ends_all_processes_and_leaves_no_file(tmp_path):
    process = command(tmp_path, "--pretend")
    children = started(process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "tatar-dist: interrupted\n")
    assert psutil.wait_procs(children, 30)[1] == [] and os.listdir(tmp_path / "tmp") == []


def test_when_it_is_terminated_it_ends_what_it_started_and_leaves_no_file(tmp_path):
    process = command(tmp_path, "--pretend")
    children = started(process)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert psutil.wait_procs(children, 30)[1] == [] and os.listdir(tmp_path / "tmp") == []


def test_a_part_that_was_asked_for_and_skipped_is_no_success(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "PARTS", (part("passes"), part("asked", on_cpu=False), part("other", on_cpu=False)))
    skipped = lambda name: runner.blank(part(name), "skipped", "")  # noqa: E731
    figures = {"status": "passed", "figures": {"machine": None}}
    results = lambda parts, *_, **__: [skipped(p.name) | (figures if p.name == "passes" else {}) for p in parts]  # noqa: E731
    monkeypatch.setattr(runner, "run_parts", results)
    assert runner.check([], True, tmp_path)["ok"]
    assert not runner.check(["asked"], True, tmp_path)["ok"]


def test_zero3_that_is_apart_from_plain_torch_fails(monkeypatch):
    right = [2.0, 1.0, 0.5, 0.4]
    monkeypatch.setattr(learner_parts, "ProcessPoolExecutor", lambda n, context: ThreadPoolExecutor(n))
    monkeypatch.setattr(learner_parts, "_plain_steps", lambda device, ranks: right)
    for factor, dtype in ((1.01, "float32"), (1.1, "bfloat16"), (float("nan"), "bfloat16")):
        found = {name: [x * (factor if name == dtype else 1.0) for x in right] for name in learner_parts.ZERO3_LIMITS}
        monkeypatch.setattr(learner_parts, "_zero3_steps", lambda *_, found=found: found)
        with pytest.raises(RunError, match=f"^{dtype}: losses and gradient norms .*, by plain torch 2 1 0.5 0.4$"):
            learner_parts.zero3(CheckSetting("cpu", 1), "")
    monkeypatch.setattr(learner_parts, "_zero3_steps", lambda *_: dict.fromkeys(learner_parts.ZERO3_LIMITS, right))
    assert learner_parts.zero3(CheckSetting("cpu", 1), "")[1] == {"float32": 0.0, "bfloat16": 0.0}


def test_when_it_is_killed_its_parts_end(tmp_path):
    process = command(tmp_path, "--pretend")
    children = started(process)
    process.kill()
    process.communicate(timeout=60)
    assert psutil.wait_procs(children, 30)[1] == []


def refused(tmp_path, **environment):
    process = command(tmp_path, "--json", **environment)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 2 and out == "" and error.count("\n") == 1
    assert not (tmp_path / "cache").exists()
    return error


def test_without_a_gpu_it_is_one_line_and_status_2(tmp_path):
    assert re.search(r"^tatar-dist: .*: no GPU \(.*\); --pretend runs on the CPU$", refused(tmp_path))


def test_gpus_beside_the_cpu_build_are_one_line_and_status_2(tmp_path):
    (driver := tmp_path / "driver").mkdir()
    error = refused(tmp_path, **pretended_driver(driver, gpus=2), CUDA_VISIBLE_DEVICES="0,1")
    assert "torch is a CPU build: delete .venv and run `make setup DEVICE=cuda`" in error


def test_an_unknown_part_is_named(capsys):
    assert main(["gpu-check", "--part", "speed"]) == 2
    assert "--part speed: must be one of devices, packed, engine," in capsys.readouterr().err


def results():
    texts = {"packed": "float32 within 1e-06 of the CPU's, bfloat16 within 0.007", "sleep": "[no] markup"}
    statuses = ["passed", "failed", "late", "no time", "skipped"]
    for i, one in enumerate(PARTS):
        yield runner.blank(one, statuses[i % 5], texts.get(one.name, "a long line of words " * 6)) | {"seconds": 12.3}


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_shows_every_part_and_the_verdict_every_count(width):
    found = {
        "pretend": False,
        "machine": {"host": "here", "driver": "580.1"},
        "parts": list(results()),
        "seconds": 99.0,
    }
    console = Console(width=width, record=True, file=open(os.devnull, "w"))
    console.print(table.as_table(found))
    text = console.export_text()
    assert all(one.name in text for one in PARTS) and "[no] markup" in text and "driver 580.1" in text
    assert max(map(len, text.splitlines())) <= width
    said = table.verdict(found | {"logs": "/logs"})
    assert said.startswith("3 passed, 3 failed, 2 late, 2 no time, 2 skipped, 1 late (optional) in 99 s. Run the")
    assert said.endswith("/logs")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, None),
        ({"float32": (1e-4, 0.0)}, "float32: log-probabilities are 0.0001 from the CPU's, the limit is 1e-05"),
        ({"float32": (0.0, 1e-3)}, "float32: gradient are 0.001 from the CPU's, the limit is 0.0001"),
        ({"bfloat16": (0.03, 0.0)}, "bfloat16: log-probabilities are 0.03 from the CPU's, the limit is 0.02"),
        ({"checkpointed": (0.0, float("nan"))}, "checkpointed: gradient are nan from the CPU's, the limit is 0.02"),
    ],
)
def test_packed_fails_where_the_device_is_further_off_than_the_cpu(monkeypatch, found, said):
    import torch

    from tatar_dist.gpu_check import learner_parts

    right = torch.ones(4)

    def result(row, device, dtype=None, checkpointing=False):
        if device == "cpu":
            return [right * (1.0 if dtype is None else 1.01)] * 2
        name = "float32" if dtype is None else "checkpointed" if checkpointing else "bfloat16"
        return [right * (1 + far) for far in found.get(name, (0.0, 0.0))]

    monkeypatch.setattr(learner_parts, "packed_row", lambda pretend: None)
    monkeypatch.setattr(learner_parts, "result", result)
    if said is None:
        assert learner_parts.packed(GPU, "")[0] == "float32 within 0 of the CPU's, bfloat16 within 0"
        return
    with pytest.raises(RunError) as e:
        learner_parts.packed(GPU, "")
    assert str(e.value) == said


def test_the_shapes_of_speed_are_those_of_the_released_models():
    import torch

    from tatar_dist.gpu_check import learner_parts
    from tatar_dist.plan.memory import PUBLISHED, sizes_of

    _, backbone = learner_parts.backbone_of(112)
    for name in ("3B", "7B"):
        *text, tied, wide = PUBLISHED[name]
        with torch.device("meta"):
            config = learner_parts.shape(backbone, text, {"intermediate_size": wide}, tied)
            model = learner_parts.random_model(config, torch.bfloat16)
        assert model.num_parameters() == sizes_of(f"Qwen2.5-VL-{name}").parameters
        assert config.text_config.hidden_size // config.text_config.num_attention_heads == 128
        assert config.vision_config.hidden_size // config.vision_config.num_heads == 80
