"""launch/submit.py asks Slurm only where Slurm can be asked."""

import importlib.util
from pathlib import Path

import pytest

from tatar_dist.errors import UserError


def test_sbatch_without_scontrol_is_one_line(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("submit", Path(__file__).parents[2] / "launch/submit.py")
    submit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(submit)
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch is here but scontrol is not"):
        submit.slurm_config()
    (tmp_path / "sbatch").unlink()
    assert submit.slurm_config() == ""
