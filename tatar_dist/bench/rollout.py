"""Time grouped completions by our engine beside `generate`: `tatar-dist bench rollout`.

Completion tokens a second for 4 images of 1,024 image tokens x 8 completions x 64 tokens, random 14M model, sampled,
float32, on the CPU with all cores. Each side is a process that has loaded its model; they work in turns, each round
with other images.

`generate` (num_return_sequences) encodes an image once per group and runs the prompt through the language model in
every row; `rows` repeats the image, too, as trainers that sample rows independently do (TRL); the engine does both
once. Target and verdict are about `generate`, the stronger of the two.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tatar_dist.bench import subject
from tatar_dist.bench.harness import ratio, result, seconds_of
from tatar_dist.bench.subject import Work
from tatar_dist.rollout.options import COMMON_ENV, engine_environment

WORK, ROUNDS, TARGET = Work(groups=4), 2, 5.0
NAMES = {"generate": "transformers' generate", "rows": "generate, images repeated", "engine": "vLLM engine"}
PRODUCT = 2048  # rows and columns of the matrices whose product says what the machine can do


def prepared(directory: Path, work: Work = WORK) -> Any:
    """Write the random model unless it exists; return its configuration."""
    words = [f"rollout.max_num_seqs={work.groups * work.size}", "rollout.max_model_len=1536"]
    return subject.make(directory, work.pixels, words=words)


def images(directory: Path, round_: int, work: Work = WORK) -> list[Path]:
    """Return the image paths of round `round_`; no two rounds share an image."""
    return [directory / f"{round_ * work.groups + i}.png" for i in range(work.groups)]


def generate(directory: Path, work: Work = WORK, repeat: bool = False) -> Callable[[int], int]:
    """Load transformers' model; return a function that makes a round and counts its tokens.

    Only completion tokens count. repeat: Put the image of a prompt into every row.
    """
    import torch
    from PIL import Image
    from transformers import Qwen2_5_VLForConditionalGeneration

    from tatar_dist.models import family

    config = prepared(directory, work)
    backbone = family(config.model.family)(config.model)
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(config.model.path, dtype=torch.float32).eval()
    text = subject.prompt_text(backbone)
    rows, returned = (work.size, 1) if repeat else (1, work.size)

    def make_round(seed: int) -> int:
        torch.manual_seed(seed)
        pictures = [Image.open(f).convert("RGB") for f in images(directory, seed, work) for _ in range(rows)]
        inputs = backbone.processor(text=[text] * len(pictures), images=pictures, return_tensors="pt")
        length = {"min_new_tokens": work.tokens, "max_new_tokens": work.tokens}
        ids = model.generate(**inputs, num_return_sequences=returned, do_sample=True, top_k=0, **length)
        return (ids.shape[1] - inputs["input_ids"].shape[1]) * ids.shape[0]

    return make_round


def engine(directory: Path, work: Work = WORK) -> Callable[[int], int]:
    """Return the same with `RolloutEngine`."""
    from tatar_dist.models import family
    from tatar_dist.rollout.engine import RolloutEngine, Sampling
    from tatar_dist.types import Prompt, Sample

    config = replace(prepared(directory, work), output="")
    loaded = RolloutEngine(config, 0)
    loaded.setup(len(os.sched_getaffinity(0)), 0)
    text = subject.prompt_text(family(config.model.family)(config.model))

    def make_round(seed: int) -> int:
        loaded._reset_caches()  # as after a weight push
        samples = [Sample(f.stem, "bench", "iqa", f.read_bytes(), 50.0) for f in images(directory, seed, work)]
        prompts = [Prompt(s, text, s.sample_id) for s in samples]
        groups = loaded.generate(prompts, Sampling(work.size, 1.0, work.tokens, seed=seed, step=seed), 0)
        return sum(len(c.token_ids) for g in groups for c in g.completions)

    return make_round


@cache
def _loaded(name: str, directory: Path) -> Callable[[int], int]:
    os.dup2(2, 1)  # libraries print; standard output is for the bench's result
    return {"generate": generate, "rows": partial(generate, repeat=True), "engine": engine}[name](directory)


def _round(name: str, directory: Path, seed: int) -> tuple[int, float]:
    """Make a round in a side's process, and load its model at first. Returns (tokens, seconds)."""
    make_round = _loaded(name, directory)
    start = time.perf_counter()
    return make_round(seed), time.perf_counter() - start


