"""launch/setup.sh takes only a torch that is what DEVICE says, and says so before anything large is downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CUDA_NEEDS = "Requires-Dist: nvidia-nccl-cu{}==2.29.7; platform_system == 'Linux'\n"


def wheel(directory: Path, version: str, cuda: str | None) -> None:
    """Make a wheel of torch with the metadata that tells its builds apart, and a module that knows its own."""
    info = f"torch-{version}.dist-info"
    needs = CUDA_NEEDS.format(cuda.split(".")[0]) if cuda else ""
    files = {
        "torch/__init__.py": f"from torch import version\n__version__ = {version!r}\n",
        "torch/version.py": f"cuda = {cuda!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(directory / f"torch-{version}-py3-none-any.whl", "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose pip finds the wheels in `wheels` and nothing else; no packages besides torch are there."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    shutil.copy(ROOT / "pyproject.toml", checkout)
    (tmp_path / "wheels").mkdir()
    return checkout


def setup(checkout: Path, device: str) -> tuple[int, list[str], str]:
    """Run the setup. Returns its status, the lines of its errors and what pip said."""
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(checkout.parent / "wheels"), "PIP_CONFIG_FILE": os.devnull}
    environment = {**os.environ, **pip, "DEVICE": device, "PYTHON": sys.executable, "TORCH_INDEX": ""}
    for name in ("PYTHONPATH", "VENV"):
        environment.pop(name, None)
    done = subprocess.run(["bash", "launch/setup.sh"], cwd=checkout, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr.strip().splitlines(), (checkout / ".venv/setup.log").read_text()


@pytest.mark.parametrize(
    ("device", "version", "cuda", "line"),
    [
        ("cuda", "2.13.0+cpu", None, "DEVICE=cuda, but pip would install a cpu build of torch: set TORCH_INDEX"),
        ("cuda", "2.13.0", None, "DEVICE=cuda, but pip would install a cpu build of torch: set TORCH_INDEX"),
        (
            "cuda",
            "2.13.0+cu126",
            "12.6",
            "a CUDA 12 build of torch (several GB): set TORCH_INDEX to the index of the CUDA",
        ),
        ("cpu", "2.13.0", "13.0", "DEVICE=cpu, but pip would install a cuda build of torch (several GB): set TORCH"),
    ],
)
def test_a_torch_of_the_other_kind_is_refused_before_vllm_is_asked_for(checkout, device, version, cuda, line):
    wheel(checkout.parent / "wheels", version, cuda)
    status, errors, log = setup(checkout, device)
    assert (status, len(errors)) == (2, 1) and line in errors[0], errors
    assert "vllm" not in log and not (checkout / ".venv/.device").exists()


def test_the_right_torch_is_taken_though_the_other_lies_beside_it_and_one_installed_is_not_replaced(checkout):
    for version, cuda in (("2.13.0+cpu", None), ("2.13.0", "13.0")):
        wheel(checkout.parent / "wheels", version, cuda)
    status, errors, log = setup(checkout, "cuda")
    assert status == 1 and "'Ray, vLLM, DeepSpeed, transformers, tools' failed" in errors[-1]  # torch itself was taken
    assert "Successfully installed torch-2.13.0\n" in log
    (checkout / ".venv/.device").unlink()  # as if made by hand
    status, errors, _ = setup(checkout, "cpu")
    assert (status, len(errors)) == (2, 1)
    assert errors[0].endswith("DEVICE=cpu, but the torch in .venv is a cuda build: remove .venv, or set DEVICE=cuda")
