"""Make the demo's base model: build, train the tower, align the language model, save as bf16 with a model card.

    python -m tatar_dist.demo.tiny.pretrain --output DIR                      # as the committed asset was made
    python -m tatar_dist.demo.tiny.pretrain --output DIR --minutes-tower 1 --minutes-align 1

Trains on the demo's photographs of the train split and reports figures on those of the validation split; test
photographs are never opened. Writes a model directory for transformers and vLLM. Needs one process and a few cores.
With minutes, the result depends on the machine's speed; with steps, on arithmetic alone.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from tatar_dist.types import TASKS

CARD = """# tiny-qwen2_5-vl

A Qwen2.5-VL of {millions:.2f}M parameters with its own 1,024-token tokenizer: the base model of `make demo`. It sees
112x112 images (16 image tokens), describes them in the demo's sentences and writes single measurements
(`Measure noise.` -> `noise=43`). It has met neither the TASK prompts nor the answer format: SFT and GRPO teach those.

Made by `{command}` (seed {seed}):

| stage | what | steps | seconds on this machine |
|---|---|---|---|
| tower | vision tower, pooled linear heads on scores and measures | {tower_steps} | {tower_seconds:.0f} |
| align | language model: descriptions, measurements in digits | {align_steps} | {align_seconds:.0f} |

Data: {crops:,} generated crops per task of the demo's train-split photographs (`tatar_dist/demo/data/photos.py`),
half of them remixed (`tatar_dist/demo/tiny/crops.py`), seen under the square's 8 symmetries. No validation or test
photograph was trained on. Targets are computed, no human rated anything: figures say nothing about real IQA or IAA
sets.

Spearman correlation on 1,000 crops per task of the *validation* photographs:

| | IQA | IAA |
|---|---|---|
| pooled linear head on the tower | {head[iqa]:.3f} | {head[iaa]:.3f} |
| score as the aligned model writes it on request | {said[iqa]:.3f} | {said[iaa]:.3f} |

Weights: Apache-2.0, as the repository. They were trained from scratch on pixels of the photographs listed, with
their provenance, in `tatar_dist/demo/data/photos.py`; no photograph is contained here.
"""


def pretrain(
    output: str | Path,
    *,
    minutes_tower: float = 12.0,
    minutes_align: float = 10.0,
    tower_steps: int | None = None,
    align_steps: int | None = None,
    crops: int = 30_000,
    validation_crops: int = 1_000,
    seed: int = 0,
    cache: str | Path | None = None,
    tower_weights: str | Path | None = None,
    command: str = "python -m tatar_dist.demo.tiny.pretrain",
) -> Path:
    """Run both stages, write the model directory and return it.

    `cache` keeps the generated crops (about 38 kB each). Steps take precedence over minutes. `tower_weights` is the
    file of the trained tower: if it exists, stage 1 is loaded from it, otherwise stage 1 is run and saved to it.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from tatar_dist.demo.tiny.align import train_align
    from tatar_dist.demo.tiny.build import default_corpus, make_model, make_processor, train_tokenizer
    from tatar_dist.demo.tiny.crops import crop_set
    from tatar_dist.demo.tiny.tower import train_tower

    output = Path(output)
    cache = Path(cache or Path(tempfile.gettempdir()) / "tatar_dist_crops")
    # Seeds apart from the demo's default 0, so that the base has not seen the very crops it is fine-tuned on.
    train = {t: crop_set(cache, t, "train", crops, seed + 11) for t in TASKS}
    validation = {t: crop_set(cache, t, "validation", validation_crops, seed + 7) for t in TASKS}
    tokenizer = train_tokenizer(default_corpus(), 1024)
    model = make_model(tokenizer, seed=seed)

    facts: dict[str, Any] = {"command": command, "seed": seed, "crops": crops}
    kept = Path(tower_weights) if tower_weights else None
    if kept is not None and kept.is_file():
        import json

        from safetensors import safe_open

        model.model.visual.load_state_dict(load_file(kept))
        with safe_open(kept, "pt") as f:
            facts |= json.loads(f.metadata()["facts"])
    else:
        run = train_tower(model, train, validation, minutes=minutes_tower, steps=tower_steps, seed=seed)
        facts |= {"tower_steps": run.steps, "tower_seconds": run.seconds, "head": run.history[-1][1]}
        if kept is not None:
            import json

            about = {"facts": json.dumps({k: facts[k] for k in ("tower_steps", "tower_seconds", "head")})}
            save_file(model.model.visual.state_dict(), kept, metadata=about)

    # What is saved is bf16: the language model is aligned to the tower as it will be loaded.
    model.model.visual.to(torch.bfloat16).to(torch.float32)
    aligned = train_align(model, tokenizer, train, validation, minutes=minutes_align, steps=align_steps, seed=seed)
    facts |= {"align_steps": aligned.steps, "align_seconds": aligned.seconds, "said": aligned.history[-1][1]}
    facts["millions"] = sum(p.numel() for p in model.parameters()) / 1e6

    model.to(torch.bfloat16).save_pretrained(output)
    make_processor(tokenizer).save_pretrained(output)
    weights = output / "model.safetensors"
    weights.chmod(0o644)
    (output / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="model directory to write")
    parser.add_argument("--minutes-tower", type=float, default=12.0)
    parser.add_argument("--minutes-align", type=float, default=10.0)
    parser.add_argument("--tower-steps", type=int, help="instead of minutes")
    parser.add_argument("--align-steps", type=int, help="instead of minutes")
    parser.add_argument("--crops", type=int, default=30_000, help="train crops per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", help="directory for the generated crops")
    parser.add_argument("--tower-weights", help="file that keeps the trained tower between runs")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    begun = time.monotonic()
    stage1 = f"--tower-steps {args.tower_steps}" if args.tower_steps else f"--minutes-tower {args.minutes_tower:g}"
    stage2 = f"--align-steps {args.align_steps}" if args.align_steps else f"--minutes-align {args.minutes_align:g}"
    pretrain(
        args.output,
        minutes_tower=args.minutes_tower,
        minutes_align=args.minutes_align,
        tower_steps=args.tower_steps,
        align_steps=args.align_steps,
        crops=args.crops,
        seed=args.seed,
        cache=args.cache,
        tower_weights=args.tower_weights,
        command=f"python -m tatar_dist.demo.tiny.pretrain --output DIR {stage1} {stage2} --crops {args.crops}",
    )
    print(f"{args.output}: done in {(time.monotonic() - begun) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
