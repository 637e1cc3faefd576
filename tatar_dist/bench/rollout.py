"""`tatar-dist bench rollout`: grouped completions by our vLLM engine beside Hugging Face's `generate`.

In: nothing. Out: the ratio of completion tokens a second for 4 images of 1,024 image tokens x 8 completions x 64
tokens, random 14M model, sampled, float32. Each side is a process that has loaded its model and waits; they work in
turns, on the CPU, with all cores. `generate` repeats a prompt in every row, as peers that roll out with it do; the
engine keeps it in its cache. Images are scaled before the rounds that count.
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
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tatar_dist.bench import subject
from tatar_dist.bench.result import ratio, result, summary
from tatar_dist.cluster import CPU_ENGINE_ENV
from tatar_dist.config import RolloutConfig
from tatar_dist.errors import RunError

PROMPTS, GROUP, TOKENS, ROUNDS, TARGET = 4, 8, 64, 3, 5.0
SIDES = ("generate", "engine")


def _config(directory: Path) -> Any:
    return subject.make(
        directory,
        words=[f"rollout.max_num_seqs={PROMPTS * GROUP}", "rollout.max_model_len=1536", "cluster.gpus_per_node=0"],
    )


def generate(directory: Path) -> Callable[[int], int]:
    """Rounds of transformers' generate; each returns how many completion tokens it made."""
    import torch
    from PIL import Image
    from transformers import Qwen2_5_VLForConditionalGeneration

    from tatar_dist.backbones import family

    config = _config(directory)
    backbone = family(config.model.family)(config.model)
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(config.model.path, dtype=torch.float32).eval()
    text = subject.prompt_text(backbone)
    pixels = [Image.open(subject.file(i, directory)).convert("RGB") for i in range(PROMPTS)]
    inputs = backbone.processor(text=[text] * PROMPTS, images=pixels, return_tensors="pt")

    def round_(seed: int) -> int:
        torch.manual_seed(seed)
        made = model.generate(
            **inputs, num_return_sequences=GROUP, do_sample=True, top_k=0, min_new_tokens=TOKENS, max_new_tokens=TOKENS
        )
        return (made.shape[1] - inputs["input_ids"].shape[1]) * made.shape[0]

    return round_


def engine(directory: Path) -> Callable[[int], int]:
    """The same by `RolloutEngine`."""
    from tatar_dist.records import Prompt, Sample
    from tatar_dist.rollout.engine import RolloutEngine, Sampling

    config = _config(directory)
    config.output = ""
    made = RolloutEngine(config, 0)
    made.setup(len(os.sched_getaffinity(0)), 0)
    from tatar_dist.backbones import family

    text = subject.prompt_text(family(config.model.family)(config.model))
    samples = [Sample(str(i), "bench", "iqa", subject.file(i, directory).read_bytes(), 50.0) for i in range(PROMPTS)]
    prompts = [Prompt(s, text, s.sample_id) for s in samples]

    def round_(seed: int) -> int:
        made._reset_caches()  # as after a weight push
        groups = made.generate(prompts, Sampling(GROUP, 1.0, TOKENS, seed=seed, step=seed), 0)
        return sum(len(c.token_ids) for g in groups for c in g.completions)

    return round_


class Side:
    """A process that makes a round whenever it is asked."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.log = (directory / f"{name}.log").open("w")
        words = [sys.executable, "-m", "tatar_dist.bench.rollout", name, str(directory)]
        space = {"VLLM_CPU_KVCACHE_SPACE": str(RolloutConfig().cpu_kv_cache_gib)}
        env = {**os.environ, **CPU_ENGINE_ENV, **space}  # as engines have it in a run (cluster.py)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process: Any = subprocess.Popen(words, text=True, env=env, **pipes)

    def round(self, seed: int) -> dict[str, float]:
        """Seconds and completion tokens of one round. Raises RunError with the end of its log when the side died."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{seed}\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith('{"seconds"'):
                    found: dict[str, float] = json.loads(line)
                    return found
        raise RunError(f"bench rollout: {self.name} ended: {Path(self.log.name).read_text()[-2000:]}")

    def close(self) -> None:
        self.process.kill()  # it holds nothing
        self.process.wait()
        self.log.close()


def run() -> dict[str, Any]:
    """All measurements, as what `--json` prints."""
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        _config(directory)
        for i in range(PROMPTS):
            subject.file(i, directory).write_bytes(subject.image(i))
        sides = {name: Side(name, directory) for name in SIDES}
        for side in sides.values():
            stack.callback(side.close)
        for round_ in range(ROUNDS + 1):
            for name, side in sides.items():
                found = side.round(round_)
                if round_:
                    rates[name].append(found["tokens"] / found["seconds"])
    return result(
        "rollout",
        "transformers' generate",
        ratio(rates["engine"], rates["generate"]),
        TARGET,
        "none counted",
        tokens_per_second=rates,
    )


def print_table(found: dict[str, Any]) -> None:
    """Tokens a second of both."""
    table = Table(title=f"{PROMPTS} images x {GROUP} completions x {TOKENS} tokens", title_justify="left")
    for name in ("", "tokens/s, by round"):
        table.add_column(name)
    for name, rates in found["tokens_per_second"].items():
        table.add_row(
            {"generate": "transformers' generate", "engine": "vLLM engine"}[name], ", ".join(f"{r:.0f}" for r in rates)
        )
    console = Console()
    console.print(table)
    console.print(summary(found))


def _main() -> None:
    """One side: a round for every line on standard input."""
    make = {"generate": generate, "engine": engine}[sys.argv[1]]
    work = make(Path(sys.argv[2]))
    for line in sys.stdin:
        start = time.perf_counter()
        tokens = work(int(line))
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    _main()
