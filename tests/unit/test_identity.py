"""Every key of the configuration either belongs to a run's identity or is known not to change what is learned."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from tatar_dist.config.load import load_config
from tatar_dist.errors import UserError
from tatar_dist.rewards.presets import load_preset
from tatar_dist.run.identity import FREE, changes, identity, require_same

BASE = ["output=unused", "model.path=m"]


def of(stage: str, *words: str, wording: str = "rate it"):
    config = load_config([], [*BASE, *words])
    r = config.reward
    reward = asdict(load_preset(r.preset, r.weights, r.params))
    return json.loads(json.dumps(identity(config, stage, wording, reward)))


@pytest.mark.parametrize(
    "stage, word, key",
    [
        ("sft", "sft.optim.lr=5e-4", "sft.optim.lr"),
        ("sft", "sft.optim.betas=[0.8, 0.99]", "sft.optim.betas"),
        ("sft", "sft.epochs=4", "sft.epochs"),
        ("sft", "model.path=n", "model.path"),
        ("sft", "model.max_pixels=1000000", "model.max_pixels"),
        ("sft", "seed=1", "seed"),
        ("grpo", "grpo.kl_beta=0.5", "grpo.kl_beta"),
        ("grpo", "grpo.group_size=4", "grpo.group_size"),
        ("grpo", "grpo.advantage=mean", "grpo.advantage"),
        ("grpo", "rollout.temperature=0.7", "rollout.temperature"),
        ("grpo", "rollout.max_new_tokens=256", "rollout.max_new_tokens"),
        ("grpo", "reward.weights={gaussian: 2}", "reward.gaussian.weight"),
        ("grpo", "reward.params={gaussian_scale_iqa: 9}", "reward.gaussian.scale_iqa"),
        ("grpo", "data.iqa_fraction=0.25", "data.iqa_fraction"),
    ],
)
def test_what_changes_learning_changes_the_identity(stage, word, key):
    assert list(changes(of(stage), of(stage, word))) == [key]


def test_another_preset_is_named_by_what_it_changes():
    changed = changes(of("grpo"), of("grpo", "reward.preset=released"))
    assert "reward.name" in changed and all(key.startswith("reward.") for key in changed)


def test_prompts_count_by_their_text():
    assert list(changes(of("sft"), of("sft", wording="rate that"))) == ["data.prompts"]
    assert not changes(of("sft"), of("sft", "data.prompts=elsewhere.yaml"))


@pytest.mark.parametrize(
    "word",
    [
        "output=other",
        "cluster.learners=2",
        "rollout.engines=3",
        "checkpoint.every=7",
        "data.eval_limit=5",
        "grpo.eval_every=3",
        "grpo.micro_tokens=99",
        "model.gradient_checkpointing=false",
        "sft.optim.lr=1",
        "watch.stall_min_s=1",
    ],
)
def test_what_does_not_change_learning_is_free(word):
    assert not changes(of("grpo"), of("grpo", word))


def test_a_run_may_become_longer_where_no_schedule_looks_at_its_end():
    constant = "grpo.optim.schedule=constant"
    assert not changes(of("grpo", constant), of("grpo", constant, "grpo.epochs=9", "grpo.max_steps=8"))
    moving = (constant, "grpo.kl_schedule=linear")
    assert list(changes(of("grpo", *moving), of("grpo", *moving, "grpo.epochs=9"))) == ["grpo.epochs"]


def test_factors_of_the_learning_rate_that_come_or_go_are_seen():
    word = "grpo.optim.lr_scale={norm: 2}"
    for before, now in (((), (word,)), ((word,), ()), ((word,), ("grpo.optim.lr_scale={head: 2}",))):
        assert list(changes(of("grpo", *before), of("grpo", *now))) == ["grpo.optim.lr_scale"]


def test_a_reward_term_of_the_users_own_is_compared_by_its_name_and_constants(tmp_path, monkeypatch):
    (tmp_path / "my_term_of_identity.py").write_text("def mine(batch, answers):\n    return 0 * answers.value\n")
    monkeypatch.syspath_prepend(tmp_path)
    preset = tmp_path / "mine.yaml"
    text = "name: mine\nterms:\n  gaussian: {weight: 1}\n  mine: {function: my_term_of_identity.mine, weight: %s}\n"
    found = []
    for weight in (1.0, 2.0):
        preset.write_text(text % weight)
        found.append(of("grpo", f"reward.preset={preset}"))
    assert list(changes(*found)) == ["reward.custom.mine.weight"]


def test_what_shapes_the_optimizers_state_cannot_be_accepted():
    shape = ("optim.weight_decay=0.1", "optim.name=sgd", "optim.lr_scale={norm: 2}")
    for word in (*(f"grpo.{w}" for w in shape), "model.lora_rank=4"):
        with pytest.raises(UserError, match="which shapes the optimizer's state: give another output"):
            require_same("step_000001", of("grpo"), of("grpo", word), ["grpo", "model"])


def test_adapters_are_seen_against_a_checkpoint_of_an_earlier_version():
    old = {"stage": "grpo", "model.path": "m"}
    assert "model.lora_rank" in changes(old, of("grpo", "model.lora_rank=4"))
    assert not changes(old, of("grpo"))


def test_every_key_of_a_stage_is_free_or_counts():
    """A new key must be put into one of the two."""
    config = load_config([], BASE)
    for stage in ("sft", "grpo"):
        known = {k.removesuffix(".0") for k in of(stage, f"{stage}.optim.schedule=cosine")}
        for section in ("model", "data", stage):
            for key, value in asdict(getattr(config, section)).items():
                nested = isinstance(value, dict) and value  # optim, thought_dropout
                names = [f"{section}.{key}.{k}" for k in value] if nested else [f"{section}.{key}"]
                assert all(n in known | FREE | {"data.train"} for n in names), names


def test_a_key_that_is_newer_than_the_checkpoint_had_its_default():
    old = {k: v for k, v in of("grpo").items() if k != "grpo.scale"}
    was = {**old, "grpo.advantage": "std"}
    for word in ("grpo.scale=auto", "grpo.scale=group"):
        assert not changes(was, of("grpo", "grpo.advantage=std", word))
        assert not changes({**was, "grpo.scale": "group"}, of("grpo", "grpo.advantage=std", word))
    assert changes(was, of("grpo", "grpo.advantage=std", "grpo.scale=batch")) == {"grpo.scale": ["auto", "batch"]}
    assert changes(old, of("grpo")) == {"grpo.scale": ["group", "auto"]}  # per_term by group, now GDPO
    assert not changes({**old, "grpo.scale": "batch"}, of("grpo"))
    old = {k: v for k, v in of("sft").items() if "thought" not in k}
    word = "sft.thought_dropout.iqa=0.5"
    assert not changes(old, of("sft")) and list(changes(old, of("sft", word))) == ["sft.thought_dropout.iqa"]
