"""Cost model of a GRPO step: seconds per unit of work of each part.

`StepCosts` are read from a YAML file (`plan --times`), fitted by measured.py or estimated by `estimate`. The JSON of
`plan --simulate --json` holds them in the same form under "costs"; as JSON is YAML, it can be saved and edited.

    engine      a call = per_call + per_step x decode steps + per_token x tokens + per_prompt x prompts
    learner     a step = per_update + micro-batches x (per_micro_batch + gather x (ranks - 1) / ranks)
                         + per_row x rows + per_image x images + per_token x completion tokens, of one rank
    reward      a batch = per_batch + per_completion x completions
    push        per_push + GB x (1 + 1 / buckets) x per_gb + GB x (receivers - 1) x per_gb_receiver
                receivers: nodes that have engines; on CPUs, engines
    other       rest of a step: per_step + per_completion x completions

`gather_across_nodes` replaces `gather` where the learners span nodes. On CPUs (`cores`) the costs are those of a
process with one thread; with t threads they are multiplied by `serial + (1 - serial) / t` (Amdahl).

Without measured times, costs are estimated for H100s from the configuration. Time = max or sum of work over peak rate x
the share of it that is usually reached (a roofline, Williams et al. 2009):

    decode step     weights / (HBM rate x 0.6), read once for all sequences of the batch
    token           2 x parameters FLOPs + keys and values of its context read (2 x layers x KV heads x head x 2 bytes)
    prefill         2 x parameters x prompt tokens FLOPs (Kaplan et al. 2020: 2 a parameter and token)
    learning        a token 2 forward + 4 backward + 2 recomputed under checkpointing + 2 of the reference
    ZeRO-3          a micro-batch gathers the weights for each pass and reduces gradients once: 2 bytes a parameter
                    each, over NVLink in a node, over the network beyond (arXiv 1910.02054, 7)
    weight push     copies through host memory and Ray's object store at 2 GB/s, and one to each further node at 5 GB/s
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le, MinLen

from tatar_dist.config.schema import Config
from tatar_dist.config.validate import STRICT_KEYS, AtLeastOne, Finite, read_yaml, validated
from tatar_dist.errors import UserError
from tatar_dist.models.costs import TOKEN_PIXELS, passes
from tatar_dist.plan.memory import sizes_of
from tatar_dist.types import Task

# An H100 SXM, from NVIDIA's data sheet: dense bf16 FLOP/s, HBM and NVLink bytes/s (one direction); 400 Gb/s a GPU.
FLOPS, HBM, NVLINK, NETWORK = 989e12, 3.35e12, 450e9, 50e9
# The shares of them that are reached: our assumptions, on the low side of what is published.
TRAIN, PREFILL, MEMORY, LINK = 0.35, 0.4, 0.6, 0.6
COPY, TRANSFER = 2e9, 5e9  # bytes/s of a copy through host memory, and of Ray's object store between nodes: assumed
# Mean and standard deviation of completion tokens: about 40 words for IQA, 150 for IAA, as the length reward wants.
LENGTHS: dict[Task, tuple[int, int]] = {"iqa": (80, 12), "iaa": (230, 35)}
TEXT_TOKENS, PIXELS = 200, 1024 * 768  # a prompt's text; an image of KonIQ-10k

Cost = Annotated[Finite, Ge(0)]
Share = Annotated[Finite, Ge(0), Le(1)]
Group = Annotated[tuple[AtLeastOne, ...], MinLen(1)]
Lengths = Annotated[Mapping[Task, Annotated[tuple[Group, ...], MinLen(1)]], MinLen(1)]


@dataclass(frozen=True)
class EngineCosts:
    per_call: Cost = 0.0
    per_step: Cost = 0.0
    per_token: Cost = 0.0
    per_prompt: Cost = 0.0
    serial: Share = 0.0


@dataclass(frozen=True)
class LearnerCosts:
    per_update: Cost = 0.0
    per_micro_batch: Cost = 0.0
    per_row: Cost = 0.0
    per_image: Cost = 0.0
    per_token: Cost = 0.0
    gather: Cost = 0.0
    gather_across_nodes: Cost | None = None
    serial: Share = 0.0


@dataclass(frozen=True)
class RewardCosts:
    per_batch: Cost = 0.0
    per_completion: Cost = 0.0


@dataclass(frozen=True)
class PushCosts:
    per_push: Cost = 0.0
    per_gb: Cost = 0.0
    per_gb_receiver: Cost = 0.0


@dataclass(frozen=True)
class OtherCosts:
    per_step: Cost = 0.0
    per_completion: Cost = 0.0


@dataclass(frozen=True)
class StepCosts:
    """Costs of all parts of a step. `lengths`: completion tokens by task, one tuple per group."""

    __pydantic_config__ = STRICT_KEYS  # of the parts, too

    lengths: Lengths
    engine: EngineCosts = EngineCosts()
    learner: LearnerCosts = LearnerCosts()
    reward: RewardCosts = RewardCosts()
    push: PushCosts = PushCosts()
    other: OtherCosts = OtherCosts()
    checkpoint: Cost = 0.0  # seconds that training stands still for one
    switch: Cost = 0.0  # colocated: seconds of a step in which GPUs change hands, asleep to awake and back
    model_gb: Cost = 0.0  # bytes of a weight push to one engine, in 1e9
    parameters: Cost = 0.0  # 0 = unknown: memory is not checked
    gpu_gib: Cost = 80.0
    cores: AtLeastOne | None = None  # CPU: cores that all processes share; None = GPUs
    source: str = "times given by hand"
    notes: tuple[str, ...] = ()


def read_costs(path: Path) -> StepCosts:
    """Read costs from a YAML (or JSON) file. Raises UserError naming file and key."""
    tree = read_yaml(path, "file of costs")
    if isinstance(tree.get("costs"), dict):
        tree = tree["costs"]  # the whole output of plan --simulate --json
    return validated(StepCosts, tree, str(path))


def prompt_tokens(config: Config) -> int:
    """Return the tokens of a prompt with an image of KonIQ-10k's size, within configured limits."""
    m = config.model
    return TEXT_TOKENS + min(m.max_pixels, max(m.min_pixels, PIXELS)) // TOKEN_PIXELS


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
    m, g, tp = config.model, config.grpo, config.rollout.tensor_parallel
    weights = parameters * (2 if m.dtype == "bfloat16" else 4)
    prompt, share = prompt_tokens(config), config.data.iqa_fraction
    context = prompt + (share * LENGTHS["iqa"][0] + (1 - share) * LENGTHS["iaa"][0]) / 2
    once = 2 * bool(g.kl_beta) + 2 * (g.inner_iterations > 1)  # reference; old policy
    update = g.inner_iterations * passes(m.gradient_checkpointing, trained=not m.lora_rank)
    token = (2 * update + once) * parameters / (FLOPS * TRAIN)
    moved = weights * (update + bool(g.kl_beta))  # gathered for each pass; gradients reduced, which are one more
    engine_token = 2 * parameters / tp / (FLOPS * PREFILL)
    rng = np.random.default_rng(0)
    drawn = {task: rng.normal(*spread, 1000).clip(1, config.rollout.max_new_tokens) for task, spread in LENGTHS.items()}
    return StepCosts(
        lengths={task: (tuple(map(int, lengths)),) for task, lengths in drawn.items()},
        engine=EngineCosts(
            per_call=0.2,
            per_step=weights / tp / (HBM * MEMORY) + 2e-3,
            per_token=kv_bytes * context / tp / (HBM * MEMORY) + engine_token,
            per_prompt=engine_token * prompt,
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
        source="estimated from FLOPs and bytes on H100s (nothing measured)",
        notes=(
            "an estimate from data sheets and assumed efficiencies: compare splits with it, do not plan budgets; "
            "run a few steps and give --measured RUN for figures",
            f"completions of {LENGTHS['iqa'][0]} (IQA) and {LENGTHS['iaa'][0]} (IAA) tokens are assumed",
        ),
    )
