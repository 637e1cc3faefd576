"""Estimate a stage's GPU memory from its configuration and config.json: `tatar-dist plan`.

No weights are loaded, and torch is not imported. Parts on a learner (P parameters, N ranks, 2 bytes each in bfloat16):

    weights                2 P / N               DeepSpeed ZeRO-3 (arXiv 1910.02054)
    copy for the node      2 P / k               cluster.zero_hpz_partition_size; twice with a reference
    gradients              4 P / N               summed in float32; in the node's memory with cluster.offload_optimizer
    optimizer              12 P / N              float32 master weights and two moments (SGD: master weights); likewise
    reference              2 P / N               GRPO with kl_beta > 0; adapters (learner/lora.py) need none
    gathered layers        2 x at most 1e9       DeepSpeed's stage3_max_live_parameters, and the head
    reduce bucket          2 x 5e8               DeepSpeed's reduce_bucket_size, allocated at once
    activations            what autograd keeps of a packed forward of micro_tokens (models/costs.py), or with
                           checkpointing every layer's input
    head and logits        float32 gradient of its weight and chunks of logits (learner/policy.py)
    temporaries            in a layer's backward: what checkpointing keeps again, gradients, a copy of the reduce bucket
    step                   float32 gradients of one sub-group of at most 1e9, after activations are freed

Head, temporaries and step are of different moments; the largest counts. On an engine: weights (with
rollout.quantization=fp8 one byte an element of the language model's linear layers), `ENGINE_OTHER` for activations and
CUDA graphs, and the rest of gpu_memory_utilization for keys and values. ALLOCATOR, CONTEXT (CUDA, NCCL,
kernels' workspaces) and ENGINE_OTHER are assumptions; nothing here was compared with a GPU.

tests/device/test_memory.py counts the parts of a step on tensors without memory. tests/unit/test_memory.py measures
updates of a 14M model on a CPU that returns freed memory at once (MALLOC_MMAP_THRESHOLD_=65536).
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError
from tatar_dist.models.costs import TOKEN_PIXELS, ModelSizes, head_bytes, kept_elements, layer_elements, weights
from tatar_dist.plan.plan import Plan, by_node

GIB = 2**30
LIVE, BUCKET, SUB_GROUP = 1e9, 5e8, 1e9  # parameters; defaults of DeepSpeed
CONTEXT, ENGINE_OTHER = 1.5 * GIB, 3.0 * GIB
ALLOCATOR = 0.2  # assumed: gaps that it leaves between what comes and goes
KEPT = {"float32": 4.16, "bfloat16": 2.15}  # bytes an element kept; norms keep float32 also in bfloat16 (counted)
GRADIENTS = 0.26  # gradients inside a layer's backward, as a share of what the layer keeps (counted)
HEADROOM = 0.05  # of a GPU that must be left: an allocator cannot use the last of it
STATES = ("weights", "copy for the node", "gradients", "optimizer", "reference")  # parts whose sizes are certain
NOTE = (
    "Estimated from sizes; nothing was compared with a GPU. The parts of a step of a 3B and a 7B are within 10 % of "
    "bytes counted on tensors without memory; the allocator's gaps (20 % of what comes and goes), CUDA and NCCL are "
    "assumed. What fits leaves 5 % of a GPU free."
)
PROMPT_TEXT = 100  # tokens around an image in configs/prompts.yaml
VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "patch_size": 14, "spatial_merge_size": 2,
    "in_channels": 3, "temporal_patch_size": 2,
}  # fmt: skip
# hidden, intermediate, layers, heads, KV heads, vocabulary, tied, the vision tower's intermediate: released config.json
PUBLISHED = {
    "3B": (2048, 11008, 36, 16, 2, 151936, True, 3420),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 3420),
    "32B": (5120, 27648, 64, 40, 8, 152064, False, 3456),
    "72B": (8192, 29568, 80, 64, 8, 152064, False, 3456),
}
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "vocab_size")  # fmt: skip
MODEL_TYPE = "qwen2_5_vl"  # other families have other layers


def sizes_of(path: str) -> ModelSizes:
    """Read sizes from `path`/config.json, or look up the released Qwen2.5-VL that `path` names.

    Raises:
        UserError: config.json is not a valid one of a Qwen2.5-VL, or there is none and the name is unknown.
    """
    file = Path(path) / "config.json"
    if file.is_file():
        try:
            settings = dict(json.loads(file.read_text()))
            if (kind := settings.get("model_type")) != MODEL_TYPE:
                raise UserError(f"{file}: model_type is {kind!r}; only the sizes of {MODEL_TYPE} are known")
            sizes = ModelSizes.of(settings | {"vision_config": VISION | settings["vision_config"]})
            assert sizes.parameters > 0
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, AssertionError) as e:
            raise UserError(f"{file}: not of a Qwen2.5-VL: {type(e).__name__}: {e}") from None
        return sizes
    released = re.search(r"Qwen2\.5-VL-(\d+B)", path)
    if released is None or released[1] not in PUBLISHED:
        raise UserError(f"model.path={path}: no config.json there and no released Qwen2.5-VL, so its sizes are unknown")
    *text, tied, wide = PUBLISHED[released[1]]
    vision = VISION | {"intermediate_size": wide, "out_hidden_size": text[0]}
    return ModelSizes(dict(zip(NAMES, text, strict=True)), vision, tied)


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU of a role. `parts`: bytes by name at its peak; `room`: bytes available.

    sequences: for an engine, full-length completions (max_model_len) whose keys and values fit at a time.
    """

    role: str
    parts: dict[str, float]
    room: float
    sequences: int | None = None

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= (1 - HEADROOM) * self.room and self.sequences != 0


