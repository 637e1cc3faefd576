"""Check a `Config` by the rules that types cannot express. Raises UserError naming the key."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

from tatar_dist.config.rationale import check as check_rationale
from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError
from tatar_dist.run.failpoints import parse as parse_failpoint

if TYPE_CHECKING:
    from tatar_dist.rewards.presets import Preset


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value!r}: must be one of {', '.join(allowed)}")


CHOICES = {
    "model.dtype": ("bfloat16", "float32"),
    "cluster.placement": ("disaggregated", "colocated"),
    "cluster.learner_placement": ("pack", "spread"),
    "rollout.push": ("object_store", "nccl", "cuda_ipc"),
    "checkpoint.best_mode": ("max", "min"),
    "checkpoint.storage": ("shared", "local"),
    "evaluate.unparsed": ("drop", "midpoint"),
    "watch.stall_action": ("report", "restart", "stop"),
    "track.mode": ("offline", "online"),
    "grpo.advantage": ("std", "mean", "per_term"),
    "grpo.zero_std": ("keep", "drop", "refill"),
    "grpo.aggregation": ("sequence-mean", "token-mean", "constant"),
    "grpo.ratio": ("token", "sequence"),
    "grpo.importance": ("auto", "none", "token", "sequence"),
    "grpo.importance_mode": ("truncate", "mask"),
    "grpo.kl_schedule": ("constant", "linear", "cosine"),
}
AT_LEAST_ONE = (  # those that are null mean "no limit" and pass
    "cluster.nodes",
    "cluster.object_store_mib",
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
    "watch.stall_factor",
    "watch.stall_min_s",
)


def _check_ranges(c: Config) -> None:
    """The tables above. Comparisons are negated, so that NaN is refused too."""
    get = {key: attrgetter(key)(c) for key in (*AT_LEAST_ONE, *ABOVE_ZERO, *NOT_NEGATIVE)}
    for key in AT_LEAST_ONE:
        if get[key] is not None and not get[key] >= 1:
            raise UserError(f"{key}={get[key]}: must be at least 1")
    for key in ABOVE_ZERO:
        if not get[key] > 0:
            raise UserError(f"{key}={get[key]}: must be above 0")
    for key in NOT_NEGATIVE:
        if not get[key] >= 0:
            raise UserError(f"{key}={get[key]}: must not be negative")


def check(c: Config) -> None:
    """Rules that types cannot say. Raises UserError naming the key."""
    for key, allowed in CHOICES.items():
        _one_of(key, attrgetter(key)(c), allowed)
    if not c.grpo.importance_cap >= 1:
        raise UserError(f"grpo.importance_cap={c.grpo.importance_cap}: must be at least 1, the ratio of equal weights")
    for stage, optim in (("sft", c.sft.optim), ("grpo", c.grpo.optim)):
        _one_of(f"{stage}.optim.name", optim.name, ("adamw", "sgd"))
        _one_of(f"{stage}.optim.schedule", optim.schedule, ("linear", "cosine", "constant"))
        for part, factor in optim.lr_scale.items():
            if factor < 0:
                raise UserError(f"{stage}.optim.lr_scale.{part}={factor}: must not be negative")
    _check_ranges(c)
    if c.data.min_rank_pool < 2:
        raise UserError(f"data.min_rank_pool={c.data.min_rank_pool}: ranking needs at least 2 images")
    if c.rollout.max_new_tokens >= c.rollout.max_model_len:
        raise UserError(
            f"rollout.max_new_tokens={c.rollout.max_new_tokens} leaves no room for a prompt: "
            f"rollout.max_model_len={c.rollout.max_model_len} holds both"
        )
    if c.grpo.group_size < 2:
        raise UserError(
            f"grpo.group_size={c.grpo.group_size}: a group needs at least 2 completions to have an advantage"
        )
    if c.grpo.staleness and c.cluster.placement == "colocated":
        raise UserError(
            f"grpo.staleness={c.grpo.staleness}: engines on the learners' GPUs sleep while those work, "
            "cluster.placement=colocated has nothing to gain: use disaggregated"
        )
    if c.cluster.pin_cores and (c.cluster.gpus_per_node or c.cluster.nodes > 1):
        raise UserError("cluster.pin_cores=true is for one machine without GPUs: cluster.nodes=1 and gpus_per_node=0")
    if not 0.0 <= c.data.iqa_fraction <= 1.0:
        raise UserError(f"data.iqa_fraction={c.data.iqa_fraction}: must lie in [0, 1]")
    if c.rollout.temperature <= 0:
        raise UserError(
            f"rollout.temperature={c.rollout.temperature}: must be positive (evaluation decodes greedily anyway)"
        )
    if c.rollout.top_p != 1.0 or c.rollout.top_k not in (-1, 0):
        raise UserError(
            f"rollout.top_p={c.rollout.top_p}, top_k={c.rollout.top_k}: only 1.0 and -1 are available, as the loss "
            "takes the probabilities of the full softmax"
        )
    _check_push(c)
    for entry in c.failpoints:
        parse_failpoint(entry)
    check_rationale(c.rationale)
    _check_reward(c)


def _check_push(c: Config) -> None:
    """Which way of pushing weights goes with which placement; and engines enough."""
    push, placement = c.rollout.push, c.cluster.placement
    if push != "object_store" and not c.cluster.gpus_per_node:
        raise UserError(f"rollout.push={push} needs GPUs, cluster.gpus_per_node is 0: use object_store")
    if (push, placement) in (("cuda_ipc", "disaggregated"), ("nccl", "colocated")):
        other = "nccl" if push == "cuda_ipc" else "cuda_ipc"
        raise UserError(f"rollout.push={push} does not work with cluster.placement={placement}: use {other}")
    if 0 < c.rollout.engines < c.rollout.min_engines:
        raise UserError(f"rollout.min_engines={c.rollout.min_engines} of rollout.engines={c.rollout.engines} engines")


def _check_reward(c: Config) -> None:
    """Rules that follow from the reward: batches that can rank, and room for the words it asks for."""
    from tatar_dist.rewards.presets import load_preset

    preset = load_preset(c.reward.preset, c.reward.weights, c.reward.params)
    n_iqa = round(c.grpo.prompts_per_step * c.data.iqa_fraction)
    for task, n in (("iqa", n_iqa), ("iaa", c.grpo.prompts_per_step - n_iqa)):
        if task in preset.ranked_tasks and 0 < n < c.data.min_rank_pool:
            raise UserError(
                f"grpo.prompts_per_step={c.grpo.prompts_per_step} holds {n} {task.upper()} image(s) a step, ranking "
                f"needs data.min_rank_pool={c.data.min_rank_pool}: raise prompts_per_step or change data.iqa_fraction"
            )
    _check_length_budget(c, preset)


def _check_length_budget(c: Config, preset: Preset) -> None:
    """Refuse a generation limit under which an IAA rationale cannot reach the words the reward asks of it.

    The released code asks for 125 words and stops generation after about 180, tags and answer included.
    """
    from dataclasses import replace

    from tatar_dist.rewards.terms import check_token_budget

    if c.data.iqa_fraction == 1.0:
        return
    if preset.weight("length") != 0 and "iaa" in preset.tasks["length"]:
        check_token_budget(preset.length, c.rollout.max_new_tokens)
    gate = preset.gaussian.gate_iaa_min_words
    if preset.weight("gaussian") != 0 and "iaa" in preset.tasks["gaussian"] and gate is not None:
        check_token_budget(replace(preset.length, iaa_min=gate), c.rollout.max_new_tokens)
