"""Time an update, packed and with the prompt in every row: `tatar-dist bench learner`.

The ratio is of seconds (policy loss, forward and backward; float32, all cores, no optimiser), with gradient
checkpointing off and on, in turns. Memory is measured apart from seconds, in a process of its own with an allocator
that returns freed memory: glibc's heap keeps freed tensors between gradients which stay (194 MiB of an update that has
78 alive), but mapping each tensor anew takes up to half as much time again. With --plot also how both grow.
"""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tatar_dist.bench import subject
from tatar_dist.bench.harness import in_turns, ratio, result, seconds_of
from tatar_dist.bench.subject import Work, flops, peak_bytes

EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: blocks above are mapped, and unmapped when freed; bytes
STARTS_THREADS = Work(size=2, tokens=8, pixels=112)
ROUNDS = 2
TARGET, MEMORY_TARGET, GRADIENT_TARGET = 7.0, 0.4, 1e-5
GROWTH = {
    "groups": [Work(groups=n) for n in (1, 2, 4)],
    "image": [Work(pixels=p) for p in (448, 672, 896)],
    "tokens": [Work(tokens=n) for n in (64, 128, 256)],
    "vocab": [Work(vocab=n, pixels=448) for n in (4096, 32768, 131072)],
}


def _update(work: Work, directory: Path, packed: bool) -> tuple[Callable[[], None], Any, int]:
    """Return (function that computes an update's gradients, its model, first prompt's tokens)."""
    import torch
    from transformers.utils import logging

    from tatar_dist.algo.loss import PolicyLoss, policy_loss
    from tatar_dist.bench import per_row
    from tatar_dist.learner.batch import Collator
    from tatar_dist.learner.policy import PolicyModel
    from tatar_dist.models import family

    logging.disable_progress_bar()
    config = subject.make(directory / str(work.vocab), work.pixels, replace(subject.SIZES, vocab=work.vocab))
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


def alone(works: Sequence[Work], packed: bool, directory: Path, exact: bool) -> list[dict[str, float]]:
    """Measure an update of each work in a child process: seconds, MiB above the model, counts.

    exact: return freed memory to the system at once, so that the MiB are those needed but the seconds are too high.
    """
    os.environ |= EXACT if exact else {}
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), os.dup2, (2, 1)) as process:  # libraries print
            done = process.map(partial(_measured, packed=packed, directory=directory), [STARTS_THREADS, *works])
            return list(done)[1:]
    finally:
        for name in EXACT:
            os.environ.pop(name, None)


def compare(work: Work, directory: Path) -> dict[str, Any]:
    """Measure both ways in turns: seconds, the gradients' difference, FLOPs, memory."""
    import torch

    sides = ("per_row", "packed")
    theirs, model, prompt = _update(work, directory, packed=False)
    ours, policy, _ = _update(work, directory, packed=True)
    seconds = in_turns(theirs, ours, rounds=ROUNDS)
    right = {n: p.grad for n, p in model.named_parameters()}
    difference = torch.stack([(p.grad - right[n]).norm() for n, p in policy.named_parameters()]).norm()
    norm = torch.stack([g.norm() for g in right.values()]).norm()
    memory = [alone([work], packed, directory, exact=True)[0]["mib"] for packed in (False, True)]
    return {
        "seconds": dict(zip(sides, seconds, strict=True)),
        "ratio": ratio(*seconds),
        "flops_ratio": flops(model.config, work, prompt, False) / flops(model.config, work, prompt, True),
        "gradient_difference": float(difference / norm),
        "peak_mib": dict(zip(sides, memory, strict=True)),
        "memory_ratio": memory[1] / memory[0],
    }


def growth(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Measure packed updates, varying one size at a time, and count what each should need."""
    works = list(dict.fromkeys(work for axis in GROWTH.values() for work in axis))
    timed, needed = (alone(works, True, directory, exact) for exact in (False, True))
    rows = {w: asdict(w) | t | {"mib": n["mib"]} for w, t, n in zip(works, timed, needed, strict=True)}
    return {name: [rows[work] for work in axis] for name, axis in GROWTH.items()}


def run(grow: bool = False) -> dict[str, Any]:
    """Measure everything; `grow` adds how updates grow with each size (about three minutes)."""
    with tempfile.TemporaryDirectory() as name:
        sides = {mode: compare(Work(checkpointing=mode == "on"), Path(name)) for mode in ("off", "on")}
        grown = {"growth": growth(Path(name))} if grow else {}
    worst = min(sides.values(), key=lambda side: side["ratio"]["median"])
    return result(
        "learner",
        "the per-row forward",
        worst["ratio"],
        TARGET,
        f"{worst['flops_ratio']:.2f} times by FLOPs counted",
        all(s["memory_ratio"] <= MEMORY_TARGET and s["gradient_difference"] <= GRADIENT_TARGET for s in sides.values()),
        checkpointing=sides,
        targets={"memory_ratio": MEMORY_TARGET, "gradient_difference": GRADIENT_TARGET},
        **grown,
    )


def _mib(field: str) -> float:
    """Read a field of /proc/self/status; a forked process inherits its parent's getrusage peak."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) / 1024 for words in lines if words[0] == f"{field}:")


def _measured(work: Work, packed: bool, directory: Path) -> dict[str, float]:
    """Measure one update in this process: its seconds, its peak memory, what was counted."""
    update, model, prompt = _update(work, directory, packed)
    for weight in model.parameters():
        weight.sum()  # read from the mapped file now, or else it counts as memory of the update
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory, which this update would use again
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _mib("VmRSS")
    seconds = seconds_of(update)
    return {
        "seconds": seconds,
        "mib": _mib("VmHWM") - before,
        "gflops": flops(model.config, work, prompt, packed) / 1e9,
        "counted_mib": peak_bytes(model.config, work, prompt, model.num_parameters()) / 2**20,
    }