@dataclass(frozen=True)
class Estimate:
    """Memory of a stage; `advice`: a line per role that does not fit; `node`: by `node_memory`."""

    stage: str
    gpu_gib: float
    roles: tuple[Memory, ...]
    advice: tuple[str, ...]
    node: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the `--json` object, in bytes. `note`: reliability of the estimate."""
        roles = [asdict(m) | {"total": m.total, "fits": m.fits} for m in self.roles]
        return {"gpu_gib": self.gpu_gib, "roles": roles, "advice": list(self.advice), "node": self.node, "note": NOTE}


def estimate(config: Config, plan: Plan, gpu_gib: float | None = None) -> Estimate | str | None:
    """Estimate a stage on GPUs of `gpu_gib`, by default of 80 GiB.

    With the default, a run without GPUs gives None, and a model of unknown sizes the reason as text. Otherwise that and
    a size that is not positive raise UserError.
    """
    if gpu_gib is None and not config.cluster.gpus_per_node:
        return None
    if gpu_gib is not None and not gpu_gib > 0:
        raise UserError(f"--gpu-memory {gpu_gib:g}: must be above 0 GiB")
    try:
        sizes = sizes_of(config.model.path)
    except UserError as e:
        if gpu_gib is not None:
            raise
        return f"memory is not estimated: {e}"
    gib = 80.0 if gpu_gib is None else gpu_gib
    roles, advice = [], []
    for count, role, advise in ((plan.learners, learner, _for_learners), (plan.engines, engine, _for_engines)):
        if count:
            roles.append(role(config, plan, sizes, gib * GIB))
            if not roles[-1].fits:
                advice.append(advise(config, plan, sizes, gib * GIB))
    return Estimate(plan.stage, gib, tuple(roles), tuple(advice), node_memory(config, plan, sizes))


def check_fit(config: Config, plan: Plan, gpu_gib: float | None, node_gib: float = math.inf) -> None:
    """Refuse GPUs and nodes that states exceed; print a warning if only the estimate does.

    gpu_gib: of the smallest GPU; None on CPUs, where nothing is checked, nor is a model of unknown sizes. node_gib:
    memory of the smallest node with GPUs.
    """
    try:
        estimated = estimate(config, plan, gpu_gib) if gpu_gib else None
    except UserError:
        return
    if not isinstance(estimated, Estimate):
        return
    if (needed := sum(estimated.node.values()) / GIB) > node_gib:
        raise UserError(
            f"cluster.offload_optimizer=true takes {needed:.1f} GiB of a node's memory ({', '.join(estimated.node)}); "
            f"the smallest node with GPUs has {node_gib:.1f}: add nodes, or train adapters (model.lora_rank=16)"
        )
    for m, advice in zip((m for m in estimated.roles if not m.fits), estimated.advice, strict=True):
        states = {part: size / GIB for part, size in m.parts.items() if part in STATES}
        has = f"the smallest GPU has {gpu_gib:.1f} GiB, and "
        if sum(states.values()) > estimated.gpu_gib:
            parts = f"{', '.join(states)} of each {m.role} take {sum(states.values()):.1f}"
            raise UserError(f"{has}{parts}: {advice}")
        print(f"tatar-dist: {has}by the estimate {advice} (tatar-dist plan)", file=sys.stderr)


def learner(config: Config, plan: Plan, sizes: ModelSizes, room: float) -> Memory:
    """Estimate one ZeRO-3 rank at the largest of its `moments`."""
    held, peaks = moments(config, plan, sizes)
    peak = max(peaks.values(), key=lambda parts: sum(parts.values()))
    more = {"CUDA and NCCL": CONTEXT, "allocator": ALLOCATOR * sum(peak.values())}
    if plan.colocated:
        more["engine asleep"] = CONTEXT
    return Memory("learner", {k: v for k, v in (held | peak | more).items() if v}, room)


def moments(config: Config, plan: Plan, sizes: ModelSizes) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return the bytes of a rank by part: held always, and beside them by moment.

    The moments are the backward of the head, that of a layer, and the optimizer step.
    """
    m, grpo = config.model, plan.stage == "grpo"
    wide, ranks = (2 if m.dtype == "bfloat16" else 4), plan.learners
    everything = sizes.parameters
    adapters = sizes.adapters(m.lora_rank, m.lora_targets, m.train_vision)
    trained = adapters or (everything if m.train_vision else everything - sizes.vision_parameters)
    optim = config.grpo.optim if grpo else config.sft.optim
    tokens, patches, answers = _micro_batch(config, plan)
    reference = everything if grpo and config.grpo.kl_beta and not m.lora_rank else 0
    here = not config.cluster.offload_optimizer  # on the GPU
    copied, size = everything + adapters + reference, config.cluster.zero_hpz_partition_size
    held = {
        "weights": wide * (everything + adapters) / ranks,
        "copy for the node": wide * copied / size if size > 1 else 0.0,
        "gradients": here * 4 * trained / ranks,
        "optimizer": here * (12 if optim.name == "adamw" else 4) * trained / ranks,
        "reference": wide * reference / ranks,
        "reduce bucket": wide * BUCKET,
    }
    kept = kept_elements(sizes, patches, tokens, m.gradient_checkpointing)
    layer = (m.gradient_checkpointing + GRADIENTS) * max(layer_elements(sizes, patches, tokens))
    reduced = min(trained, BUCKET)
    both = {
        "gathered layers": wide * min(everything, LIVE + sizes.head),
        "activations": KEPT[m.dtype] * kept,
    }
    head = {"head and logits": head_bytes(sizes, answers, wide, trained=not adapters)}
    layers = {
        "head's gradient": float(wide * sizes.head) if sizes.tied and not adapters else 0.0,
        "temporaries": KEPT[m.dtype] * layer + wide * reduced + 4 * reduced / ranks,
    }
    return held, {
        "head": both | head,
        "layer": both | layers,
        "step": {"step": here * 4 * min(trained / ranks, SUB_GROUP)},
    }


