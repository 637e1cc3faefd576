"""A model of a million parameters that was taught, in seconds, to write a few fast and slow rationales.

What it writes does not depend on the image. Some of its texts hold a number, so that some answers are rejected and
asked again. It was never taught to judge: its marks follow the schema because the engine holds it to that.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import model_words, once, png

from tatar_dist.config.load import load_config
from tatar_dist.data.writing import write_manifest
from tatar_dist.rationale.questions import Build, QuestionRow
from tatar_dist.rationale.wording import load_wording
from tatar_dist.run.process import importing
from tatar_dist.types import EIGHT

STEPS = 80
NOTES = {name: "noted" for name in EIGHT}
# Fit for both tasks, since a model this small does not learn to tell the tasks apart in seconds. The last one is not.
TEXTS = [
    "The colours lead into a calm composition that forms one whole, where technical care and sharp detail serve the "
    "theme. A quiet mood with some originality remains, and overall it pleases the viewer.",
    "The lines lead into a loose composition that forms no whole, where technical faults and soft detail hide the "
    "theme. A dull mood with little originality remains, and overall it tires the viewer.",
    "The shapes lead into a firm composition that forms one whole, where technical skill and 7 details serve the "
    "theme. A strange mood with some originality remains, and overall it puzzles the viewer.",
]
WORDING = {
    "fast": {"system": "You see.", "user": "IQA quality IQA quality $score."},
    "slow": {"system": "You see.", "user": "$attributes\nIAA beauty IAA beauty $score."},
    "judge": {
        "iqa": {"system": "You judge.", "user": "Quality is $score.\n$rationale\nMarks for it."},
        "iaa": {"system": "You judge.", "user": "Beauty is $score.\n$rationale\nMarks for it."},
    },
}
# What the tests lower, because a tiny model's texts are short.
SMALLER = [
    "rationale.slow.min_words=25",
    "rationale.fast.temperature=1.0",
    "rationale.slow.temperature=1.0",
    "rationale.fast.top_p=0.95",
    "rationale.slow.top_p=0.95",
    "rationale.fast.max_tokens=60",
    "rationale.slow.max_tokens=80",
    "rationale.verdict.reject_at=0",
    "rationale.attempts=2",
]


def wording_file(directory: Path) -> Path:
    """The word lists that are shipped, with prompts short enough for a tiny model."""
    import yaml

    with open("configs/rationale_prompts.yaml", encoding="utf-8") as f:
        shipped = yaml.safe_load(f)
    path = directory / "wording.yaml"
    path.write_text(yaml.safe_dump({**WORDING, "checks": shipped["checks"]}))
    return path


def manifest(path: Path, n: int) -> Path:
    """n IQA and n IAA rows."""
    base = {"image_bytes": png(1), "split": "train"}
    rows = [
        {**base, "sample_id": f"{t}-{i:03d}", "dataset": t, "task": t, "score": 11.0 + i % 80, "attributes": NOTES}
        for t in ("iqa", "iaa")
        for i in range(n)
    ]
    write_manifest(path, rows)
    return path


def _prompts(directory: Path, path: str, backbone) -> dict[str, list[str]]:
    """Rendered prompts of each task, for the scores that occur."""
    config = load_config([], ["output=unused", *model_words(path)])
    build = Build(config, load_wording(wording_file(directory)))
    found = {}
    for task in ("iqa", "iaa"):
        found[task] = []
        for score in range(11, 91):
            request = build.request(QuestionRow(0, "a", task, task, float(score), None, NOTES), 0)
            messages = [
                {"role": "system", "content": [{"type": "text", "text": request.system}]},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": request.user}]},
            ]
            text = backbone.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            found[task].append(text)
    return found


def taught_model(factory: pytest.TempPathFactory) -> str:
    """Build and teach it, once for all tests. Returns the model's path."""
    return str(once(factory, "rationale", _teach) / "model")


def _teach(directory: Path) -> None:
    with importing():
        import torch
        from transformers.utils import logging

        from tatar_dist.demo.tiny.build import build
        from tatar_dist.learner.batch import Collator
        from tatar_dist.learner.policy import PolicyModel
        from tatar_dist.models import family
        from tatar_dist.types import LearnerRow

    logging.disable_progress_bar()
    torch.manual_seed(0)
    words = json.dumps(WORDING) + " ".join(EIGHT) + " noted"
    path = str(build(directory / "model", corpus=[*TEXTS, words] * 20))
    config = load_config([], ["output=unused", *model_words(path)])
    backbone = family("qwen2_5_vl")(config.model)
    model = backbone.load_model()
    policy = PolicyModel(model, backbone, backbone.forbidden_ids())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    prompts = _prompts(directory, path, backbone)
    rng, image = np.random.default_rng(0), png(1)
    for _ in range(STEPS):
        rows = []
        for i in range(4):
            task = ("iqa", "iaa")[i % 2]
            text = str(rng.choice(TEXTS))
            ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
            prompt = str(rng.choice(prompts[task]))
            rows.append(LearnerRow("i", image, prompt, (*ids, backbone.end_of_turn()), task))
        batch = Collator(backbone)(rows)
        loss = -policy(batch).logp.sum() / batch.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5, f"the model did not learn its texts: loss {loss.item():.2f}"
    model.save_pretrained(path)
