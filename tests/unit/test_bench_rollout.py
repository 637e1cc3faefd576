"""The rollout bench: its count of FLOPs against torch's own, its images, its limit."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from tatar_dist.bench import rollout, subject  # noqa: E402
from tatar_dist.bench.subject import Work  # noqa: E402

WORK = Work(groups=2, size=3, tokens=4, pixels=112)


@pytest.mark.parametrize("name", ["generate", "rows"])
def test_flops_are_those_of_the_products_that_run(name, tmp_path):
    from transformers import AutoConfig

    rollout.prepared(tmp_path, WORK)
    subject.write_images(tmp_path, WORK.groups, WORK.pixels)
    with FlopCounterMode(display=False) as counter:  # counts no attention on the CPU
        assert rollout.generate(tmp_path, WORK, repeat=name == "rows")(0) == 6 * 4
    shape = AutoConfig.from_pretrained(tmp_path / "model")
    prompt = _prompt(tmp_path)
    images, tokens = {"generate": 2, "rows": 6}[name], Work(groups=2, size=3, tokens=3, pixels=112)
    sizes, _, patches, _, pairs = subject.counts(shape, tokens, prompt, False)
    attention = sizes.attention_flops(images, patches, pairs)
    counted = rollout.round_flops(shape, prompt, WORK)[name] - attention
    assert counter.get_total_flops() == pytest.approx(counted, rel=1e-3)


def _backbone(directory):
    from tatar_dist.models import family

    config = rollout.prepared(directory, WORK)
    return family(config.model.family)(config.model)


def _prompt(directory):
    from PIL import Image

    backbone = _backbone(directory)
    image = Image.open(rollout.images(directory, 0, WORK)[0])
    made = backbone.processor(text=[subject.prompt_text(backbone)], images=[image], return_tensors="pt")
    return made["input_ids"].shape[1]


def test_the_prompt_has_as_many_tokens_as_the_processor_makes(tmp_path):
    subject.write_images(tmp_path, WORK.groups, WORK.pixels)
    assert subject.prompt_tokens(_backbone(tmp_path), WORK.pixels) == _prompt(tmp_path)


def test_every_round_has_images_of_its_own(tmp_path):
    subject.write_images(tmp_path, 2 * WORK.groups, WORK.pixels)
    files = [f for r in range(2) for f in rollout.images(tmp_path, r, WORK)]
    assert len({f.read_bytes() for f in files}) == 4


def test_the_limit_is_the_baseline_beside_an_engine_at_full_speed():
    counted = {"generate": 6e9, "rows": 16e9, "engine": 2e9}
    found = rollout.limit(counted, 4e9, {"engine": [1.0, 2.0], "generate": [3.0, 4.0]})
    assert found["least_seconds"] == 0.5
    assert (found["ratio"], found["equal_speed"], found["equal_speed_rows"]) == (6.0, 3.0, 8.0)
