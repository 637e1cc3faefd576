"""Costs and configurations that the simulator's tests share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from tatar_dist.config.load import load_config
from tatar_dist.plan.simulate.costs import (
    EngineCosts,
    LearnerCosts,
    OtherCosts,
    PushCosts,
    RewardCosts,
    StepCosts,
    prompt_tokens,
)
from tatar_dist.plan.simulate.step import Setup, generate, learn_seconds, step_parts, step_seconds

CONFIGS = Path(__file__).parents[2] / "configs"
LENGTHS = {"iqa": ((50, 60, 55), (40, 45, 70)), "iaa": ((150, 160, 190), (170, 200, 180))}
COSTS = StepCosts(
    lengths=LENGTHS,
    engine=EngineCosts(per_call=0.2, per_step=0.01, per_token=1e-4, per_prompt=0.03, serial=0.4),
    learner=LearnerCosts(0.5, 0.1, 0.02, 0.05, 1e-4, 0.2, serial=0.3),
    reward=RewardCosts(0.01, 1e-4),
    push=PushCosts(0.05, 2.0, 0.5),
    other=OtherCosts(0.02, 1e-4),
    model_gb=0.5,
)


def grpo(*words):
    return load_config([str(CONFIGS / "grpo.yaml")], list(words))


def demo(*words):
    return load_config([str(CONFIGS / "grpo.yaml"), str(CONFIGS / "demo.yaml")], ["output=x", *words])


GRPO, DEMO = grpo(), demo()
PROMPT = prompt_tokens(GRPO)


def setup_of(learners=1, engines=1, prompts=4, group_size=4, cores=None, **other):
    """A step of GRPO's config, small; `other`: values of its sections grpo and rollout."""
    sizes = {"prompts_per_step": prompts, "group_size": group_size, "micro_tokens": 400 + PROMPT} | other
    sections = {
        name: replace(section, **{k: v for k, v in sizes.items() if hasattr(section, k)})
        for name, section in (("grpo", GRPO.grpo), ("rollout", GRPO.rollout))
    }
    cluster = replace(GRPO.cluster, gpus_per_node=0)
    return Setup(replace(GRPO, cluster=cluster, **sections), learners, engines, cores)


def simulate_step(costs, setup, lengths):
    """The parts of a step with completions of `lengths` (P, G), its seconds and the busy seconds of its engines."""
    service, _ = generate(costs.engine, setup, lengths)
    parts = step_parts(costs, setup, service.seconds, learn_seconds(costs.learner, setup, lengths))
    step = step_seconds(parts, setup.config.grpo.staleness)
    return SimpleNamespace(**parts, step=step, engines_busy=service.busy)
