"""Parts that need neither Ray nor vLLM: devices, the packed forward, ZeRO-3, speed.

Nothing heavy is imported before a part runs: it may have to set environment variables first.
"""

from __future__ import annotations

import copy
import os
import socket
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tatar_dist.errors import RunError, UserError
from tatar_dist.gpu_check.parts import CheckSetting, NotHere
from tatar_dist.plan.simulate import CardName
from tatar_dist.run.gpus import GIB

# language model: hidden, intermediate, layers, heads, KV heads, vocabulary; vision tower. Heads of 128 and of 80
WIDE = (3584, 512, 2, 28, 4, 1024), {"depth": 2, "hidden_size": 1280, "intermediate_size": 512}
NARROW = (896, 128, 2, 7, 1, 1024), {"depth": 2, "hidden_size": 160, "intermediate_size": 128}
IMAGES, LENGTHS = {"a": 112, "b": 224, "c": 168}, (7, 1, 40, 12, 33)  # pixels of a side; tokens of completions
ZERO3_LIMITS = {"float32": 1e-3, "bfloat16": 0.05}  # of losses and gradient norms, beside float32 in plain torch
STEP_LR, TOKENS, COLLECTIVE_S = "grpo.optim.lr=0.001", 12, 30
ROUNDS = 3
# part of the driver's name: card of plan/simulate/estimate.py with its peak rate
PEAKS: dict[str, CardName] = {"H200": "H200", "H100 80GB": "H100", "A100": "A100", "L40S": "L40S", "RTX 4090": "4090"}

Found = tuple[str, dict[str, Any]]  # a line for the table, and figures


def devices(setting: CheckSetting, _: str) -> Found:
    """Ask the driver about the GPUs, compute on each, and copy between each two.

    Raises:
        NotHere: there is none, or one that no run can use.
    """
    import torch

    from tatar_dist.run.gpus import Machine, check_here

    here, places = Machine(socket.gethostname()), [torch.device("cpu")]
    if not setting.pretend:
        here = _machine()
        places = [torch.device("cuda", i) for i in range(len(here.gpus))]
        try:
            if not here.gpus:
                raise UserError(f"{here.host}: no GPU ({here.error or 'none is visible'}); --pretend runs on the CPU")
            if torch.version.cuda is None:
                raise UserError(f"{here.host}: torch is a CPU build: delete .venv and run `make setup DEVICE=cuda`")
            if here.driver:
                check_here(len(here.gpus))
        except UserError as e:
            raise NotHere(str(e)) from None
    a = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    right = a.float() @ a.float().T
    for place in places:
        b = a.to(place)
        if not (far := apart((b @ b.T).float().cpu(), right)) < 0.01:
            raise RunError(f"{place}: a bfloat16 product is {far:.2g} from the CPU's")
        for other in places:
            if not torch.equal(b.to(other).cpu(), a):
                raise RunError(f"a copy from {place} to {other} arrives with other values")
    if setting.pretend:
        return "the CPU", {"machine": asdict(here)}
    gpu, free = here.gpus[0], min(torch.cuda.mem_get_info(place)[0] for place in places) / GIB
    linked = ", NVLink" if here.nvlink and len(here.gpus) > 1 else ""
    text = f"{len(here.gpus)} x {gpu.name}, {free:.0f} of {gpu.gib:.0f} GiB free{linked}, CUDA {torch.version.cuda}"
    return text, {"machine": asdict(here), "free_gib": free, "cuda": torch.version.cuda}


def _machine() -> Any:
    """Read the GPUs by NVML, whose binding comes with Ray, or else as torch sees them."""
    import torch

    from tatar_dist.run.gpus import Gpu, Machine, read_here

    if find_spec("ray"):
        return read_here()
    gpus = []
    for i in range(torch.cuda.device_count()):
        facts, (free, total) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
        gpus.append(Gpu(i, facts.name, total / GIB, free / GIB, (facts.major, facts.minor), False))
    return Machine(socket.gethostname(), tuple(gpus))


