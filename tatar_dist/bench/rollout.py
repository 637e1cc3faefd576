"""Time grouped completions by our engine beside `generate`: `tatar-dist bench rollout`.

Completion tokens a second for 4 images of 1,024 image tokens x 8 completions x 64 tokens, random 14M model, sampled,
float32. Each side is a process that has loaded its model and waits; they work in turns, on the CPU, with all cores.
Every round has other images, decoded and scaled within it.

`generate` (num_return_sequences) encodes an image once per group and runs the prompt through the language model in
every row; `rows` repeats the image, too, as trainers that sample rows independently do (TRL), and works in one round
only, a minute of it; the engine does both once. Target and verdict are about `generate`, the stronger of the two.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tatar_dist.bench import subject
from tatar_dist.bench.counts import Work, forward_flops
from tatar_dist.bench.harness import ratio, result, seconds_of
from tatar_dist.config.schema import RolloutConfig
from tatar_dist.errors import RunError
from tatar_dist.models.sizes import ModelSizes
from tatar_dist.rollout.options import COMMON_ENV, CPU_ENGINE_ENV

WORK, ROUNDS, TARGET = Work(groups=4, size=8, tokens=64), 2, 5.0
SIDES = {"generate": "transformers' generate", "rows": "generate, images repeated", "engine": "vLLM engine"}
PRODUCT = 2048  # rows and columns of the matrices whose product says what the machine can do


def prepared(directory: Path, work: Work = WORK) -> Any:
    """Return the configuration of the random model, which is written if it is not there."""
    words = [f"rollout.max_num_seqs={work.groups * work.size}", "rollout.max_model_len=1536", "cluster.gpus_per_node=0"]
    return subject.make(directory, work.pixels, words=words)


def _files(directory: Path, round_: int, work: Work) -> list[Path]:
    """Return where the images of a round are."""
    return [subject.file(round_ * work.groups + i, directory) for i in range(work.groups)]


def write_images(directory: Path, rounds: int, work: Work = WORK) -> None:
    """Write other images for every round."""
    for i in range(rounds * work.groups):
        subject.file(i, directory).write_bytes(subject.image(i, work.pixels))


def generate(directory: Path, work: Work = WORK, repeat: bool = False) -> Callable[[int], int]:
    """Return a round of transformers' generate, which returns its completion tokens."""
    import torch
    from PIL import Image
    from transformers import Qwen2_5_VLForConditionalGeneration

    from tatar_dist.models import family

    config = prepared(directory, work)
    backbone = family(config.model.family)(config.model)
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(config.model.path, dtype=torch.float32).eval()
    text = subject.prompt_text(backbone)
    rows, returned = (work.size, 1) if repeat else (1, work.size)

    def round_(seed: int) -> int:
        torch.manual_seed(seed)
        images = [Image.open(f).convert("RGB") for f in _files(directory, seed, work) for _ in range(rows)]
        inputs = backbone.processor(text=[text] * len(images), images=images, return_tensors="pt")
        length = {"min_new_tokens": work.tokens, "max_new_tokens": work.tokens}
        made = model.generate(**inputs, num_return_sequences=returned, do_sample=True, top_k=0, **length)
        return (made.shape[1] - inputs["input_ids"].shape[1]) * made.shape[0]

    return round_


def rows(directory: Path, work: Work = WORK) -> Callable[[int], int]:
    """Return the same with the image of a prompt repeated in every row."""
    return generate(directory, work, repeat=True)


def engine(directory: Path, work: Work = WORK) -> Callable[[int], int]:
    """Return the same by `RolloutEngine`."""
    from tatar_dist.models import family
    from tatar_dist.rollout.engine import RolloutEngine, Sampling
    from tatar_dist.types import Prompt, Sample

    config = replace(prepared(directory, work), output="")
    made = RolloutEngine(config, 0)
    made.setup(len(os.sched_getaffinity(0)), 0)
    text = subject.prompt_text(family(config.model.family)(config.model))

    def round_(seed: int) -> int:
        made._reset_caches()  # as after a weight push
        samples = [Sample(f.stem, "bench", "iqa", f.read_bytes(), 50.0) for f in _files(directory, seed, work)]
        prompts = [Prompt(s, text, s.sample_id) for s in samples]
        groups = made.generate(prompts, Sampling(work.size, 1.0, work.tokens, seed=seed, step=seed), 0)
        return sum(len(c.token_ids) for g in groups for c in g.completions)

    return round_


