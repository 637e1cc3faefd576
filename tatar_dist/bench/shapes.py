"""Time the learner's update at the shapes of 3B and 7B: `tatar-dist bench shapes`.

Random bfloat16 weights, no hub. Never run on a GPU: no GPU was at hand. On a CPU only the update itself was run, with a
small shape. For 1,024 and 2,025 image tokens, groups of 8, completions of 64 and 256 tokens: tokens/s, peak memory and
MFU of the packed update, gradient checkpointing off and on; at the 3B shape also with AdamW (bfloat16 states). A case
that does not fit says so. MFU counts useful FLOPs: nothing that is computed twice. Needs torch and transformers.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tatar_dist.bench import subject
from tatar_dist.bench.counts import Work, flops
from tatar_dist.bench.harness import machine
from tatar_dist.errors import UserError
from tatar_dist.models.sizes import ModelSizes
from tatar_dist.plan.memory import released

ROUNDS = 5
PIXELS = {1024: 896, 2025: 1260}  # by image tokens
COMPLETIONS = (64, 256)
# dense bfloat16 FLOP/s of the data sheets, by what the device's name holds
PEAKS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "A100": 312e12}
SHAPES = {name: released(f"Qwen2.5-VL-{name}") for name in ("3B", "7B")}


def make_config(shape: ModelSizes, backbone: Any) -> Any:
    """Return the Qwen2_5_VLConfig of a shape, with token ids of the backbone's tokenizer."""
    from transformers import Qwen2_5_VLConfig

    def token(text: str) -> int:
        return int(backbone.tokenizer.convert_tokens_to_ids(text))

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return Qwen2_5_VLConfig(
        text_config={**shape.text, "rope_parameters": rope, "tie_word_embeddings": shape.tied},
        vision_config={**shape.vision, "num_heads": 16},
        tie_word_embeddings=shape.tied,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )


def packed_update(
    shape: ModelSizes, work: Work, directory: Path, device: str, adamw: bool = False
) -> tuple[Callable[[], None], Any, Any]:
    """Return a function that makes one bfloat16 update, the model's config, and the batch."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from tatar_dist.algo.loss import PolicyLoss, policy_loss
    from tatar_dist.learner.batch import Collator
    from tatar_dist.learner.policy import PolicyModel
    from tatar_dist.models import family

    small = subject.make(directory, work.pixels)
    backbone = family(small.model.family)(small.model)
    rows = subject.rows(backbone, work.groups, work.size, work.tokens, work.pixels)
    batch = Collator(backbone)(rows).to(torch.device(device))
    config = make_config(shape, backbone)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16).train()
    if work.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = PolicyModel(model, backbone, backbone.forbidden_ids()).to(device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True) if adamw else None
    form = PolicyLoss()

    def update() -> None:
        policy.zero_grad(set_to_none=optimizer is not None)
        logp = policy(batch).logp
        torch.autograd.backward(policy_loss(form, logp, None, None, batch.advantage, batch.mask, batch.weight).loss)
        if optimizer is not None:
            optimizer.step()

    return update, config, batch


def useful_flops(config: Any, work: Work, prompt: int) -> float:
    """Count FLOPs of forward and backward that are not computed a second time."""
    head = work.groups * work.size * work.tokens * 2 * ModelSizes.of(config.to_dict()).head
    return flops(config, replace(work, checkpointing=False), prompt, True) - head


def peak_flops(device_name: str) -> float | None:
    """Return dense bfloat16 FLOP/s, None for a device that is not in the table."""
    return next((peak for part, peak in PEAKS.items() if part in device_name), None)


def measure(shape: ModelSizes, work: Work, adamw: bool) -> dict[str, float | None]:
    """Measure median seconds, tokens/s, peak GiB and MFU (None: peak unknown) of an update."""
    import statistics

    import torch

    with tempfile.TemporaryDirectory() as directory:
        update, config, batch = packed_update(shape, work, Path(directory), "cuda", adamw)
        update()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            update()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    peak = peak_flops(torch.cuda.get_device_name())
    useful = useful_flops(config, work, batch.layout.prompts[0])
    return {
        "seconds": median,
        "tokens_per_second": batch.layout.tokens / median,
        "completion_tokens_per_second": work.groups * work.size * work.tokens / median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "useful_tflops": useful / 1e12,
        "mfu": useful / median / peak if peak else None,
    }


def cases() -> Iterator[tuple[str, int, Work, bool]]:
    """(shape, image tokens, work, with AdamW)."""
    for name in SHAPES:
        for image, pixels in PIXELS.items():
            for tokens in COMPLETIONS:
                for checkpointing in (False, True):
                    for adamw in (False, True) if name == "3B" else (False,):
                        yield name, image, Work(tokens=tokens, pixels=pixels, checkpointing=checkpointing), adamw


def run() -> dict[str, Any]:
    """Measure all cases on the first GPU. Raises UserError without one."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("bench shapes: torch sees no CUDA GPU here")
    found = []
    for name, image, work, adamw in cases():
        row: dict[str, Any] = {
            "shape": name, "image_tokens": image, "group": work.size, "completion_tokens": work.tokens,
            "checkpointing": work.checkpointing, "adamw": adamw,
        }  # fmt: skip
        try:
            row |= measure(SHAPES[name], work, adamw)
        except torch.cuda.OutOfMemoryError:
            row["out_of_memory"] = True
        gc.collect()  # a model is in cycles of references
        torch.cuda.empty_cache()
        found.append(row)
    return {"name": "shapes", "cases": found, "machine": machine()}