def backbone_of(side: int, *words: str) -> tuple[Any, Any]:
    """Return a configuration with the tiny model, images up to side^2 pixels; its backbone."""
    from tatar_dist.config.load import load_config
    from tatar_dist.models import family

    model = ["model.path=tiny-qwen2_5-vl", "model.dtype=float32", f"model.max_pixels={side**2}"]
    config = load_config([], ["output=unused", *model, *words])
    return config, family(config.model.family)(config.model)


def shape(backbone: Any, text: Sequence[int], vision: dict[str, Any], tied: bool) -> Any:
    """Return the configuration of a Qwen2.5-VL of these sizes.

    text: hidden, intermediate, layers, heads, KV heads, vocabulary. Heads of the vision tower are 80 wide.
    """
    from transformers import Qwen2_5_VLConfig

    from tatar_dist.plan.memory import NAMES, VISION

    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    tower = {**VISION, **vision, "out_hidden_size": text[0]}
    depth, both = tower["depth"], {"tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": None}
    tower |= {"num_heads": tower["hidden_size"] // 80, "fullatt_block_indexes": list(range(7, depth, 8)) or [depth - 1]}
    return Qwen2_5_VLConfig(
        text_config={**dict(zip(NAMES, text, strict=True)), **both, "rope_parameters": rope},
        vision_config=tower,
        image_token_id=backbone.tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        **both,
    )


def random_model(config: Any, dtype: Any) -> Any:
    """Build a model with random weights on torch's default device, in training mode."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa").train()


@dataclass(frozen=True)
class Packed:
    """A random model on the CPU in float32, a packed row, and weights of its loss."""

    model: Any
    backbone: Any
    batch: Any
    weights: Any


def packed_row(pretend: bool = False) -> Packed:
    """Make two layers as wide as a 7B, or narrow; three images, five ragged completions."""
    import torch

    from tatar_dist.bench import subject
    from tatar_dist.learner.batch import Collator
    from tatar_dist.types import LearnerRow

    _, backbone = backbone_of(224)
    torch.manual_seed(0)
    model = random_model(shape(backbone, *(NARROW if pretend else WIDE), tied=False), torch.float32)
    rows = []
    for i, (name, n) in enumerate(zip("abacb", LENGTHS, strict=True)):
        ids = torch.randint(40, 200, (n,), generator=torch.Generator().manual_seed(i)).tolist()
        png = subject.image(ord(name), IMAGES[name])
        rows.append(LearnerRow(name, png, subject.prompt_text(backbone), tuple(ids), "iqa"))
    batch = Collator(backbone)(rows)
    weights = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(1)) * batch.mask
    return Packed(model, backbone, batch, weights)


def result(row: Packed, device: str, dtype: Any = None, checkpointing: bool = False) -> tuple[Any, Any]:
    """Return log-probabilities and gradient of a packed row, on the CPU in float32."""
    import torch

    from tatar_dist.learner.policy import PolicyModel

    model = copy.deepcopy(row.model).to(device)
    for parameter in model.parameters():  # not the rotary frequencies, which learners keep in float32
        parameter.data = parameter.data.to(dtype or torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = PolicyModel(model, row.backbone, row.backbone.forbidden_ids()).to(device)
    logp = policy(row.batch.to(torch.device(device))).logp
    (logp * row.weights.to(device)).sum().backward()
    gradient = torch.cat([p.grad.flatten().float().cpu() for p in policy.parameters()])
    return logp.detach().float().cpu(), gradient


def apart(found: Any, right: Any) -> float:
    """Return the distance of two tensors relative to the second's norm."""
    return float((found - right).norm() / right.norm())


def packed(setting: CheckSetting, _: str) -> Found:
    """Compare packed forward and backward on the device with the CPU's."""
    import torch

    torch.backends.cudnn.allow_tf32 = False  # the patch embedding is a convolution, and here compared in float32
    row, low = packed_row(setting.pretend), torch.bfloat16
    right, on_cpu = result(row, "cpu"), result(row, "cpu", low)
    figures, wrong = {}, []
    for name, dtype, checkpointing in (("float32", None, False), ("bfloat16", low, False), ("checkpointed", low, True)):
        found = result(row, setting.device, dtype, checkpointing)
        for i, part in enumerate(("log-probabilities", "gradient")):
            far = figures[f"{name} {part}"] = apart(found[i], right[i])
            limit = (1e-5, 1e-4)[i] if dtype is None else 2 * apart(on_cpu[i], right[i])
            if not far < limit:
                wrong.append(f"{name}: {part} are {far:.2g} from the CPU's, the limit is {limit:.2g}")
    if wrong:
        raise RunError("; ".join(wrong))
    worst = [max(v for k, v in figures.items() if k.startswith(name)) for name in ("float32", "bfloat16")]
    return f"float32 within {worst[0]:.1g} of the CPU's, bfloat16 within {worst[1]:.1g}", figures


def zero3(setting: CheckSetting, _: str) -> Found:
    """Compare steps of ZeRO-3 on all GPUs, a process each, with plain torch on one."""
    ranks, figures, wrong = (2 if setting.pretend else setting.gpus), {}, []
    right = _plain_steps(setting.device, ranks)
    with ProcessPoolExecutor(ranks, get_context("spawn")) as processes:
        calls = [processes.submit(_zero3_steps, setting, rank, ranks) for rank in range(ranks)]
        by_dtype = [call.result() for call in as_completed(calls)][0]  # the first error is the cause of others
    for dtype, found in by_dtype.items():
        far = figures[dtype] = max(abs(a - b) / abs(b) for a, b in zip(found, right, strict=True))
        if not far < ZERO3_LIMITS[dtype]:
            each, theirs = (" ".join(f"{x:.5g}" for x in values) for values in (found, right))
            wrong.append(f"{dtype}: losses and gradient norms {each}, by plain torch {theirs}")
    if wrong or not right[1] < right[0]:
        raise RunError("; ".join(wrong) or "plain torch's loss does not fall")
    differ = ", ".join(f"{dtype} within {far:.1g}" for dtype, far in figures.items())
    return f"{ranks} ranks, losses and gradient norms of two steps: {differ} of plain torch's", figures


def _step_batch(backbone: Any, rank: int, device: Any) -> Any:
    """Return a rank's part of a step: two completions of an image."""
    from tatar_dist.bench import subject
    from tatar_dist.learner.batch import Collator

    rows = subject.rows(backbone, rank + 1, 2, TOKENS, 112)[-2:]
    return Collator(backbone)(rows).to(device)


def _step_loss(logp: Any, batch: Any, ranks: int) -> Any:
    return -(logp * batch.mask).sum() / (2 * TOKENS * ranks)


def _plain_steps(device: str, ranks: int) -> list[float]:
    """Return losses, then gradient norms, of two AdamW steps on the batches of all ranks."""
    import torch

    from tatar_dist.learner.policy import PolicyModel

    config, backbone = backbone_of(112, STEP_LR)
    policy = PolicyModel(backbone.load_model().train(), backbone, backbone.forbidden_ids()).to(device)
    o, losses, norms = config.grpo.optim, [], []
    optimizer = torch.optim.AdamW(policy.parameters(), o.lr, o.betas, o.eps, o.weight_decay)
    batches = [_step_batch(backbone, rank, torch.device(device)) for rank in range(ranks)]
    for _ in range(2):
        optimizer.zero_grad()
        loss = sum(_step_loss(policy(batch).logp, batch, ranks) for batch in batches)
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(policy.parameters(), o.clip_norm)))
        optimizer.step()
    return losses + norms


