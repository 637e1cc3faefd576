"""What `DEVICE=cuda make setup` has installed: versions, libraries, and commands on a machine without a driver."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "launch" / "constraints-cuda.txt"


def pinned(path: Path) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def run(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_every_package_has_the_pinned_version():
    found = {}
    for name in pinned(CONSTRAINTS):
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:  # of another platform
            continue
    assert {"torch", "vllm", "deepspeed", "ray", "transformers"} <= found.keys()
    assert {n: v for n, v in found.items() if v != pinned(CONSTRAINTS)[n]} == {}


def test_requirements_of_all_packages_are_met():
    """Except of those that bring the demo's photographs, which are installed without theirs."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    for_pictures = set(pinned(ROOT / "launch" / "photos.txt"))
    assert [line for line in done.stdout.splitlines() if line.split()[0] not in {*for_pictures, "No"}] == []


def test_torch_compiler_and_nccl_are_of_one_cuda():
    import torch
    import triton

    assert torch.version.cuda == "13.0" and torch.cuda.nccl.version() == (2, 29, 7) and triton.__version__ == "3.7.1"
    (nvcc,) = Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu*/bin/nvcc")
    assert f"release {torch.version.cuda}," in run({}, str(nvcc), "--version")


@pytest.mark.parametrize(
    "command",
    [
        ["doctor"],
        ["plan", "--config", "configs/grpo.yaml"],
        ["sft", "--config", "configs/sft.yaml", "--dry-run"],
        ["grpo", "--config", "configs/grpo.yaml", "--dry-run"],
        ["evaluate", "--config", "configs/eval.yaml", "--dry-run"],
    ],
    ids=lambda command: command[0],
)
def test_a_command_that_starts_nothing_needs_no_driver(without_gpu, command):
    assert run(without_gpu, str(Path(sys.executable).with_name("tatar-dist")), *command)


@pytest.mark.parametrize("module", ["vllm", "deepspeed", "tatar_dist.sync", "tatar_dist.learner.actor"])
def test_a_module_imports_without_a_driver(without_gpu, module):
    run({**without_gpu, "DS_ACCELERATOR": "cuda"}, sys.executable, "-c", f"import {module}")


def test_doctor_sees_the_gpus(without_gpu, tmp_path):
    from pretended_driver.cuda import pretended_cuda

    environment = {**without_gpu, **pretended_cuda(tmp_path, gpus=2)}
    said = run(environment, str(Path(sys.executable).with_name("tatar-dist")), "doctor", "--all")
    assert re.search(r"2 x NVIDIA H100", said), said


def test_the_identity_of_a_group_of_the_real_nccl_is_made_without_a_gpu_and_is_what_vllm_takes(monkeypatch):
    import base64

    from vllm.distributed.device_communicators import pynccl_wrapper
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo

    from tatar_dist.sync.nccl import NcclSender

    monkeypatch.setattr(pynccl_wrapper, "find_nccl_library", lambda: "libnccl.so.2")  # torch has loaded it
    sender = NcclSender(SimpleNamespace(), 0, None)
    one, two = sender.unique_id(), sender.unique_id()
    assert one != two and len(base64.b64decode(one)) == 128
    NCCLWeightTransferInitInfo(nccl_unique_id_b64=one, world_size=3, packed=True, rank_offset=1)


def test_a_push_by_cuda_ipc_arrives():
    run(dict(os.environ), sys.executable, str(Path(__file__).with_name("ipc_push.py")))
