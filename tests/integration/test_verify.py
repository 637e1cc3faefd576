"""The check before training passes after a push that worked and stops a run whose push did not."""

from __future__ import annotations

import pytest
from test_weight_sync import Rig

from tatar_dist.cluster import Cluster
from tatar_dist.learner.actor import WeightsOutOfSync
from tatar_dist.prompt_source import PromptSource
from tatar_dist.run_directory import RunDirectory
from tatar_dist.sync.verify import verify


def test_a_skipped_push_is_noticed_and_a_real_one_is_not(model_untied, make_config):
    config = make_config(model_untied, "grpo.optim.lr=0.003", "grpo.optim.schedule=constant")
    with RunDirectory(config) as directory, Cluster(config) as cluster:
        rig = Rig(config, cluster, PromptSource(config, directory))
        rig.learn(rig.generate())
        with pytest.raises(WeightsOutOfSync, match="push was skipped"):
            verify(rig.pool, rig.learners, rig.prompts, config)
        rig.push()
        before = {n: w.sum() for n, w in rig.weights().items()}
        gap = verify(rig.pool, rig.learners, rig.prompts[:3], config)  # an odd number, over two learners
        assert 0 < gap["sync/logprob_gap"] <= gap["sync/logprob_gap_max"] < 1e-4
        assert {n: w.sum() for n, w in rig.weights().items()} == before  # it only looks
