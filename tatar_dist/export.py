"""Copies the trained model out of a run directory: a Hugging Face model directory that loads without our code."""

from __future__ import annotations

import shutil
from pathlib import Path

from tatar_dist.checkpoint import latest
from tatar_dist.errors import UserError


def model_of(run: str | Path) -> Path:
    """The model directory of a run's newest finished checkpoint. Raises UserError when there is none."""
    found = latest(Path(run))
    if found is None:
        raise UserError(f"{run}: no finished checkpoint in it")
    return found[0] / "model"


def run(run_directory: str | Path, output: str | Path) -> Path:
    """Copy the newest model of `run_directory` to `output`. Raises UserError when `output` exists and is not empty."""
    target = Path(output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{output}: exists and is not an empty directory")
    source = model_of(run_directory)
    try:
        return Path(shutil.copytree(source, target, dirs_exist_ok=True))
    except OSError as e:
        raise UserError(f"{output}: cannot write: {e.strerror or e}") from e
