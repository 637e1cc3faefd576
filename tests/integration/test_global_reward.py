"""The reward sees the global batch: an IAA reward depends on other images' completions, whichever engine made them."""

from __future__ import annotations

import dataclasses

import numpy as np
import ray

from tatar_dist.cluster import Cluster
from tatar_dist.controller import make_sampler
from tatar_dist.prompt_source import PromptSource
from tatar_dist.records import Completion
from tatar_dist.rollout.engine import Sampling
from tatar_dist.run_directory import RunDirectory


def answering(group, number: str):
    """The group with every completion replaced by one answer."""
    text = f"<think>a plain view</think><answer>{number}</answer>"
    return dataclasses.replace(
        group, completions=tuple(Completion(text, (1,), (0.0,), "stop") for _ in group.completions)
    )


def test_iaa_reward_depends_on_another_engines_images_and_iqa_reward_does_not(model_untied, make_config):
    config = make_config(model_untied, "rollout.deterministic=true")
    with RunDirectory(config) as directory, Cluster(config) as cluster:
        pool = cluster.engines(2)
        pool.start(1)
        pool.started()
        prompts = PromptSource(config, directory).batch(make_sampler(config), 4, 0)
        iaa = [p for p in prompts if p.sample.task == "iaa"]
        iqa = [p for p in prompts if p.sample.task == "iqa"]
        sampling = Sampling(4, 1.0, 40, 0, 0)
        # the first image of each task goes to engine 0, the second to engine 1
        calls = [e.actor.generate.remote([iaa[i], iqa[i]], sampling, 0) for i, e in enumerate(pool.engines)]
        (iaa0, iqa0), (iaa1, iqa1) = ray.get(calls)
        scorer = cluster.scorer()

        def rewards(groups):
            scored, _ = scorer.score(groups)
            return {s.group.prompt.group_id: s for s in scored}

        fixed_iaa, fixed_iqa = answering(iaa0, "50.00"), answering(iqa0, "50.00")
        parts = []
        for number in ("10.00", "90.00"):
            groups = [fixed_iaa, fixed_iqa, answering(iaa1, number), answering(iqa1, number)]
            parts.append(rewards(groups))
        first, second = parts
        iaa_id, iqa_id = iaa0.prompt.group_id, iqa0.prompt.group_id
        change = np.abs(first[iaa_id].terms["thurstone"] - second[iaa_id].terms["thurstone"])
        assert change.min() > 1e-3
        assert np.array_equal(first[iqa_id].reward, second[iqa_id].reward)
        assert np.array_equal(first[iqa_id].terms["gaussian"], second[iqa_id].terms["gaussian"])
        # and with the completions the two engines really made
        real = rewards([iaa0, iqa0, iaa1, iqa1])
        altered = rewards([iaa0, iqa0, answering(iaa1, "1.00"), answering(iqa1, "1.00")])
        assert np.array_equal(real[iqa_id].reward, altered[iqa_id].reward)
        assert not np.array_equal(real[iaa_id].reward, altered[iaa_id].reward)
