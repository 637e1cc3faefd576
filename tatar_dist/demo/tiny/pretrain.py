"""Make the demo's base model: build, train the tower, align, save as bf16 with a model card.

    python -m tatar_dist.demo.tiny.pretrain --output DIR
    python -m tatar_dist.demo.tiny.pretrain --output DIR --minutes-tower 1 --minutes-align 1

Trains on the demo's photographs of the train split and reports figures on those of the validation split; test
photographs are never opened. Writes a model directory for transformers and vLLM. The result depends on the machine's
speed, since stages are limited by time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from jinja2 import StrictUndefined, Template

from tatar_dist.demo.tiny.align import train_align
from tatar_dist.demo.tiny.build import default_corpus, make_model, make_processor, train_tokenizer
from tatar_dist.demo.tiny.crops import crop_set
from tatar_dist.demo.tiny.tower import train_tower
from tatar_dist.types import TASKS

VALIDATION_CROPS = 1_000


def pretrain(
    output: Annotated[Path, typer.Option(help="Model directory to write.")],
    minutes_tower: float = 24.0,
    minutes_align: float = 8.0,
    crops: Annotated[int, typer.Option(help="Train crops per task.")] = 30_000,
    seed: int = 0,
) -> None:
    """Build the base model, train its tower, align its language model and write its directory."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    # Seeds apart from the demo's default 0, so that the base has not seen the very crops it is fine-tuned on.
    train = {t: crop_set(t, "train", crops, seed + 11) for t in TASKS}
    validation = {t: crop_set(t, "validation", VALIDATION_CROPS, seed + 7) for t in TASKS}
    tokenizer = train_tokenizer(default_corpus(), 1024)
    model = make_model(tokenizer, seed=seed)
    tower = train_tower(model, train, validation, minutes=minutes_tower, seed=seed)
    # What is saved is bf16: the language model is aligned to the tower as it will be loaded.
    model.model.visual.to(torch.bfloat16).to(torch.float32)
    align = train_align(model, tokenizer, train, validation, minutes=minutes_align, seed=seed)

    model.to(torch.bfloat16).save_pretrained(output)
    make_processor(tokenizer).save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)
    options = f"--minutes-tower {minutes_tower:g} --minutes-align {minutes_align:g} --crops {crops}"
    template = Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8")
    card = Template(template, undefined=StrictUndefined).render(
        command=f"python -m tatar_dist.demo.tiny.pretrain --output DIR {options}",
        seed=seed,
        crops=crops,
        validation_crops=VALIDATION_CROPS,
        millions=sum(p.numel() for p in model.parameters()) / 1e6,
        tower=tower,
        align=align,
    )
    (output / "README.md").write_text(card + "\n", encoding="utf-8")
    print(f"wrote {output}")


def main() -> None:
    typer.run(pretrain)


if __name__ == "__main__":
    main()
