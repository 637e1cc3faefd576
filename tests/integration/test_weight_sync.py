"""After every push the engines sample from the learners' weights, all of them; and a push gone wrong is noticed."""

from __future__ import annotations

import numpy as np
import pytest
import ray

from tatar_dist.cluster import Cluster
from tatar_dist.controller import make_sampler
from tatar_dist.learner.actor import WeightsOutOfSync
from tatar_dist.prompt_source import PromptSource
from tatar_dist.records import LearnerRow
from tatar_dist.rollout.engine import RolloutEngine, Sampling, WrongWeightVersion
from tatar_dist.run_directory import RunDirectory
from tatar_dist.sync.source import from_wire

PARTS = {"vision": "visual.", "language": "language_model.layers.", "embedding": "embed_tokens"}


class ForgetfulEngine(RolloutEngine):
    """Drops the prefix cache after a push and forgets the vision tower's cached outputs."""

    def _reset_caches(self) -> None:
        self.llm.reset_prefix_cache()


class Rig:
    """Learners, engines and fixed prompts of one model, stepped by hand with made-up advantages."""

    def __init__(self, config, cluster, source, engine_class=RolloutEngine):
        self.config, self.step = config, 0
        self.learners = cluster.learners(2)
        self.pool = cluster.engines(2, cls=engine_class)
        self.pool.start(1)
        self.learners.setup("grpo", 10)
        self.pool.started()
        self.prompts = source.batch(make_sampler(config), config.grpo.prompts_per_step, 0)

    def generate(self):
        groups = self.pool.generate(self.prompts, Sampling(4, 1.0, 40, 0, self.step))
        assert {g.weight_version for g in groups} == {self.pool.version}
        return groups

    def learn(self, groups):
        """One update towards random advantages; returns the step's metrics. Raises WeightsOutOfSync."""
        rng = np.random.default_rng(self.step)
        rows = [
            LearnerRow(
                g.prompt.group_id, g.prompt.sample.image, g.prompt.text, c.token_ids, g.prompt.sample.task,
                float(rng.normal()), c.logprobs, g.prompt_token_ids, 1 / 40 / len(groups),
            )
            for g in groups
            for c in g.completions
        ]  # fmt: skip
        self.step += 1
        half = len(rows) // 2
        return self.learners.grpo_step([[rows[:half]], [rows[half:]]], 0).metrics

    def weights(self):
        found = {}
        for ref in self.learners.weight_buckets(1 << 20):
            found |= {n: from_wire(w).clone() for n, w in ray.get(ref).items()}
        return found

    def push(self):
        return self.pool.push(self.learners.weight_buckets(1 << 20), self.pool.version + 1)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_engines_follow_the_learners_through_three_steps_and_notice_when_they_do_not(tied, request, make_config):
    model = request.getfixturevalue("model_tied" if tied else "model_untied")
    config = make_config(model, "grpo.optim.lr=0.003", "grpo.optim.schedule=constant")
    with RunDirectory(config) as directory, Cluster(config) as cluster:
        source = PromptSource(config, directory)
        rig = Rig(config, cluster, source)
        before = rig.weights()
        assert ("lm_head.weight" in before) == (not tied)
        for _ in range(3):
            metrics = rig.learn(rig.generate())
            assert metrics["sync/logprob_gap_max"] < 1e-4
            assert metrics["optim/grad_norm"] > 0
            sync = rig.push()
        assert sync["sync/bytes"] == 2 * sum(t.numel() * 4 for t in before.values())  # two engines, float32
        after = rig.weights()
        parts = PARTS if tied else {**PARTS, "head": "lm_head"}
        for part, mark in parts.items():
            moved = max(float((after[n] - before[n]).abs().max()) for n in before if mark in n)
            assert moved > 1e-3, f"{part} did not change, so the comparison proves nothing for it"
        assert rig.learn(rig.generate())["sync/logprob_gap_max"] < 1e-4  # weights of version 3, the same prompts
        # now the update of the line above is not pushed
        with pytest.raises(WeightsOutOfSync, match="push was skipped"):
            rig.learn(rig.generate())


def test_bfloat16_weights_are_two_bytes_each_on_the_wire(model_untied, make_config):
    config = make_config(model_untied, "model.dtype=bfloat16", "grpo.logprob_gap_limit=0.05")
    with RunDirectory(config) as directory, Cluster(config) as cluster:
        rig = Rig(config, cluster, PromptSource(config, directory))
        weights = rig.weights()
        assert {str(t.dtype) for t in weights.values()} == {"torch.bfloat16"}
        assert rig.push()["sync/bytes"] == 2 * 2 * sum(t.numel() for t in weights.values())  # two engines
        assert rig.learn(rig.generate())["sync/logprob_gap"] < 0.05


def test_a_push_without_an_encoder_cache_reset_is_noticed(model_untied, make_config):
    config = make_config(model_untied, "grpo.optim.lr=0.003", "grpo.optim.schedule=constant")
    with RunDirectory(config) as directory, Cluster(config) as cluster:
        rig = Rig(config, cluster, PromptSource(config, directory), ForgetfulEngine)
        rig.learn(rig.generate())
        rig.push()
        with pytest.raises(WeightsOutOfSync, match="encoder"):
            rig.learn(rig.generate())


def test_an_engine_refuses_to_sample_from_another_weight_version(model_untied, make_config):
    config = make_config(model_untied, "rollout.engines=1")
    with RunDirectory(config) as directory, Cluster(config) as cluster:
        pool = cluster.engines(1)
        pool.start(2)
        pool.started()
        prompts = PromptSource(config, directory).batch(make_sampler(config), 4, 0)
        # as if a restarted engine, which holds the initial weights, were asked for version 5
        with pytest.raises(WrongWeightVersion, match="holds weight version 0, asked for 5"):
            ray.get(pool.engines[0].actor.generate.remote(prompts, Sampling(2, 1.0, 8), 5))
