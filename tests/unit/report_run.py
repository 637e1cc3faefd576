"""Write the directory of a GRPO run with what a run writes with: rollouts, metrics, events, a manifest of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS, GROUP = 10, 10  # 100 completions a step
WORDS = ("light", "colour", "sharp", "dull", "subject", "frame", "noise", "edge", "tone", "blur", "calm", "bright")
SENTENCE, SENTENCES = 10, 200  # words of one, and how many there are to choose from
LENGTH = {"iqa": 4, "iaa": 13}  # sentences of a rationale


def write_run(path: Path, steps: int, images: int, side: tuple[int, int]) -> Path:
    """Make the directory of a GRPO run that learned, half of it IQA, and return `path`."""
    from tatar_dist.config.schema import Config, DataConfig, GRPOConfig, ModelConfig, to_yaml
    from tatar_dist.rewards.batch import batch_of_groups
    from tatar_dist.rewards.metrics import reward_metrics
    from tatar_dist.rewards.presets import load_preset
    from tatar_dist.rewards.score import score_batch, scored_groups
    from tatar_dist.run.directory import write_rollouts
    from tatar_dist.run.events import Events

    rng = np.random.default_rng(0)
    path.mkdir(parents=True, exist_ok=True)
    samples = _samples(path / "train.parquet", images, side, rng)
    config = Config(
        output=str(path),
        model=ModelConfig(path="model"),
        data=DataConfig(train=[str(path / "train.parquet")]),
        grpo=GRPOConfig(prompts_per_step=PROMPTS, group_size=GROUP),
    )
    (path / "config.yaml").write_text(to_yaml(config))
    sentences = [" ".join(rng.choice(WORDS, SENTENCE)) + "." for _ in range(SENTENCES)]
    preset, events = load_preset("tatar"), Events(path)
    events.log("run/start", stage="grpo", total=steps, from_step=0, learners=2, engines=2)
    with open(path / "metrics.jsonl", "w") as log:
        for step in range(steps):
            groups = _groups(step, steps, samples, sentences, rng)
            batch = batch_of_groups(groups)
            scored = score_batch(batch, preset)
            write_rollouts(path / "rollouts" / f"step_{step:06d}.parquet", step, scored_groups(groups, scored))
            log.write(json.dumps({"step": step} | reward_metrics(batch, scored) | _other_metrics(step, rng)) + "\n")
            events.step = step
            if step % 50 == 7:
                events.log("engine/dead", engine=step % 2, reason="the process ended")
                events.log("engine/restarting", engine=step % 2, attempt=1)
            events.log("step/done", seconds=4.0)
    events.log("run/end")
    return path


def _samples(file: Path, images: int, side: tuple[int, int], rng: np.random.Generator) -> list[Any]:
    """Images of smooth noise, half of a task, written as a manifest."""
    import io

    from PIL import Image

    from tatar_dist.data.writing import write_manifest
    from tatar_dist.types import Sample

    found, rows = [], []
    for i in range(images):
        task = ("iqa", "iaa")[i % 2]
        buffer = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
        coarse.resize(side, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        found.append(Sample(f"{task}-{i:05d}", f"bench-{task}", task, b"", float(rng.uniform(5, 95))))  # type: ignore[arg-type]
        s = found[-1]
        row = {"sample_id": s.sample_id, "dataset": s.dataset, "task": task, "score": s.score, "split": "train"}
        rows.append(row | {"image_bytes": buffer.getvalue()})
    write_manifest(file, rows)
    return found


def _groups(step: int, steps: int, samples: list[Any], sentences: list[str], rng: np.random.Generator) -> list[Any]:
    """The step's groups; answers scatter less the later it is, 3 % do not parse."""
    from tatar_dist.prompts.answer import answer_text
    from tatar_dist.types import Completion, Group, Prompt

    groups, spread = [], 20.0 - 10.0 * step / steps
    for k in range(PROMPTS):
        sample = samples[(step * PROMPTS + k) % len(samples)]
        completions = []
        for score in np.clip(sample.score + rng.normal(0, spread, GROUP), 0, 100):
            think = " ".join(sentences[i] for i in rng.integers(0, len(sentences), LENGTH[sample.task]))
            text = answer_text(think, float(score)) if rng.random() > 0.03 else think
            n = len(think.split()) + 12
            completions.append(Completion(text, (1,) * n, (-0.3,) * n, "stop"))
        prompt = Prompt(sample, "", f"{step:06d}/{sample.dataset}/{sample.sample_id}")
        groups.append(Group(prompt, (1, 2), tuple(completions), step))
    return groups


def _other_metrics(step: int, rng: np.random.Generator) -> dict[str, float]:
    noise = float(rng.normal(0, 0.01))
    parts = {"generate": 3.0 + noise, "learn": 1.0, "sync": 0.2, "reward": 0.02}
    found = {f"time/{k}": v for k, v in parts.items()} | {"time/step": 4.3 + noise}
    for task, tokens in (("iqa", 52.0), ("iaa", 142.0)):
        found |= {f"completion/tokens/{task}": tokens, f"completion/clipped_ratio/{task}": 0.0}
    if step % 50 == 49:
        found |= {f"eval/bench-{t}/{k}": 0.8 + noise for t in ("iqa", "iaa") for k in ("srcc", "plcc")}
    return found | {
        "loss/total": noise, "loss/kl": 1e-5 * step, "policy/entropy": 0.5 + noise, "optim/grad_norm": 0.5 + noise,
        "optim/lr": 1e-6, "sync/logprob_gap": 1e-7, "sync/logprob_gap_max": 1e-5, "perf/tokens_per_second": 1600.0,
        "perf/rollout_idle": 0.3, "perf/learner_idle": 0.7,
    }  # fmt: skip
