"""`tatar-dist bench learner`: an update of one group, packed, beside the forward that repeats the prompt in every row.

In: nothing. Out: the ratio of seconds (policy loss, forward and backward; float32, all cores, no optimiser), with
gradient checkpointing off and on, in turns; how far the two gradients are apart; peak memory of each in a process of
its own; the ratio that the FLOPs of both allow; how time and memory grow with groups, image, completion and vocabulary.

A matrix product of (m, k) and (k, n) counts 2 m k n; backward counts twice the forward, checkpointing one forward more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tatar_dist.bench import subject
from tatar_dist.bench.result import in_turns, ratio, result, summary

GROUP, TOKENS, ROUNDS = 8, 64, 3
TARGET, MEMORY_TARGET, GRADIENT_TARGET = 7.0, 0.4, 1e-5


@dataclass(frozen=True)
class Work:
    """Sizes of one update: groups of `size` completions of `tokens` tokens, images of `pixels` x `pixels`."""

    groups: int = 1
    size: int = GROUP
    tokens: int = TOKENS
    pixels: int = subject.PIXELS
    vocab: int = subject.SIZES.vocab
    checkpointing: bool = False


def _counts(work: Work, prompt: int, packed: bool) -> tuple[int, int, float]:
    """Images encoded, tokens through the language model, and pairs of a query and a key in each of its layers."""
    rows = work.groups * work.size
    if not packed:
        length = prompt + work.tokens
        return rows, rows * length, rows * length**2 / 2
    answer = work.tokens - 1
    pairs = prompt**2 / 2 + work.size * answer * (prompt + answer / 2)
    return work.groups, work.groups * (prompt + work.size * answer), work.groups * pairs


def attention_flops(config: Any, work: Work, prompt: int, packed: bool) -> float:
    """FLOPs of scores and weighted sums in one forward; causal attention counts the half that it needs."""
    v, t = config.vision_config, config.text_config
    patches, window = (work.pixels // v.patch_size) ** 2, (v.window_size // v.patch_size) ** 2
    images, _, pairs = _counts(work, prompt, packed)
    full = len(v.fullatt_block_indexes)
    seen = full * patches + (v.depth - full) * min(window, patches)
    return images * patches * 4 * v.hidden_size * seen + t.num_hidden_layers * pairs * 4 * t.hidden_size


def flops(config: Any, work: Work, prompt: int, packed: bool) -> float:
    """FLOPs of forward and backward. `config`: a Qwen2_5_VLConfig; `prompt`: tokens of a prompt."""
    v, t = config.vision_config, config.text_config
    patches, merged = (work.pixels // v.patch_size) ** 2, v.hidden_size * v.spatial_merge_size**2
    image = patches * v.depth * 2 * (4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size)
    patch = 2 * v.in_channels * v.temporal_patch_size * v.patch_size**2 * v.hidden_size
    image += patches / v.spatial_merge_size**2 * 2 * (merged**2 + merged * v.out_hidden_size)
    kv = t.num_key_value_heads * t.hidden_size // t.num_attention_heads
    linear = 2 * (2 * t.hidden_size**2 + 2 * t.hidden_size * kv + 3 * t.hidden_size * t.intermediate_size)
    images, tokens, _ = _counts(work, prompt, packed)
    body = images * image + t.num_hidden_layers * tokens * linear + attention_flops(config, work, prompt, packed)
    head = work.groups * work.size * work.tokens * 2 * t.hidden_size * t.vocab_size
    # pixels have no gradient; the chunked head makes its logits twice
    return body * (3 + work.checkpointing) + images * patches * patch * 2 + head * (3 + packed)


def _update(work: Work, directory: Path, packed: bool) -> tuple[Callable[[], None], Any, int]:
    """A function that makes one update's gradient, its model, and the tokens of a prompt."""
    import torch
    from transformers.utils import logging

    from tatar_dist.algo.losses import PolicyLoss, policy_loss
    from tatar_dist.backbones import family
    from tatar_dist.learner import per_row
    from tatar_dist.learner.batch import Collator
    from tatar_dist.learner.model import PolicyModel

    logging.disable_progress_bar()
    config = subject.make(directory, work.pixels, replace(subject.SIZES, vocab=work.vocab))
    backbone = family(config.model.family)(config.model)
    rows, collate = subject.rows(backbone, work.groups, work.size, work.tokens, work.pixels), Collator(backbone)
    batch, forbidden = collate(rows), backbone.forbidden_ids()
    padded = None if packed else per_row.pad(collate, rows)
    model = backbone.load_model().train()
    if work.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    policy = PolicyModel(model, backbone, forbidden) if packed else None
    form = PolicyLoss()

    def update() -> None:
        model.zero_grad()
        logp = policy(batch).logp if policy else per_row.token_logprobs(model, collate, rows, forbidden, padded=padded)
        loss = policy_loss(form, logp, None, None, batch.advantage, batch.mask, batch.weight).loss
        torch.autograd.backward(loss)

    return update, model, batch.layout.prompts[0]


