"""Pinning: engines and learners never share a core, each process has its share, some share one where cores are few."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tatar_dist.config.load import load_config
from tatar_dist.errors import UserError
from tatar_dist.rollout.options import COMMON_ENV, engine_environment
from tatar_dist.run import process
from tatar_dist.run.process import pin


@pytest.mark.parametrize(
    ("cores", "side", "count", "expected"),
    [
        (8, 0, 2, [{0, 1}, {2, 3}]),
        (8, 1, 4, [{4}, {5}, {6}, {7}]),
        (2, 1, 1, [{1}]),
        (4, 0, 3, [{0}, {0}, {1}]),  # two cores for three processes
        (1, 1, 1, [{0}]),
    ],
)
def test_each_process_has_its_share_of_its_half(monkeypatch, cores, side, count, expected):
    found: list[set[int]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, own: found.append(set(own)))
    monkeypatch.setattr(os, "listdir", lambda _: ["1"])
    for index in range(count):
        pin(None, side, index, count)
    assert found == expected


def test_compiled_kernels_are_kept_on_the_node_in_a_directory_of_this_user_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(process.tempfile, "tempdir", str(tmp_path))
    ours = tmp_path / f"tatar-dist-{os.getuid()}"
    for name in process.CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/chosen")
    process.use_node_caches()
    assert os.environ["TRITON_CACHE_DIR"] == "/chosen" and os.environ["VLLM_CACHE_ROOT"] == str(ours / "vllm")
    assert os.environ["FLASHINFER_WORKSPACE_BASE"] == str(ours / "flashinfer")
    assert ours.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("VLLM_CACHE_ROOT")
    ours.chmod(0o777)  # somebody else could put a kernel into it
    process.use_node_caches()
    other = Path(os.environ["VLLM_CACHE_ROOT"]).parent
    assert other != ours and other.parent == tmp_path and other.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def of_an_engine(monkeypatch) -> None:
    """Give this process the environment of an engine on GPUs."""
    config = load_config([], ["output=unused", "model.path=unused"])
    for name, value in (COMMON_ENV | engine_environment(config, True, 1)).items():
        monkeypatch.setenv(name, value)


def test_engines_run_the_model_runner_and_the_sampler_that_are_tested(of_an_engine):
    from vllm import envs

    assert envs.VLLM_USE_V2_MODEL_RUNNER is False and envs.VLLM_USE_FLASHINFER_SAMPLER is False


def test_workers_of_an_engine_are_spawned_because_cuda_does_not_survive_a_fork(of_an_engine):
    from vllm.utils.system_utils import get_mp_context

    assert get_mp_context().get_start_method() == "spawn"


def test_gpus_that_are_hidden_by_an_empty_variable_are_named_so(monkeypatch):
    for value, said in (("", "empty"), ("0", "0")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        with pytest.raises(UserError, match=rf"torch sees no GPU on .* \(CUDA_VISIBLE_DEVICES: {said}\): install"):
            process.check_gpu(8, False)
