"""The packed forward on one CUDA GPU, with torch and transformers alone: `python -m pytest tests/gpu_learner`.

What it must equal is the packed forward on the CPU, which tests/unit compares with padded rows. Never run on a GPU:
none was at hand; on the CPU only the test itself was tried. Without a GPU it fails, it does not skip.
"""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tatar_dist.config.load import load_config
from tatar_dist.demo.tiny.build import TinySizes, build
from tatar_dist.learner.batch import Collator
from tatar_dist.learner.policy import PolicyModel
from tatar_dist.models import family
from tatar_dist.types import LearnerRow

SIZES = TinySizes(vocab=512, text_layers=2, vision_depth=2)  # heads of 32, which flash kernels take
IMAGES = {"a": (112, 112), "b": (224, 112), "c": (96, 160)}
LENGTHS = (7, 1, 40, 12, 33)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A random model on the CPU in float32, a packed row of ragged completions, and what they give."""
    assert torch.cuda.is_available(), "needs a GPU that torch sees"
    corpus = ["a plain view of it", "system user assistant"] * 20
    path = build(tmp_path_factory.mktemp("tiny"), corpus=corpus, sizes=SIZES)
    words = [f"model.path={path}", "model.dtype=float32", "model.min_pixels=12544", "model.max_pixels=50176"]
    backbone = family("qwen2_5_vl")(load_config([], ["output=unused", *words]).model)
    rng, rows = np.random.default_rng(0), []
    for image, n in zip("abacb", LENGTHS, strict=True):
        png = io.BytesIO()
        pixels = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(IMAGES[image])
        pixels.save(png, "PNG")
        content = [{"type": "image"}, {"type": "text", "text": "a plain view"}]
        prompt = backbone.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = tuple(int(i) for i in rng.integers(40, 200, n))
        rows.append(LearnerRow(image, png.getvalue(), prompt, ids, "iqa"))
    batch = Collator(backbone)(rows)
    weights = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(1)) * batch.mask
    return SimpleNamespace(batch=batch, weights=weights, backbone=backbone)


def result(
    tiny: SimpleNamespace, device: str, dtype: torch.dtype = torch.float32, checkpointing: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and the whole gradient, on the CPU in float32."""
    model = tiny.backbone.load_model().train().to(device, dtype)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = PolicyModel(model, tiny.backbone, tiny.backbone.forbidden_ids()).to(device)
    logp = policy(tiny.batch.to(torch.device(device))).logp
    (logp * tiny.weights.to(device)).sum().backward()
    gradient = torch.cat([p.grad.flatten().float().cpu() for p in policy.parameters()])
    return logp.detach().float().cpu(), gradient


def apart(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())


def test_in_float32_it_is_the_cpus(tiny):
    right, found = result(tiny, "cpu"), result(tiny, "cuda")
    assert apart(found[0], right[0]) < 1e-5 and apart(found[1], right[1]) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_bfloat16_flash_kernels_are_as_near_as_bfloat16_is(tiny, checkpointing):
    right, low = result(tiny, "cpu"), torch.bfloat16
    on_cpu, found = result(tiny, "cpu", low, checkpointing), result(tiny, "cuda", low, checkpointing)
    for i in (0, 1):
        assert 0 < apart(found[i], right[i]) < 2 * apart(on_cpu[i], right[i])
