"""Estimate the costs of a step on GPUs that nobody measured: `plan --simulate --card`.

Time = work / (peak rate x share reached), the roofline of Williams et al. 2009. Work is counted (models/costs.py), peak
rates are from data sheets (`CARDS`), and the shares from measurements that others published, or assumed (`Shares`).
plan/README.md lists them with links. `peak=True` takes every share as 1 and no waiting: the limit of the hardware.

    decode step   bytes of the language model's layers and head / memory rate, once for all sequences; with tensor
                  parallelism also two all-reduces a layer
    token         keys and values of its context, read likewise; its FLOPs hide behind the reading of the weights
    prefill       FLOPs of a prompt with its image
    learning      FLOPs of the packed rows: forward, backward (twice), again under checkpointing, and the reference
    ZeRO-3        gathers the weights for each pass and reduces gradients once: 2 bytes a parameter each (arXiv
                  1910.02054, 7); beside the FLOPs, as `overlap_comm` is on. Across nodes over all NICs of a node; with
                  zero_hpz_partition_size only gradients cross (the push leaves the copy of a node behind it)
    optimizer     bytes of a rank's shard that AdamW reads and writes, in GPU memory or, offloaded, in the node's
    weight push   gather, pack and copy at the rates above; through Ray's object store at its copying rate
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError
from tatar_dist.models.costs import ModelSizes, passes, weights
from tatar_dist.plan.memory import sizes_of
from tatar_dist.plan.plan import Way, push_way
from tatar_dist.plan.simulate import CardName, costs
from tatar_dist.plan.simulate.costs import PushCosts, StepCosts
from tatar_dist.types import Task

# Mean and standard deviation of completion tokens: about 40 words for IQA, 150 for IAA, as the length reward wants.
LENGTHS: dict[Task, tuple[int, int]] = {"iqa": (80, 12), "iaa": (230, 35)}
TOWER = {"window_size": 112, "fullatt_block_indexes": (7, 15, 23, 31)}  # of a Qwen2.5-VL that does not say otherwise
OPTIMIZER_BYTES = {"adamw": 30, "sgd": 14}  # a parameter: gradient read; float32 state read and written; bf16 written


@dataclass(frozen=True)
class DataSheet:
    """A GPU: dense bf16 FLOP/s; bytes/s of its memory and, in one direction, of its links.

    link: to a GPU of the node; linked: share of it that NCCL reaches; nic: of one network card, nics: of those in a
    node of 8 GPUs; gib: memory as PyTorch reports it.
    """

    flops: float
    hbm: float
    link: float
    linked: float
    pcie: float
    nic: float
    nics: int
    gib: float


CARDS: dict[CardName, DataSheet] = {
    "H200": DataSheet(989e12, 4.8e12, 450e9, 0.82, 64e9, 50e9, 8, 139),
    "H100": DataSheet(989e12, 3.35e12, 450e9, 0.82, 64e9, 50e9, 8, 79.1),
    "A100": DataSheet(312e12, 2.04e12, 300e9, 0.69, 32e9, 25e9, 8, 79.1),
    "L40S": DataSheet(362e12, 0.864e12, 32e9, 0.5, 32e9, 12.5e9, 1, 44.4),
    "4090": DataSheet(165e12, 1.008e12, 32e9, 0.5, 32e9, 12.5e9, 1, 23.6),
}


@dataclass(frozen=True)
class Shares:
    """Shares of peak rates that are reached, rates without a data sheet, whether waits count."""

    train: float = 0.35
    prefill: float = 0.4
    read: float = 0.72  # of weights and keys by a decode step, its launches included
    fp8: float = 1.33  # times that a decode step is faster with fp8 weights, at most
    nic: float = 0.92
    copy: float = 0.77  # of memory or PCIe by a copy
    optimizer: float = 0.8
    host: float = 40e9  # bytes/s of AdamW in a node's own memory, which its ranks share
    store: float = 3.8e9  # bytes/s into Ray's object store
    transfer: float = 5e9  # bytes/s of it from node to node
    waits: float = 1.0


PEAK = Shares(1, 1, 1, math.inf, 1, 1, 1, math.inf, math.inf, math.inf, waits=0)
# Seconds: their sources are in plan/README.md
CALL, LOAD, IMAGE, ALL_REDUCE, UPDATE, PUSH, SWITCH = 0.05, 0.43e-3, 0.03, 12e-6, 0.05, 0.1, 0.6
REWARD, OTHER = (0.004, 1e-4), (0.01, 2.7e-5)  # a step, and a completion


def estimate(config: Config, card: CardName = "H100", nics: int | None = None, peak: bool = False) -> StepCosts:
    """Estimate the costs on `card`.

    nics: network cards of a node; None: as many as usual. peak: the limit, as in the docstring of this module.

    Raises:
        UserError: a CPU configuration, or a model of unknown size.
    """
    if not config.cluster.gpus_per_node:
        raise UserError(
            "--simulate needs times, and for CPUs there is no estimate: run a few steps with this config and give "
            "their run directory, --measured RUN (may repeat), or a file of times, --times FILE"
        )
    try:
        sizes = sizes_of(config.model.path)
    except UserError as error:
        raise UserError(f"{error}; or give measured times (--measured RUN or --times FILE)") from None
    sizes = ModelSizes(sizes.text, TOWER | dict(sizes.vision), sizes.tied)
    gpu, s = CARDS[card], PEAK if peak else Shares()
    nics = nics or min(gpu.nics, config.cluster.gpus_per_node)
    m, g, r, wide = config.model, config.grpo, config.rollout, 2 if config.model.dtype == "bfloat16" else 4
    model, layers = wide * sizes.parameters, sizes.text["num_hidden_layers"]
    link = gpu.link * (1 if peak else gpu.linked)
    network = min(link, nics * gpu.nic * s.nic)

    iqa, prompt = config.data.iqa_fraction, costs.prompt_tokens(config)
    context = prompt + (iqa * LENGTHS["iqa"][0] + (1 - iqa) * LENGTHS["iaa"][0]) / 2
    image = sizes.forward_flops(1, sizes.merge * (prompt - costs.TEXT_TOKENS), prompt, prompt**2 / 2)
    token = sizes.forward_flops(0, 0, 1, context) + 2 * sizes.head
    read = wide * (layers * weights(sizes.linear[0]) + sizes.head)
    if r.quantization == "fp8":
        read /= min(s.fp8, read / (read - (wide - 1) * layers * weights(sizes.linear[0])))
    shared = min(r.tensor_parallel, sizes.text["num_key_value_heads"])

    once = bool(g.kl_beta) + (g.inner_iterations > 1)  # forwards of the reference, of the old policy
    forwards = g.inner_iterations * passes(m.gradient_checkpointing, trained=not m.lora_rank) + once
    gradients = 0 if m.lora_rank else model * g.inner_iterations
    inside = model * forwards - gradients if config.cluster.zero_hpz_partition_size > 1 else 0
    trained = sizes.adapters(m.lora_rank, m.lora_targets, m.train_vision) or sizes.parameters
    optimizer = OPTIMIZER_BYTES[g.optim.name] / (gpu.hbm * s.optimizer)
    if config.cluster.offload_optimizer:  # gradients cross PCIe three times, new weights once
        optimizer = OPTIMIZER_BYTES[g.optim.name] * config.cluster.gpus_per_node / s.host
        optimizer += (3 * 4 + wide) / (gpu.pcie * s.copy)

    def push(way: Way) -> PushCosts:
        copies = 2 / (gpu.hbm * s.copy)
        tensors = 12 * (layers + sizes.vision["depth"]) + 9 - sizes.tied
        loading = s.waits * (PUSH + LOAD * tensors) + 2 * copies * model / r.tensor_parallel
        if way == "object_store":
            return PushCosts(loading, 1e9 / min(s.store, gpu.pcie * s.copy), 1e9 / min(s.transfer, gpu.nic * s.nic))
        sent = 1 / (gpu.nic * s.nic) if way == "nccl" else 0.0  # by rank 0, through one network card
        return PushCosts(loading, 1e9 * (1 / link + copies), 0.0, 1e9 * max(1 / network + copies, sent))

    store = push_way(config) == "object_store"
    rng = np.random.default_rng(0)
    drawn = {task: rng.normal(*spread, 1000).clip(1, r.max_new_tokens) for task, spread in LENGTHS.items()}
    return StepCosts(
        lengths={task: (tuple(map(int, lengths)),) for task, lengths in drawn.items()},
        engine=costs.EngineCosts(
            per_call=s.waits * CALL,
            per_step=read / r.tensor_parallel / (gpu.hbm * s.read)
            + s.waits * 2 * layers * ALL_REDUCE * (r.tensor_parallel > 1),
            per_token=sizes.kv_bytes(wide) * context / shared / (gpu.hbm * s.read),
            per_prompt=image / r.tensor_parallel / (gpu.flops * s.prefill) + s.waits * IMAGE,
        ),
        learner=costs.LearnerCosts(
            per_update=s.waits * UPDATE,
            per_image=image * forwards / (gpu.flops * s.train),  # once a micro-batch: its completions share it
            per_token=token * forwards / (gpu.flops * s.train),
            gather=model * forwards / link,
            gather_across_nodes=inside / link + (model * forwards - inside) / network,
            per_shard=trained * optimizer,
            overlap=1.0,
        ),
        reward=costs.RewardCosts(*(s.waits * seconds for seconds in REWARD)),
        push=push("object_store" if store else "nccl"),
        push_colocated=push("object_store" if store else "cuda_ipc"),
        other=costs.OtherCosts(*(s.waits * seconds for seconds in OTHER)),
        checkpoint=sizes.parameters * 14 / 2e9 / max(1, config.cluster.learners or config.cluster.gpus_per_node // 2),
        switch=s.waits * SWITCH,
        model_gb=model / 1e9,
        parameters=float(sizes.parameters),
        gpu_gib=gpu.gib,
        card=card,
        nics=nics,
        source=f"estimated from FLOPs and bytes on {card}s (nothing measured)",
        notes=(
            "an estimate from data sheets, what others measured and assumptions (tatar_dist/plan/README.md): compare "
            "splits with it, do not plan budgets; run a few steps and give --measured RUN for figures",
            f"completions of {LENGTHS['iqa'][0]} (IQA) and {LENGTHS['iaa'][0]} (IAA) tokens are assumed",
        ),
    )
