"""Recipes of configs/gpu: each fits the machine it names, and its header says what `plan` says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tatar_dist.config.load import load_config
from tatar_dist.plan import memory
from tatar_dist.plan.plan import resolve
from tatar_dist.plan.simulate.estimate import estimate
from tatar_dist.plan.simulate.forecast import Simulator, duration

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs/gpu").glob("*.yaml"))
CARDS = {"24gb": ("4090",), "80gb": ("H100", "A100"), "eight": ("H100", "A100")}
GIB = {"24gb": 23.6, "80gb": 79.1, "eight": 79.1}  # as PyTorch reports it


def config_of(recipe, stage, *words):
    return load_config([str(ROOT / f"configs/{stage}.yaml"), str(recipe)], list(words))


def predicted(config, card):
    plan = resolve(config, "grpo")
    simulator = Simulator(config, estimate(config, card), shared_cores=True)
    return simulator.predict(plan.learners, plan.engines, config.cluster.placement)


def stages_of(recipe):
    return ["grpo"] if re.search("For GRPO; SFT as in", recipe.read_text()) else ["sft", "grpo"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_and_its_header_says_what_plan_says(recipe):
    kind = next(kind for kind in CARDS if kind in recipe.stem)
    stages = []
    for stage in stages_of(recipe):
        config = config_of(recipe, stage)
        estimated = memory.estimate(config, resolve(config, stage), GIB[kind])
        assert not estimated.advice
        roles = [f"{m.role} {m.total / memory.GIB:.1f}" for m in estimated.roles]
        if sequences := estimated.roles[-1].sequences:
            roles[-1] += f" with {sequences} sequences"
        if estimated.node:
            roles.append(f"of the node's own {sum(estimated.node.values()) / memory.GIB:.0f}")
        stages.append(f"{stage} {', '.join(roles)}")
    expected = [f"#   memory on GPUs of {GIB[kind]} GiB: {'; '.join(stages)}"]
    for card in CARDS[kind]:
        step = predicted(config_of(recipe, "grpo"), card)
        parts = [name for name in ("generate", "learn", "sync", "switch") if name in step.parts]
        listed = ", ".join(f"{name} {duration(step.parts[name])}" for name in parts)
        expected.append(f"#   a GRPO step on {card}: {duration(step.step_seconds)} ({listed})")
    text = recipe.read_text().splitlines()
    assert [line for line in text if re.match("#   (memory|a GRPO step) on", line)] == expected


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_how_to_start_each_stage_and_is_in_the_table_of_recipes(recipe):
    text = recipe.read_text()
    for stage in stages_of(recipe):
        assert re.search(rf'^#   make {stage} .*ARGS="--config configs/gpu/{recipe.name}[ "]', text, re.MULTILINE)
    assert f"| `gpu/{recipe.name}` |" in (ROOT / "configs/README.md").read_text()


def test_recipes_of_the_paper_change_no_figure_of_the_paper():
    """All of the machine, none of the method: what the sections say of the data, the batch and the loss."""
    paper = config_of(ROOT / "configs/grpo.yaml", "grpo")
    for name in ("eight-80gb-7b", "eight-80gb-7b-stale"):
        config = config_of(ROOT / f"configs/gpu/{name}.yaml", "grpo", "grpo.staleness=0")
        assert (config.model, config.data, config.grpo, config.reward) == (
            paper.model, paper.data, paper.grpo, paper.reward,
        )  # fmt: skip


def test_every_engine_of_a_recipe_has_work_and_no_gpu_is_idle():
    for recipe in RECIPES:
        plan = resolve(config_of(recipe, "grpo"), "grpo")
        assert plan.gpus_used == plan.gpus and not plan.notes, recipe.stem
