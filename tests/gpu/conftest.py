"""Tests for a node with GPUs: `.venv/bin/python -m pytest tests/gpu`. Without GPUs they fail, they do not skip.

The model is the tiny one of the integration tests, in float32 unless a test says otherwise.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tatar_dist.cluster.ray_cluster import Cluster
from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config
from tatar_dist.prompts.source import PromptSource
from tatar_dist.rollout.engine import Sampling
from tatar_dist.run.directory import RunDirectory
from tatar_dist.sampling import make_sampler

_path = Path(__file__).parents[1] / "integration" / "conftest.py"
_spec = importlib.util.spec_from_file_location("integration_fixtures", _path)
assert _spec is not None and _spec.loader is not None
integration = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(integration)
manifests = integration.manifests
model_untied = integration.model_untied
model_tied = integration.model_tied


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpus(n): how many GPUs the test needs")


@pytest.fixture(autouse=True)
def gpus(request: pytest.FixtureRequest) -> int:
    """How many GPUs there are; `@pytest.mark.gpus(n)` says how many a test needs."""
    import torch

    mark = request.node.get_closest_marker("gpus")
    need, have = (mark.args[0] if mark else 1), torch.cuda.device_count()
    assert have >= need, f"needs {need} GPU(s) that torch sees, there are {have}: run tests/gpu on a node with GPUs"
    return have


@pytest.fixture
def make_config(manifests: list[str], tmp_path: Path, gpus: int) -> Callable[..., Config]:
    """make_config(model, 'key=value', ...) -> a checked Config for one learner and one engine."""

    def make(model: str, *words: str) -> Config:
        tiny = integration.tiny_words(model, manifests)
        one = [f"cluster.gpus_per_node={gpus}", "cluster.learners=1", "rollout.engines=1"]
        memory = ["rollout.gpu_memory_utilization=0.3"]
        return load_config([], [*tiny, f"output={tmp_path / 'run'}", *one, *memory, *words])

    return make


class Rig:
    """One learner and one engine, moved by hand."""

    def __init__(self, config: Config, cluster: Cluster, source: PromptSource) -> None:
        self.config = config
        self.learners = cluster.learners(1)
        self.pool = cluster.engines(1)
        self.pool.start(1)
        self.pool.started()
        self.learners.setup("grpo", 10)
        self.prompts = source.batch(make_sampler(config), config.grpo.prompts_per_step, 0)

    @property
    def engine(self):
        return self.pool.engines[0].actor

    def greedy(self) -> list[tuple[int, ...]]:
        groups = self.pool.generate(self.prompts, Sampling(1, 0.0, 40))
        return [g.completions[0].token_ids for g in groups]

    def learn(self) -> None:
        """One update that moves every part of the model: SFT on what the engine says."""
        from tatar_dist.types import LearnerRow

        groups = self.pool.generate(self.prompts, Sampling(4, 1.0, 40))
        rows = [
            LearnerRow(
                g.prompt.group_id, g.prompt.sample.image, g.prompt.text, c.token_ids, g.prompt.sample.task,
                float(i % 2) - 0.5, c.logprobs, g.prompt_token_ids, 1 / 40 / len(groups),
            )
            for g in groups
            for i, c in enumerate(g.completions)
        ]  # fmt: skip
        self.learners.grpo_step([[rows]], 0).result()

    def pushed(self, version: int) -> None:
        """The engine has taken `version` behind the pool's back."""
        self.pool.version = self.pool.engines[0].version = version


@pytest.fixture
def make_rig() -> Callable[[Config], Iterator[Rig]]:
    @contextmanager
    def make(config: Config) -> Iterator[Rig]:
        with RunDirectory(config) as directory, Cluster(config) as cluster:
            yield Rig(config, cluster, PromptSource(config, directory))

    return make