def round_flops(config: Any, prompt: int, work: Work = WORK) -> dict[str, float]:
    """Count the FLOPs of a round by side, and of the vision tower in the engine's.

    `config`: a Qwen2_5_VLConfig; `prompt`: tokens of a prompt. All tokens of a completion come from logits; all but
    the last go through the layers.
    """
    sizes, patches = ModelSizes.of(config.to_dict()), (work.pixels // config.vision_config.patch_size) ** 2
    tower = sizes.forward_flops(1, patches, 0, 0)
    image = tower + patches * 2 * sizes.patch
    count = work.groups * work.size
    head = count * work.tokens * 2 * sizes.head
    shared = forward_flops(config, work, prompt, True) - work.groups * tower + head
    repeated = forward_flops(config, replace(work, tokens=work.tokens - 1), prompt, False) - count * tower + head
    return {
        "generate": work.groups * image + repeated,
        "rows": count * image + repeated,
        "engine": work.groups * image + shared,
        "tower": work.groups * image,
    }


def _shape(directory: Path) -> tuple[Any, int]:
    """Return the model's configuration and the tokens of a prompt."""
    from transformers import AutoConfig

    from tatar_dist.models import family

    config = prepared(directory)
    backbone = family(config.model.family)(config.model)
    shape: Any = AutoConfig.from_pretrained(config.model.path)
    return shape, subject.prompt_tokens(backbone, subject.prompt_text(backbone), WORK.pixels)


def product_rate() -> float:
    """Measure the FLOPs a second of a product of float32 matrices on all cores."""
    import torch

    a, b = torch.rand(2, PRODUCT, PRODUCT)
    return 2 * PRODUCT**3 / seconds_of(lambda: a @ b)


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
        "seconds": min(seconds["engine"]),
        "ratio": min(seconds["generate"]) / least,
    }


class Side:
    """A process that makes a round whenever it is asked: `python -m MODULE NAME DIRECTORY` that calls `answer`."""

    def __init__(self, name: str, directory: Path, module: str = "tatar_dist.bench.rollout") -> None:
        self.name = name
        self.log = (directory / f"{name}.log").open("w")
        words = [sys.executable, "-m", module, name, str(directory)]
        own = {
            "VLLM_CPU_KVCACHE_SPACE": str(RolloutConfig().cpu_kv_cache_gib),
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        }
        env = {**os.environ, **COMMON_ENV, **CPU_ENGINE_ENV, **own}  # as in a run (cluster/ray_cluster.py)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process: Any = subprocess.Popen(words, text=True, env=env, **pipes)

    def round(self, seed: int) -> dict[str, float]:
        """Measure one round. Raises RunError with the end of its log when the side died."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{seed}\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith('{"seconds"'):
                    found: dict[str, float] = json.loads(line)
                    return found
        raise RunError(f"{self.name} ended: {Path(self.log.name).read_text()[-2000:]}")

    def close(self) -> None:
        self.process.kill()  # it holds nothing
        self.process.wait()
        self.log.close()


def run() -> dict[str, Any]:
    """Measure everything."""
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    products: list[float] = []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        counted = round_flops(*_shape(directory))
        write_images(directory, ROUNDS + 1)
        sides = {name: Side(name, directory) for name in SIDES}
        for side in sides.values():
            stack.callback(side.close)
        for round_ in range(ROUNDS + 1):
            for name, side in sides.items():
                if name == "rows" and round_ != 1:
                    continue  # a minute each: one is enough to see what repeating an image costs
                found = side.round(round_)
                if round_:
                    rates[name].append(found["tokens"] / found["seconds"])
                    seconds[name].append(found["seconds"])
            products += [product_rate() for _ in range(3)]
    bound = limit(counted, max(products), seconds)
    return result(
        "rollout",
        "transformers' generate",
        ratio(rates["engine"], rates["generate"]),
        TARGET,
        f"{bound['ratio']:.2f} times, a round of {bound['least_seconds']:.1f} s at the "
        f"{bound['gflops_per_second']:.0f} GFLOP/s of a matrix product (ours: {bound['seconds']:.1f} s); "
        f"{bound['equal_speed']:.2f} times by FLOPs counted",
        sides={
            SIDES[name]: {
                "tokens_per_second": rates[name],
                "seconds": seconds[name],
                "gflops": counted[name] / 1e9,
                "gflops_per_second": counted[name] / 1e9 / min(seconds[name]),
            }
            for name in SIDES
        },
        bound=bound,
        tower_share=counted["tower"] / counted["engine"],
        ratio_rows=ratio(rates["engine"][:1], rates["rows"]),
    )


def answer(work: Callable[[int], int]) -> None:
    """Serve a `Side`: a round of `work` for every line on standard input, the round's number."""
    for line in sys.stdin:
        start = time.perf_counter()
        tokens = work(int(line))
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    make = {"generate": generate, "rows": rows, "engine": engine}[sys.argv[1]]
    answer(make(Path(sys.argv[2])))