def _zero3_steps(setting: CheckSetting, rank: int, ranks: int) -> dict[str, list[float]]:
    """Make the same steps as one rank of ZeRO-3, which sees one GPU, as a learner does."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", GLOO_SOCKET_IFNAME="lo")
    if not setting.pretend:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[rank] if visible else str(rank)
    import torch
    from torch import distributed

    from tatar_dist.learner.backend import start_backend
    from tatar_dist.learner.zero3 import Zero3

    device = torch.device("cpu") if setting.pretend else torch.device("cuda", 0)
    store = distributed.FileStore(str(Path(setting.place) / "store"), ranks)  # no port
    start_backend(store, rank, ranks, device, timedelta(seconds=COLLECTIVE_S))
    found = {}
    for dtype in ZERO3_LIMITS:
        config, _ = backbone_of(112, STEP_LR, f"model.dtype={dtype}")
        settings = {"reference_path": None, "temperature": 1.0, "device": device}
        learner = Zero3(config, config.grpo.optim, **settings, shard_all=True)  # a tiny model's layers, too
        batch, losses, norms = _step_batch(learner.backbone, rank, device), [], []
        for _ in range(2):
            learner.begin(last=True)
            loss = _step_loss(learner.engine(batch).logp, batch, ranks)
            learner.backward(loss)
            norms.append(learner.optimizer_step())
            losses.append(learner.all_reduce({"loss": float(loss.detach())})["loss"])
        found[dtype] = losses + norms
    distributed.destroy_process_group()
    return found


def speed(setting: CheckSetting, name: str) -> Found:
    """Time updates of a 3B or 7B with random weights: one image, eight completions.

    Raises:
        NotHere: by plan/memory.py's counts it does not fit the free memory.
    """
    import torch

    from tatar_dist.bench import subject
    from tatar_dist.learner.batch import Collator
    from tatar_dist.learner.policy import PolicyModel
    from tatar_dist.plan.memory import HEADROOM, PUBLISHED
    from tatar_dist.plan.simulate.estimate import CARDS

    *text, tied, wide = PUBLISHED[name]
    vision, work = {"intermediate_size": wide}, subject.Work(1, 8, 256, 896, checkpointing=True)
    if setting.pretend:
        (text, vision), work = NARROW, subject.Work(1, 2, 16, 112, checkpointing=True)
    _, backbone = backbone_of(work.pixels)
    device = torch.device(setting.device)
    config, prompt = shape(backbone, text, vision, tied), subject.prompt_tokens(backbone, work.pixels)
    counted = counted_bytes(config, work, prompt)
    if not setting.pretend and counted > (free := (1 - HEADROOM) * torch.cuda.mem_get_info(device)[0]):
        raise NotHere(f"takes {counted / GIB:.1f} GiB, {free / GIB:.1f} are free")
    with device:
        policy = PolicyModel(random_model(config, torch.bfloat16), backbone, backbone.forbidden_ids())
    policy.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = Collator(backbone)(subject.rows(backbone, 1, work.size, work.tokens, work.pixels)).to(device)
    seconds = []
    for _ in range(1 + ROUNDS):
        policy.zero_grad()
        start = time.perf_counter()
        (policy(batch).logp * batch.mask).sum().backward()
        if not setting.pretend:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    took = statistics.median(seconds[1:])  # the first loads kernels and allocates
    executed, useful = (subject.flops(config, w, prompt, True) for w in (work, replace(work, checkpointing=False)))
    figures = {"seconds": seconds[1:], "tflops": executed / took / 1e12, "counted_gib": counted / GIB}
    text = f"{took:.3g} s an update, {figures['tflops']:.3g} TFLOP/s"
    if setting.pretend:
        return f"{text}, of a narrow model", figures
    card = next((card for part, card in PEAKS.items() if part in torch.cuda.get_device_name(device)), None)
    if card:
        figures["mfu"] = useful / took / CARDS[card].flops
        text += f", MFU {100 * figures['mfu']:.0f} %"
    figures["peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    figures["reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
    return f"{text}, peak {figures['peak_gib']:.1f} GiB (counted {figures['counted_gib']:.1f})", figures


def counted_bytes(config: Any, work: Any, prompt: int) -> float:
    """Count the peak of such an update by plan/memory.py's parts.

    At the head: weights, what layers keep, logits. At the last layer: weights, gradients, what it computes again.
    """
    from tatar_dist.bench import subject
    from tatar_dist.models.costs import head_bytes, kept_elements, layer_elements
    from tatar_dist.plan.memory import GRADIENTS, KEPT

    sizes, _, patches, tokens, _ = subject.counts(config, work, prompt, packed=True)
    weights, kept = 2 * sizes.parameters, KEPT["bfloat16"] * kept_elements(sizes, patches, tokens, True)
    layer = KEPT["bfloat16"] * (1 + GRADIENTS) * max(layer_elements(sizes, patches, tokens))
    return max(weights + kept + head_bytes(sizes, work.completion_tokens, 2), 2 * weights + layer)
