"""The configuration is read and checked before anything starts; every fault is one line that names the key."""

from pathlib import Path

import pytest

from tatar_dist.config import foreign
from tatar_dist.config.load import known_keys, load_config
from tatar_dist.config.schema import Config, to_yaml
from tatar_dist.errors import UserError
from tatar_dist.rewards.presets import load_preset

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = ["output=runs/x", "model.path=m"]
AT_LEAST_ONE = (  # those that are null mean "no limit" and pass
    "cluster.nodes",
    "cluster.object_store_mib",
    "cluster.zero_hpz_partition_size",
    "data.eval_limit",
    "sft.global_batch",
    "sft.micro_tokens",
    "sft.max_steps",
    "grpo.prompts_per_step",
    "grpo.micro_tokens",
    "grpo.inner_iterations",
    "grpo.max_steps",
    "grpo.refill_limit",
    "rollout.tensor_parallel",
    "rollout.max_new_tokens",
    "rollout.max_num_seqs",
    "rollout.bucket_mib",
    "rollout.min_engines",
    "checkpoint.keep",
)
ABOVE_ZERO = (
    "cluster.learner_cpus",
    "cluster.engine_cpus",
    "cluster.start_timeout_s",
    "cluster.collective_timeout_s",
    "rollout.call_timeout_s",
    "rollout.suspect_after_s",
    "rollout.push_timeout_s",
    "rollout.restart_backoff_s",
    "model.lora_alpha",
    "checkpoint.grace_seconds",
)
NOT_NEGATIVE = (
    "model.lora_rank",
    "cluster.learners",
    "cluster.gpus_per_node",
    "sft.eval_every",
    "sft.optim.lr",
    "sft.optim.warmup_steps",
    "grpo.eval_every",
    "grpo.staleness",
    "grpo.kl_beta",
    "grpo.kl_beta_end",
    "grpo.clip_low",
    "grpo.clip_high",
    "grpo.advantage_eps",
    "grpo.logprob_gap_limit",
    "grpo.optim.lr",
    "grpo.optim.warmup_steps",
    "rollout.engines",
    "evaluate.samples",
    "evaluate.bootstrap",
    "checkpoint.every",
    "checkpoint.keep_every",
    "cluster.learner_restarts",
    "cluster.node_wait_s",
    "rollout.engine_restarts",
    "rollout.push_check_s",
    "watch.stall_factor",
    "watch.stall_min_s",
)


@pytest.mark.parametrize("name", ["sft.yaml", "grpo.yaml", "eval.yaml"])
def test_shipped_config_loads_without_overrides(name):
    assert isinstance(load_config([str(CONFIGS / name)], []), Config)


def test_demo_config_only_lacks_what_the_demo_sets():
    assert load_config([str(CONFIGS / "demo.yaml")], ["output=runs/x"]).cluster.gpus_per_node == 0


@pytest.mark.parametrize("name", ["sft.yaml", "grpo.yaml"])
def test_every_value_of_a_recipe_says_where_it_comes_from(name):
    """A comment on the line, or in the block of comments right above it."""
    above = ""
    for line in (CONFIGS / name).read_text().splitlines():
        is_value = line.strip() and not line.strip().startswith("#") and not line.rstrip().endswith(":")
        if is_value:
            assert any(tag in line + above for tag in ("[paper]", "[released]", "[ours]", "constants stand in")), line
        above = above + line if line.strip().startswith("#") else ""