def round_flops(config: Any, prompt: int, work: Work = WORK) -> dict[str, float]:
    """Count the FLOPs of a round by side, and of the vision tower in the engine's.

    Arguments as in `subject.counts`. All tokens of a completion come from logits; all but the last use the layers.
    """
    sizes, _, patches, *shared = subject.counts(config, work, prompt, packed=True)
    _, rows, _, *repeated = subject.counts(config, replace(work, tokens=work.tokens - 1), prompt, packed=False)
    image = sizes.forward_flops(1, patches, 0, 0) + patches * 2 * sizes.patch
    head = work.completion_tokens * 2 * sizes.head
    once = sizes.forward_flops(0, patches, *shared) + head
    each_row = sizes.forward_flops(0, patches, *repeated) + head
    return {
        "generate": work.groups * image + each_row,
        "rows": rows * image + each_row,
        "engine": work.groups * image + once,
        "tower": work.groups * image,
    }


def limit(counted: dict[str, float], rate: float, seconds: dict[str, list[float]]) -> dict[str, float]:
    """Return what FLOPs allow. `rate`: of a matrix product; `seconds`: of rounds, by side.

    `equal_speed`: the ratio at the same FLOPs a second on both sides. `ratio`: an engine that works at `rate` all the
    time beside the baseline as it is; it holds only where nothing else ran on the machine.
    `least_seconds`: of such an engine's round.
    """
    least = counted["engine"] / rate
    return {
        "equal_speed": counted["generate"] / counted["engine"],
        "equal_speed_rows": counted["rows"] / counted["engine"],
        "gflops_per_second": rate / 1e9,
        "least_seconds": least,
        "ratio": min(seconds["generate"]) / least,
    }


def run() -> dict[str, Any]:
    """Measure everything."""
    import torch
    from transformers import AutoConfig

    from tatar_dist.models import family

    rates: dict[str, list[float]] = {name: [] for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    products: list[float] = []
    a, b = torch.rand(2, PRODUCT, PRODUCT)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        config = prepared(directory)
        prompt = subject.prompt_tokens(family(config.model.family)(config.model), WORK.pixels)
        counted = round_flops(AutoConfig.from_pretrained(config.model.path), prompt)
        subject.write_images(directory, (ROUNDS + 1) * WORK.groups)
        os.environ |= COMMON_ENV | engine_environment(config, False, len(os.sched_getaffinity(0)))
        sides = {name: ProcessPoolExecutor(1, get_context("spawn")) for name in NAMES}
        for round_ in range(ROUNDS + 1):
            for name, side in sides.items():
                if name == "rows" and round_ != 1:
                    continue  # a minute each: one is enough to see what repeating an image costs
                tokens, taken = side.submit(_round, name, directory, round_).result()
                if round_:
                    rates[name].append(tokens / taken)
                    seconds[name].append(taken)
            products += [2 * PRODUCT**3 / seconds_of(lambda: a @ b) for _ in range(3)]
        for side in sides.values():
            side.shutdown()
    bound = limit(counted, max(products), seconds)
    return result(
        "rollout",
        "transformers' generate",
        ratio(rates["engine"], rates["generate"]),
        TARGET,
        f"{bound['ratio']:.2f} times, a round of {bound['least_seconds']:.1f} s at the "
        f"{bound['gflops_per_second']:.0f} GFLOP/s of a matrix product (ours: {min(seconds['engine']):.1f} s); "
        f"{bound['equal_speed']:.2f} times by FLOPs counted",
        sides={label: {"tokens_per_second": rates[n], "seconds": seconds[n]} for n, label in NAMES.items()},
        bound=bound,
        tower_share=counted["tower"] / counted["engine"],
        ratio_rows=ratio(rates["engine"][:1], rates["rows"]),
    )