def node_memory(config: Config, plan: Plan, sizes: ModelSizes) -> dict[str, float]:
    """Return the bytes by part of a node's memory that an offloaded optimizer takes, else {}.

    Gradients are there twice, as a sum over micro-batches and for the step, in pinned memory: torch rounds each tensor
    up to a power of two. A checkpoint is copied before it is written.
    """
    if not (config.cluster.offload_optimizer and plan.learners):
        return {}
    held, _ = moments(replace(config, cluster=replace(config.cluster, offload_optimizer=False)), plan, sizes)
    groups, rest = divmod(held["gradients"], 4 * SUB_GROUP)
    pinned = [held["gradients"], *[4 * SUB_GROUP] * int(groups), rest]
    parts = {
        "gradients": sum(2.0 ** math.ceil(math.log2(size)) for size in pinned if size),
        "optimizer": held["optimizer"],
        "a checkpoint's copy": held["optimizer"],
    }
    return {part: max(by_node(config.cluster, plan.learners)) * size for part, size in parts.items()}


def _micro_batch(config: Config, plan: Plan) -> tuple[float, float, float]:
    """Return (tokens, patches, completion tokens) of the largest forward.

    Images have max_pixels, completions full length. A forward has at least one of each, whatever micro_tokens is.
    """
    assert plan.split is not None
    image = config.model.max_pixels / TOKEN_PIXELS
    prompt, answer = _prompt(config), config.rollout.max_new_tokens
    group = config.grpo.group_size if plan.stage == "grpo" else 1
    budget = max(plan.split.micro_tokens, prompt + answer)
    if budget < prompt + group * answer:
        return budget, 4 * image, budget - prompt
    images = budget // (prompt + group * answer)
    rows = min(images, plan.split.rows)
    return rows * (prompt + group * answer), 4 * image * rows, rows * group * answer


def _prompt(config: Config) -> float:
    return min(config.data.max_prompt_tokens, config.model.max_pixels / TOKEN_PIXELS + PROMPT_TEXT)


