"""Fixtures of the cluster tests: hosts, Slurm and Ray on them, and the tiny model of the integration tests.

A module says how many hosts it wants with `HOSTS = n` (2 when it does not), and which GPUs Slurm pretends on them with
`GPUS = ("2", …)` (none); it has the hosts, and Slurm, to itself.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hosts import Hosts
from ray_hosts import RayCluster
from slurm import Slurm

ROOT = Path(__file__).parents[2]


def _integration() -> object:
    path = Path(__file__).parents[1] / "integration" / "conftest.py"
    spec = importlib.util.spec_from_file_location("integration_fixtures", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


integration = _integration()
manifests = integration.manifests  # type: ignore[attr-defined]
model_untied = integration.model_untied  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def words(model_untied: str, manifests: list[str]) -> list[str]:
    """`key=value` for GRPO of the tiny model: two learners and two engines on CPU; all but `output`."""
    return integration.tiny_words(model_untied, manifests)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    with Hosts(getattr(request.module, "HOSTS", 2)) as found:
        yield found


@pytest.fixture(scope="module")
def slurm(request: pytest.FixtureRequest, hosts: Hosts) -> Iterator[Slurm]:
    with Slurm(hosts, getattr(request.module, "GPUS", ())) as found:
        yield found


@pytest.fixture(scope="module")
def submit(slurm: Slurm, words: list[str], tmp_path_factory: pytest.TempPathFactory):
    """submit(stage, 'key=value', ..., sbatch=[...]) -> (job, its directory with run/, logs/) of slurm/STAGE.sh."""

    def go(stage: str, *extra: str, sbatch: tuple[str, ...] = ("--nodes=2",), **env: str) -> tuple[str, Path]:
        directory = tmp_path_factory.mktemp("job")
        job = slurm.submit(
            [f"--output={directory}/job.log", *sbatch, f"slurm/{stage}.sh", *words, f"output={directory}/run", *extra],
            cwd=ROOT,
            env={"TATAR_LOGS": str(directory / "logs"), "TATAR_TMPDIR": "/tmp/ray", **env},
        )
        return job, directory

    return go


@pytest.fixture
def ray_cluster(tmp_path: Path) -> Iterator[Callable[[Hosts], RayCluster]]:
    """ray_cluster(hosts) -> a running RayCluster; it ends with the test, the hosts stay."""
    started: list[RayCluster] = []

    def start(hosts: Hosts, **options: int) -> RayCluster:
        directory = tmp_path / f"ray{len(started)}"
        directory.mkdir()
        started.append(RayCluster(hosts, directory, **options))
        return started[-1]

    yield start
    for cluster in started:
        cluster.close()
