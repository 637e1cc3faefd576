"""Names that people know from TRL and verl, and the keys here that do the same.

`page.py` writes the table of configs/README.md from them, `load.py` names our key where one of theirs is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


class Foreign(NamedTuple):
    """Names in TRL's `GRPOConfig` and in verl, and our key.

    verl's are below `actor_rollout_ref` unless another section leads.
    """

    trl: str
    verl: str
    ours: str
    remark: str = ""


NAMES = tuple(
    Foreign(*row)
    for row in (
        ("num_generations", "rollout.n", "grpo.group_size"),
        ("generation_batch_size", "data.train_batch_size", "grpo.prompts_per_step", "prompts, for any number of ranks"),
        (
            "per_device_train_batch_size",
            "actor.ppo_max_token_len_per_gpu",
            "grpo.micro_tokens",
            "tokens per forward, each prompt once; the loss does not depend on it",
        ),
        ("max_completion_length", "data.max_response_length", "rollout.max_new_tokens"),
        ("max_prompt_length", "data.max_prompt_length", "data.max_prompt_tokens", "longer prompts are rejected"),
        ("vllm_max_model_length", "rollout.max_model_len", "rollout.max_model_len"),
        ("temperature", "rollout.temperature", "rollout.temperature"),
        ("beta", "actor.kl_loss_coef", "grpo.kl_beta", "k3 estimator"),
        ("epsilon", "actor.clip_ratio_low", "grpo.clip_low"),
        ("epsilon_high", "actor.clip_ratio_high", "grpo.clip_high"),
        ("delta", "", "grpo.clip_delta"),
        (
            "loss_type",
            "actor.loss_agg_mode",
            "grpo.aggregation",
            "grpo, seq-mean-token-mean: sequence-mean; dapo, bnpo, token-mean: token-mean over the global batch; "
            "dr_grpo, seq-mean-token-sum-norm: constant; cispo, sapo: grpo.objective",
        ),
        (
            "importance_sampling_level",
            "actor.policy_loss.loss_mode",
            "grpo.ratio",
            "token, vanilla: token; sequence, gspo: sequence; cispo, sapo: grpo.objective",
        ),
        ("sapo_temperature_pos", "actor.tau_pos", "grpo.tau_positive"),
        ("sapo_temperature_neg", "actor.tau_neg", "grpo.tau_negative"),
        (
            "scale_rewards",
            "algorithm.norm_adv_by_std_in_grpo",
            "grpo.advantage",
            "group, true: std; none, false: mean; batch: std with grpo.scale=batch",
        ),
        (
            "multi_objective_aggregation",
            "",
            "grpo.advantage",
            "sum_then_normalize: std; normalize_then_sum: per_term with grpo.scale=batch",
        ),
        (
            "vllm_importance_sampling_correction",
            "algorithm.rollout_correction.rollout_is",
            "grpo.importance",
            "token or sequence",
        ),
        ("vllm_importance_sampling_mode", "", "grpo.importance_mode", "token_mask, sequence_mask: mask"),
        ("vllm_importance_sampling_clip_max", "", "grpo.importance_cap"),
        ("vllm_importance_sampling_clip_min", "", "grpo.importance_floor"),
        (
            "vllm_importance_sampling_cap",
            "algorithm.rollout_correction.rollout_is_threshold",
            "grpo.importance_cap",
        ),
        ("num_iterations", "actor.ppo_epochs", "grpo.inner_iterations", "one optimiser step each, no mini-batches"),
        ("mask_truncated_completions", "", "grpo.mask_truncated"),
        ("", "algorithm.filter_groups.enable", "grpo.zero_std", "refill"),
        ("reward_weights", "", "reward.weights", "by term name"),
        ("reward_funcs", "reward.custom_reward_function", "reward.preset", "a YAML file that names your function"),
        ("vllm_mode", "", "cluster.placement", "colocate: colocated; server: disaggregated"),
        ("vllm_tensor_parallel_size", "rollout.tensor_model_parallel_size", "rollout.tensor_parallel"),
        ("vllm_gpu_memory_utilization", "rollout.gpu_memory_utilization", "rollout.gpu_memory_utilization"),
        ("learning_rate", "actor.optim.lr", "grpo.optim.lr", "of SFT: sft.optim.lr"),
        ("lr_scheduler_type", "actor.optim.lr_scheduler_type", "grpo.optim.schedule"),
        ("warmup_steps", "actor.optim.lr_warmup_steps", "grpo.optim.warmup_steps"),
        ("weight_decay", "actor.optim.weight_decay", "grpo.optim.weight_decay"),
        ("max_grad_norm", "actor.grad_clip", "grpo.optim.clip_norm"),
        ("gradient_checkpointing", "model.enable_gradient_checkpointing", "model.gradient_checkpointing"),
        ("model_name_or_path", "model.path", "model.path"),
        ("max_steps", "trainer.total_training_steps", "grpo.max_steps"),
        ("num_train_epochs", "trainer.total_epochs", "grpo.epochs"),
        ("eval_steps", "trainer.test_freq", "grpo.eval_every"),
        ("save_steps", "trainer.save_freq", "checkpoint.every"),
        ("save_total_limit", "trainer.max_actor_ckpt_to_keep", "checkpoint.keep"),
        ("output_dir", "trainer.default_local_dir", "output"),
        ("", "trainer.nnodes", "cluster.nodes"),
        ("", "trainer.n_gpus_per_node", "cluster.gpus_per_node"),
    )
)


def ours(key: str, value: Any) -> str:
    """Return the end of a message that names our key for one of TRL's or verl's, else "".

    Args:
        key: the unknown key, below any of our sections or none.
        value: what stands below it; a mapping is searched for the first name known.
    """
    known = [(theirs, library, f) for f in NAMES for theirs, library in ((f.verl, "verl"), (f.trl, "TRL")) if theirs]
    known.sort(key=lambda entry: -entry[0].count("."))  # verl's data.max_prompt_length before TRL's max_prompt_length
    for name in _leaves(key, value):
        for theirs, library, f in known:
            if f".{name}".endswith(f".{theirs}"):
                remark = f" ({f.remark})" if f.remark else ""
                return f"; {library}'s {theirs} is {f.ours} here{remark}"
    return ""


def _leaves(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for k, v in value.items():
            yield from _leaves(f"{key}.{k}", v)
    else:
        yield key


def table(names: Iterable[Foreign] = NAMES) -> str:
    """Return the names as a Markdown table."""

    def code(name: str) -> str:
        return f"`{name}`" if name else ""

    rows = [f"| {code(f.trl)} | {code(f.verl)} | `{f.ours}` | {f.remark} |" for f in names]
    return "\n".join(["| TRL `GRPOConfig` | verl | here | |", "|---|---|---|---|", *rows]) + "\n"