def peak(work: Work, packed: bool) -> dict[str, float]:
    """Seconds and MiB of one update in a process of its own: the peak above what the loaded model takes."""
    words = [sys.executable, "-m", "tatar_dist.bench.learner", json.dumps(work.__dict__), str(int(packed))]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(work: Work) -> dict[str, Any]:
    """Both ways in turns: seconds, the gradients' difference, FLOPs."""
    import torch

    with tempfile.TemporaryDirectory() as directory:
        theirs, model, prompt = _update(work, Path(directory), packed=False)
        ours, policy, _ = _update(work, Path(directory), packed=True)
        seconds = in_turns(theirs, ours, ROUNDS)
        right = {n: p.grad for n, p in model.named_parameters()}
        apart = torch.stack([(p.grad - right[n]).norm() for n, p in policy.named_parameters()]).norm()
        whole = torch.stack([g.norm() for g in right.values()]).norm()
        counted = [flops(model.config, work, prompt, packed) for packed in (False, True)]
    memory = [peak(work, packed)["mib"] for packed in (False, True)]
    return {
        "prompt_tokens": prompt,
        "seconds": {"per_row": seconds[0], "packed": seconds[1]},
        "ratio": ratio(*seconds),
        "gflops": {"per_row": counted[0] / 1e9, "packed": counted[1] / 1e9},
        "flops_ratio": counted[0] / counted[1],
        "gradient_difference": float(apart / whole),
        "mib": {"per_row": memory[0], "packed": memory[1]},
        "memory_ratio": memory[1] / memory[0],
    }


GROWTH = {
    "groups": [Work(groups=n) for n in (1, 2, 4)],
    "image": [Work(pixels=p) for p in (448, 672, 896)],
    "tokens": [Work(tokens=n) for n in (32, 64, 128, 256)],
    "vocab": [Work(vocab=n, pixels=448, tokens=256) for n in (1024, 4096, 32768, 131072)],
}


def growth() -> dict[str, list[dict[str, Any]]]:
    """Seconds, peak MiB and counted GFLOPs of one packed update, along one size at a time."""
    return {name: [work.__dict__ | peak(work, packed=True) for work in works] for name, works in GROWTH.items()}


def run() -> dict[str, Any]:
    """All measurements, as what `--json` prints."""
    import torch

    off, on = compare(Work()), compare(Work(checkpointing=True))
    worst = min((off, on), key=lambda found: found["ratio"]["median"])
    return result(
        "learner",
        "the per-row forward",
        worst["ratio"],
        TARGET,
        f"{worst['flops_ratio']:.2f} times by FLOPs counted",
        threads=torch.get_num_threads(),
        checkpointing={"off": off, "on": on},
        targets={"memory_ratio": MEMORY_TARGET, "gradient_difference": GRADIENT_TARGET},
        ok=all(
            f["ratio"]["median"] >= TARGET
            and f["memory_ratio"] <= MEMORY_TARGET
            and f["gradient_difference"] <= GRADIENT_TARGET
            for f in (off, on)
        ),
        growth=growth(),
    )


def print_table(found: dict[str, Any]) -> None:
    """Both ways beside each other, then how the packed one grows."""
    console = Console()
    caption = "Recompute: gradient checkpointing. FLOPs: the ratio they allow. Apart: gradients, relative L2."
    title = "One update of a group of 8 behind 1,024 image tokens"
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for name in ("recompute", "per-row", "packed", "ratio", "FLOPs", "GFLOP/s", "memory, MiB", "apart"):
        table.add_column(name, justify="right")
    for name, f in found["checkpointing"].items():
        seconds = {k: min(v) for k, v in f["seconds"].items()}
        rate = f["gflops"]["packed"] / seconds["packed"]
        memory = f"{f['mib']['packed']:.0f}/{f['mib']['per_row']:.0f}"
        table.add_row(
            name, f"{seconds['per_row']:.2f} s", f"{seconds['packed']:.2f} s", f"{f['ratio']['median']:.2f}",
            f"{f['flops_ratio']:.2f}", f"{rate:.0f}", memory, f"{f['gradient_difference']:.1e}",
        )  # fmt: skip
    console.print(table)
    sizes = Table(title="How a packed update grows", title_justify="left")
    for name in ("along", "groups", "image", "tokens", "vocab", "GFLOP", "s", "memory"):
        sizes.add_column(name, justify="left" if name == "along" else "right")
    for name, works in found["growth"].items():
        for i, w in enumerate(works):
            sizes.add_row(
                name if not i else "", str(w["groups"]), f"{w['pixels']} px", str(w["tokens"]), str(w["vocab"]),
                f"{w['gflops']:.0f}", f"{w['seconds']:.2f}", f"{w['mib']:.0f} MiB",
            )  # fmt: skip
        sizes.add_section()
    console.print(sizes)
    console.print(summary(found))


def _mib(field: str) -> float:
    """A line of /proc/self/status; getrusage's peak would be the parent's, which a forked process inherits."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(field))


def _main() -> None:
    parser = argparse.ArgumentParser(description="One side of the comparison in a process of its own.")
    parser.add_argument("work", type=json.loads)
    parser.add_argument("packed", type=int)
    options = parser.parse_args()
    work = Work(**options.work)
    with tempfile.TemporaryDirectory() as directory:
        update, model, prompt = _update(work, Path(directory), bool(options.packed))
        for weight in model.parameters():
            weight.sum()  # read from the mapped file now: else it counts as memory of the update
        before = _mib("VmRSS")
        start = time.perf_counter()
        update()
        seconds = time.perf_counter() - start
    mib = _mib("VmHWM") - before
    counted = flops(model.config, work, prompt, bool(options.packed)) / 1e9
    print(json.dumps({"seconds": seconds, "mib": mib, "gflops": counted}))


if __name__ == "__main__":
    _main()