def test_later_files_and_words_win(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\nsft: {epochs: 5}\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    c = load_config([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")], [*MINIMAL, "sft.optim.lr=1e-3"])
    assert (c.seed, c.sft.epochs, c.sft.optim.lr) == (2, 5.0, 1e-3)


def test_unknown_key_is_named_with_the_nearest_one():
    with pytest.raises(UserError, match=r"sft\.optim\.learning.*sft\.optim"):
        load_config([], [*MINIMAL, "sft.optim.learning_rate=1"])
    with pytest.raises(UserError, match="did you mean 'grpo.group_size'"):
        load_config([], [*MINIMAL, "grpo.groupsize=4"])


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("grpo.num_generations=8", "'grpo.num_generations'; TRL's num_generations is grpo.group_size here"),
        ("actor_rollout_ref.actor.clip_ratio_high=0.28", "verl's actor.clip_ratio_high is grpo.clip_high here"),
        ("loss_type=dapo", "TRL's loss_type is grpo.aggregation here (grpo, seq-mean-token-mean: sequence-mean"),
        ("trainer.total_epochs=2", "verl's trainer.total_epochs is grpo.epochs here"),
    ],
)
def test_a_name_of_trl_or_verl_is_answered_with_ours(word, answer):
    with pytest.raises(UserError) as refused:
        load_config([], [*MINIMAL, word])
    assert answer in str(refused.value)


def test_every_foreign_name_leads_to_a_key_of_ours_and_none_is_one():
    for name in foreign.NAMES:
        assert name.ours in known_keys() or any(k.startswith(f"{name.ours}.") for k in known_keys()), name
        for theirs in filter(None, (name.trl, f"actor_rollout_ref.{name.verl}" if name.verl else "")):
            assert f"{name.trl if theirs == name.trl else name.verl} is " in foreign.ours(theirs, 1)
    assert foreign.ours("grpo.groupsize", 4) == "" == foreign.ours("nothing", {"of": {"theirs": 1}})


def test_keys_of_the_policy_loss_fit_each_other():
    for words, said in (
        (["grpo.clip_delta=1.1"], "set it above 1.2, or null"),
        (["grpo.clip_delta=3", "grpo.objective=sapo"], r"grpo.objective=clip \(now sapo\)"),
        (["grpo.importance_floor=0.5"], "belongs to grpo.importance_mode=mask"),
    ):
        with pytest.raises(UserError, match=said):
            load_config([], [*MINIMAL, *words])
    load_config([], [*MINIMAL, "grpo.clip_delta=3", "grpo.importance_mode=mask", "grpo.importance_floor=0.5"])


def test_wrong_type_is_named():
    with pytest.raises(UserError, match="grpo.group_size"):
        load_config([], [*MINIMAL, "grpo.group_size=many"])


def test_missing_value_missing_file_and_broken_yaml_are_named(tmp_path):
    with pytest.raises(UserError, match="model.path"):
        load_config([], ["output=x"])
    with pytest.raises(UserError, match="nowhere.yaml: no such config file"):
        load_config(["nowhere.yaml"], MINIMAL)
    (tmp_path / "empty.yaml").write_text("# seed: 1\n")
    (tmp_path / "date.yaml").write_text("track: {name: 2026-01-31}\n")
    named = load_config([str(tmp_path / "empty.yaml"), str(tmp_path / "date.yaml")], MINIMAL).track.name
    assert named == "2026-01-31", "the same text as with track.name=2026-01-31"
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2\n")
    with pytest.raises(UserError, match="bad.yaml: not valid YAML"):
        load_config([str(tmp_path / "bad.yaml")], MINIMAL)


@pytest.mark.parametrize(
    "word",
    [
        "model.dtype=float16",
        "grpo.group_size=1",
        "grpo.staleness=-1",
        "cluster.pin_cores=true",  # with GPUs
        "data.iqa_fraction=1.5",
        "data.min_rank_pool=1",
        "rollout.temperature=0",
        "sft.optim.lr_scale={norm: -1}",
        "sft.epochs=-3",
        "sft.optim.clip_norm=-1",
        "sft.optim.weight_decay=-1",
        "grpo.optim.betas=[0.9, 1.5]",
        "grpo.optim.eps=0",
        "reward.preset=tatr",
    ],
)
def test_impossible_value_is_refused_by_name(word):
    with pytest.raises(UserError, match=word.split("=")[0].rsplit(".", 1)[-1]):
        load_config([], [*MINIMAL, word])


@pytest.mark.parametrize("key", AT_LEAST_ONE)
def test_what_must_be_at_least_one_is_refused_below(key):
    with pytest.raises(UserError, match=f"^{key}=0: must be at least 1$"):
        load_config([], [*MINIMAL, f"{key}=0"])


@pytest.mark.parametrize("key", ABOVE_ZERO)
@pytest.mark.parametrize("value", ["0.0", "-1.0", "nan"])
def test_what_must_be_above_zero_is_refused_at_zero_and_below(key, value):
    with pytest.raises(UserError, match=f"^{key}={value}: must be above 0$"):
        load_config([], [*MINIMAL, f"{key}=.nan" if value == "nan" else f"{key}={value}"])


@pytest.mark.parametrize("key", NOT_NEGATIVE)
def test_what_must_not_be_negative_is_refused_below_zero_and_taken_at_zero(key):
    load_config([], [*MINIMAL, f"{key}=0"])
    with pytest.raises(UserError, match=f"^{key}=-1(.0)?: must not be negative$"):
        load_config([], [*MINIMAL, f"{key}=-1"])


@pytest.mark.parametrize("key", ["sft.max_steps", "grpo.max_steps", "data.eval_limit"])
def test_a_limit_may_be_absent_or_one(key):
    for value in ("null", "1"):
        load_config([], [*MINIMAL, f"{key}={value}"])


def test_answers_that_fill_the_context_are_refused_and_a_generous_prompt_limit_is_not():
    words = [*MINIMAL, "rollout.max_model_len=512", "data.max_prompt_tokens=500"]
    load_config([], [*words, "rollout.max_new_tokens=511"])
    with pytest.raises(UserError, match="^rollout.max_new_tokens=512 .*rollout.max_model_len=512"):
        load_config([], [*words, "rollout.max_new_tokens=512"])


def test_zero_learners_and_engines_mean_automatic():
    c = load_config([], [*MINIMAL, "cluster.learners=0", "rollout.engines=0"])
    assert (c.cluster.learners, c.rollout.engines) == (0, 0)


@pytest.mark.parametrize("preset", ["tatar", "released", "binary"])
def test_generation_limit_below_the_words_the_reward_asks_for_is_refused(preset):
    with pytest.raises(UserError, match="rollout.max_new_tokens=180"):
        load_config([], [*MINIMAL, f"reward.preset={preset}", "rollout.max_new_tokens=180"])


@pytest.mark.parametrize(
    "words",
    [
        ["rollout.max_new_tokens=224"],  # what the demo uses
        ["rollout.max_new_tokens=100", "reward.weights.length=0"],
        ["rollout.max_new_tokens=100", "data.iqa_fraction=1.0"],
        ["rollout.max_new_tokens=100", "reward.params.length_iaa_min=40"],
    ],
)
def test_generation_limit_passes_where_the_words_fit_or_are_not_asked_for(words):
    load_config([], [*MINIMAL, *words])


def test_resolved_config_reads_back_equal(tmp_path):
    c = load_config([], [*MINIMAL, "seed=7", "reward.weights.length=0.5"])
    (tmp_path / "config.yaml").write_text(to_yaml(c))
    assert load_config([str(tmp_path / "config.yaml")], []) == c


def test_known_keys_reach_the_leaves():
    assert {"grpo", "grpo.optim.lr", "rollout.engines"} <= set(known_keys())


def test_engines_that_sleep_while_learners_work_cannot_work_ahead():
    apart = load_config([], [*MINIMAL, "grpo.staleness=2", "cluster.gpus_per_node=8"])
    assert apart.grpo.staleness == 2
    words = ["cluster.placement=colocated", "rollout.push=cuda_ipc"]
    with pytest.raises(UserError, match=r"grpo.staleness=2: .*cluster.placement=colocated has nothing to gain"):
        load_config([], [*MINIMAL, "grpo.staleness=2", "cluster.gpus_per_node=8", *words])


def test_fp8_engines_need_bfloat16_weights_and_a_limit_that_their_rounding_passes():
    fp8 = [*MINIMAL, "rollout.quantization=fp8"]
    assert load_config([], [*fp8, "grpo.logprob_gap_limit=0.15"]).rollout.quantization == "fp8"
    with pytest.raises(
        UserError, match=r"^rollout.quantization=fp8: .*limit=0.05 would stop .*set it to 0.15 or more$"
    ):
        load_config([], fp8)
    with pytest.raises(UserError, match="^rollout.quantization=fp8 .*: model.dtype=float32 cannot be used$"):
        load_config([], [*fp8, "grpo.logprob_gap_limit=0.15", "model.dtype=float32"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("grpo.group_size=1", "must be at least 2; an advantage compares completions of one prompt"),
        ("rationale.verdict.reject_at=5", "must be at most 4; marks are 1 to 5"),
        ("rationale.splits=[all]", "must be one of train, validation, test; null takes all rows"),
    ],
)
def test_a_message_ends_with_the_reason_of_the_limit(word, message):
    with pytest.raises(UserError) as caught:
        load_config([], [*MINIMAL, word])
    assert str(caught.value).endswith(message)


def test_the_later_of_repeated_words_and_files_wins(tmp_path):
    for name, seed in (("a.yaml", 1), ("b.yaml", 2)):
        (tmp_path / name).write_text(f"seed: {seed}\n")
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    assert load_config([a, b, a], ["model.path=x", "output=y"]).seed == 1
    assert load_config([], ["model.path=x", "output=y", "seed=1", "seed=2", "seed=1"]).seed == 1


@pytest.mark.parametrize(
    ("word", "says"), [("model=[1,2]", "model=\\[1,2\\]: "), ("seed=${nope}", "key 'seed': .*nope")]
)
def test_what_omegaconf_cannot_merge_is_one_line(word, says):
    with pytest.raises(UserError, match=says) as e:
        load_config([], ["model.path=x", "output=y", word])
    assert "\n" not in str(e.value)


def test_constants_of_a_preset_may_be_words_and_truth_values():
    words = ["reward.params={thurstone_link: probit, pairwise_siblings: true, thurstone_m: 2}"]
    config = load_config([], [*MINIMAL, *words])
    preset = load_preset(config.reward.preset, config.reward.weights, config.reward.params)
    assert (preset.thurstone.link, preset.pairwise.siblings, preset.thurstone.m) == ("probit", True, 2.0)
    with pytest.raises(UserError, match="must be one of logistic, probit"):
        load_config([], [*MINIMAL, "reward.params={thurstone_link: probot}"])
