"""Estimate costs from the configuration alone: FLOPs and bytes over the rates of an H100, without measurement.

Used by `plan --simulate` without measured times. Time = max or sum of work over peak rate x the share of it that is
usually reached (a roofline, Williams et al. 2009):

    decode step     weights / (HBM rate x 0.6), read once for all sequences of the batch
    token           2 x parameters FLOPs + keys and values of its context read (2 x layers x KV heads x head x 2 bytes)
    prefill         2 x parameters x prompt tokens FLOPs (Kaplan et al. 2020: 2 a parameter and token)
    learning        a token 2 forward + 4 backward + 2 recomputed under checkpointing + 2 of the reference
    ZeRO-3          a micro-batch gathers the weights for each pass and reduces gradients once: 2 bytes a parameter
                    each, over NVLink in a node, over the network beyond (arXiv 1910.02054, 7)
    weight push     copies through host memory and Ray's object store at 2 GB/s, and one to each further node at 5 GB/s
"""

from __future__ import annotations

import numpy as np

from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError
from tatar_dist.models.costs import passes
from tatar_dist.plan.memory import sizes_of
from tatar_dist.plan.simulate.costs import EngineCosts, LearnerCosts, OtherCosts, PushCosts, RewardCosts, StepCosts
from tatar_dist.plan.simulate.step import prompt_tokens

# An H100 SXM, from NVIDIA's data sheet: dense bf16 FLOP/s, HBM and NVLink bytes/s (one direction); 400 Gb/s a GPU.
FLOPS, HBM, NVLINK, NETWORK, GPU_GIB = 989e12, 3.35e12, 450e9, 50e9, 80.0
# The shares of them that are reached: our assumptions, on the low side of what is published.
TRAIN, PREFILL, MEMORY, LINK = 0.35, 0.4, 0.6, 0.6
COPY, TRANSFER = 2e9, 5e9  # bytes/s of a copy through host memory, and of Ray's object store between nodes: assumed
# Mean and standard deviation of completion tokens: about 40 words for IQA, 150 for IAA, as the length reward wants.
LENGTHS = {"iqa": (80, 12), "iaa": (230, 35)}


def estimate(config: Config) -> StepCosts:
    """Estimate the costs. Raises UserError for a CPU configuration or a model of unknown size."""
    if not config.cluster.gpus_per_node:
        raise UserError(
            "--simulate needs times, and for CPUs there is no estimate: run a few steps with this config and give "
            "their run directory, --measured RUN (may repeat), or a file of times, --times FILE"
        )
    try:
        sizes = sizes_of(config.model.path)
    except UserError as error:
        raise UserError(f"{error}; or give measured times (--measured RUN or --times FILE)") from None
    parameters, kv_bytes = float(f"{sizes.parameters:.2e}"), sizes.kv_bytes(2)  # three digits, as on model cards
    tp = config.rollout.tensor_parallel
    m, g, r = config.model, config.grpo, config.rollout
    wide = 2 if m.dtype == "bfloat16" else 4
    weights = parameters * wide
    prompt = prompt_tokens(config)
    iqa, iaa = LENGTHS["iqa"][0], LENGTHS["iaa"][0]
    context = prompt + (config.data.iqa_fraction * iqa + (1 - config.data.iqa_fraction) * iaa) / 2
    once = 2 * bool(g.kl_beta) + 2 * (g.inner_iterations > 1)  # reference; old policy
    whole = not m.lora_rank  # adapters: no gradients of the weights to compute and to move
    update = g.inner_iterations * passes(m.gradient_checkpointing, whole)
    token = (2 * update + once) * parameters / (FLOPS * TRAIN)
    moved = weights * (update + bool(g.kl_beta))  # gathered for each pass; gradients reduced, which are one more
    rng = np.random.default_rng(0)
    drawn = {task: rng.normal(*LENGTHS[task], 1000).clip(1, r.max_new_tokens) for task in LENGTHS}
    return StepCosts(
        lengths={task: (tuple(map(int, lengths)),) for task, lengths in drawn.items()},
        engine=EngineCosts(
            per_call=0.2,
            per_step=weights / tp / (HBM * MEMORY) + 2e-3,
            per_token=kv_bytes * context / tp / (HBM * MEMORY) + 2 * parameters / tp / (FLOPS * PREFILL),
            per_prompt=2 * parameters * prompt / tp / (FLOPS * PREFILL),
        ),
        learner=LearnerCosts(
            per_update=0.5,
            per_image=token * prompt,  # once a micro-batch: its completions share it
            per_token=token,
            gather=moved / (NVLINK * LINK),
            gather_across_nodes=moved / (NETWORK * LINK),
        ),
        reward=RewardCosts(per_batch=0.01, per_completion=1e-4),
        push=PushCosts(per_push=0.1, per_gb=1e9 / COPY, per_gb_receiver=1e9 / TRANSFER),
        other=OtherCosts(per_step=0.1, per_completion=1e-3),
        checkpoint=parameters * 14 / 2e9 / max(1, config.cluster.learners or config.cluster.gpus_per_node // 2),
        switch=2 * weights / tp / 20e9 + 1.0,
        model_gb=weights / 1e9,
        parameters=parameters,
        gpu_gib=GPU_GIB,
        source="estimated from FLOPs and bytes on H100s (nothing measured)",
        notes=(
            "an estimate from data sheets and assumed efficiencies: compare splits with it, do not plan budgets; "
            "run a few steps and give --measured RUN for figures",
            f"completions of {iqa} (IQA) and {iaa} (IAA) tokens are assumed",
        ),
    )