def engine(config: Config, plan: Plan, sizes: ModelSizes, room: float) -> Memory:
    """Estimate one GPU of an engine; keys and values take the rest of gpu_memory_utilization."""
    r, tp = config.rollout, plan.tensor_parallel
    wide = 2 if config.model.dtype == "bfloat16" else 4
    token = sizes.kv_bytes(wide) / min(tp, sizes.text["num_key_value_heads"])
    rounded = sizes.text["num_hidden_layers"] * weights(sizes.linear[0]) if r.quantization == "fp8" else 0
    fixed = {"weights": (wide * sizes.parameters - rounded) / tp, "activations and graphs": ENGINE_OTHER}
    outside = {"CUDA": CONTEXT, "bucket of a push": float(r.bucket_mib * 2**20) if plan.stage == "grpo" else 0.0}
    if plan.colocated:
        outside["learner meanwhile"] = sum(moments(config, plan, sizes)[0].values())
    cache = r.gpu_memory_utilization * room - sum(fixed.values())
    sequences = max(0, int(cache // (token * r.max_model_len)))
    parts = {**fixed, "keys and values": max(0.0, cache), **{k: v for k, v in outside.items() if v}}
    return Memory("engine", parts, room, min(sequences, r.max_num_seqs))


def _for_learners(config: Config, plan: Plan, sizes: ModelSizes, room: float) -> str:
    """Return the first change that lets a rank fit: checkpointing, smaller forwards, more ranks."""
    split = plan.split
    assert split is not None
    checkpointed = replace(config, model=replace(config.model, gradient_checkpointing=True))
    budgets, least = [split.micro_tokens], math.ceil(_prompt(config) + config.rollout.max_new_tokens)
    while budgets[-1] > least:
        budgets.append(max(least, budgets[-1] // 2))
    more = range(plan.learners + 1, split.rows + 1)
    for budget, ranks in [*((b, plan.learners) for b in budgets), *((budgets[-1], ranks) for ranks in more)]:
        changed = replace(plan, learners=ranks, split=replace(split, ranks=ranks, micro_tokens=budget))
        if learner(checkpointed, changed, sizes, room).fits:
            keys = {
                "model.gradient_checkpointing=true": not config.model.gradient_checkpointing,
                f"{plan.stage}.micro_tokens={budget}": budget < split.micro_tokens,
                f"cluster.learners={ranks}, and cluster.nodes for as many GPUs": ranks > plan.learners,
            }
            return "a learner does not fit: set " + " ".join(key for key, differs in keys.items() if differs)
    adapters = "" if config.model.lora_rank else "train adapters (model.lora_rank=16), "
    advice = f"lower model.max_pixels, {adapters}or take larger GPUs"
    return f"a learner does not fit with any number of ranks up to {split.rows}: {advice}"


def _for_engines(config: Config, plan: Plan, sizes: ModelSizes, room: float) -> str:
    """Return keys to set for an engine without room for a sequence, or for memory outside of it."""
    needed = engine(config, plan, sizes, room)
    if needed.sequences:
        share = config.rollout.gpu_memory_utilization - (needed.total / room - (1 - HEADROOM))
        return f"an engine does not fit: set rollout.gpu_memory_utilization={max(0.0, math.floor(share * 100) / 100):g}"
    most = config.cluster.gpus_per_node or 8
    for tp in (2**i for i in range(1, 7) if plan.tensor_parallel < 2**i <= most):
        if engine(config, replace(plan, tensor_parallel=tp), sizes, room).fits:
            return f"an engine has no room for a sequence: set rollout.tensor_parallel={tp}"
    return "an engine has no room for a sequence on a node's GPUs: lower rollout.max_model_len, or take larger GPUs"


def as_table(estimated: Estimate) -> Any:
    """Return the estimate as a rich table, in GiB per GPU; NOTE describes its reliability."""
    from rich.table import Table

    title = f"{estimated.stage}: GiB of a GPU's {estimated.gpu_gib:g}, estimated"
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    table.add_column(justify="right")
    for m in estimated.roles:
        for i, (part, size) in enumerate(m.parts.items()):
            table.add_row("" if i else m.role, part, f"{size / GIB:.1f}")
        table.add_row("", "all" if m.fits else "all: DOES NOT FIT", f"{m.total / GIB:.1f}")
        if m.sequences is not None:
            table.add_row("", "sequences at a time, of full length", str(m.sequences))
        table.add_section()
    total = {"all": sum(estimated.node.values())} if estimated.node else {}
    for i, (part, size) in enumerate((estimated.node | total).items()):
        table.add_row("" if i else "a node's memory", part, f"{size / GIB:.1f}")
    table.add_section()
    for line in estimated.advice:
        table.add_row("change", line, "")
    return table
