"""Check the rules of a `Config` that join several keys. Raises UserError naming the key."""

from __future__ import annotations

from tatar_dist.config.rationale import check as check_rationale
from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError
from tatar_dist.run.failpoints import parse as parse_failpoint

FP8_GAP = 0.15  # nats: three times the gap that published runs with fp8 engines come to (rollout/README.md)


def check(c: Config) -> None:
    """Check what the types of single keys cannot express. Raises UserError naming the key."""
    if c.rollout.max_new_tokens >= c.rollout.max_model_len:
        raise UserError(
            f"rollout.max_new_tokens={c.rollout.max_new_tokens} leaves no room for a prompt: "
            f"rollout.max_model_len={c.rollout.max_model_len} holds both"
        )
    if c.grpo.staleness and c.cluster.placement == "colocated":
        raise UserError(
            f"grpo.staleness={c.grpo.staleness}: engines on the learners' GPUs sleep while those work, "
            "cluster.placement=colocated has nothing to gain: use disaggregated"
        )
    if c.cluster.pin_cores and (c.cluster.gpus_per_node or c.cluster.nodes > 1):
        raise UserError("cluster.pin_cores=true is for one machine without GPUs: cluster.nodes=1 and gpus_per_node=0")
    if c.rollout.top_p != 1.0 or c.rollout.top_k not in (-1, 0):
        raise UserError(
            f"rollout.top_p={c.rollout.top_p}, top_k={c.rollout.top_k}: only 1.0 and -1 are available, as the loss "
            "takes the probabilities of the full softmax"
        )
    if c.grpo.scale == "batch" and c.grpo.advantage == "mean":
        raise UserError("grpo.scale=batch divides what grpo.advantage=mean leaves as it is: set std or per_term")
    _check_objective(c)
    push, placement = c.rollout.push, c.cluster.placement
    if push in ("nccl", "cuda_ipc") and not c.cluster.gpus_per_node:
        raise UserError(f"rollout.push={push} needs GPUs, cluster.gpus_per_node is 0: use auto")
    if (push, placement) in (("cuda_ipc", "disaggregated"), ("nccl", "colocated")):
        raise UserError(f"rollout.push={push} does not work with cluster.placement={placement}: use auto")
    if c.rollout.quantization == "fp8" and c.model.dtype != "bfloat16":
        raise UserError(
            f"rollout.quantization=fp8 quantises bfloat16 weights: model.dtype={c.model.dtype} cannot be used"
        )
    if c.rollout.quantization == "fp8" and c.grpo.logprob_gap_limit < FP8_GAP:
        raise UserError(
            f"rollout.quantization=fp8: rounded weights alone may move log-probabilities by 0.05 nats, and "
            f"grpo.logprob_gap_limit={c.grpo.logprob_gap_limit:g} would stop the run: set it to {FP8_GAP:g} or more"
        )
    if 0 < c.rollout.engines < c.rollout.min_engines:
        raise UserError(f"rollout.min_engines={c.rollout.min_engines} of rollout.engines={c.rollout.engines} engines")
    for entry in c.failpoints:
        parse_failpoint(entry)
    check_rationale(c.rationale)
    _check_reward(c)


def _check_objective(c: Config) -> None:
    """Check that keys of the policy loss do something and fit each other."""
    g = c.grpo
    if g.clip_delta is not None and (g.objective != "clip" or g.clip_delta <= 1 + g.clip_high):
        raise UserError(
            f"grpo.clip_delta={g.clip_delta:g} bounds ratios above 1 + grpo.clip_high={g.clip_high:g} of "
            f"grpo.objective=clip (now {g.objective}): set it above {1 + g.clip_high:g}, or null"
        )
    if g.importance_floor is not None and g.importance_mode != "mask":
        raise UserError(
            f"grpo.importance_floor={g.importance_floor:g} belongs to grpo.importance_mode=mask, it is "
            f"{g.importance_mode}: truncation has no lower bound"
        )


def _check_reward(c: Config) -> None:
    """Check what follows from the reward: batches that can rank, room for the words it asks for."""
    from tatar_dist.rewards.presets import load_preset
    from tatar_dist.rewards.terms import check_token_budget

    preset = load_preset(c.reward.preset, c.reward.weights, c.reward.params)
    n_iqa = round(c.grpo.prompts_per_step * c.data.iqa_fraction)
    for task, n in (("iqa", n_iqa), ("iaa", c.grpo.prompts_per_step - n_iqa)):
        if task in preset.ranked_tasks and 0 < n < c.data.min_rank_pool:
            raise UserError(
                f"grpo.prompts_per_step={c.grpo.prompts_per_step} holds {n} {task.upper()} image(s) a step, ranking "
                f"needs data.min_rank_pool={c.data.min_rank_pool}: raise prompts_per_step or change data.iqa_fraction"
            )
    if c.data.iqa_fraction == 1.0:
        return
    # an IAA rationale must reach the words: the released code asks for 125 and stops after about 180 tokens
    if preset.length.weight and "iaa" in preset.length.tasks:
        check_token_budget(preset.length.iaa_min, c.rollout.max_new_tokens)
    gate = preset.gaussian.gate_iaa_min_words
    if preset.gaussian.weight and "iaa" in preset.gaussian.tasks and gate is not None:
        check_token_budget(gate, c.rollout.max_new_tokens)
