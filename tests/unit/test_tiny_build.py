"""The tiny base model: what the tokenizer promises, that images and positions mean what the large models mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from PIL import Image  # noqa: E402

from tatar_dist.demo.data.photos import PHOTOS, Scene  # noqa: E402
from tatar_dist.demo.tiny import align, crops, tower  # noqa: E402
from tatar_dist.demo.tiny.build import FORMAT_TOKENS, TinySizes, build, default_corpus, make_model  # noqa: E402

SMALL = TinySizes(vocab=1024, text_layers=1, text_intermediate=64, vision_depth=2, vision_intermediate=64)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("tiny"), sizes=SMALL, corpus=default_corpus(200))


@pytest.fixture(scope="module")
def loaded(directory: Path):
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(directory)


def _crops(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 112, 112, 3), dtype=np.uint8)


def test_format_tags_are_single_tokens_that_survive_skipping_special_tokens(loaded) -> None:
    tokenizer = loaded[1].tokenizer
    text = "<think>The noise is strong.</think><answer>57.30</answer>"
    ids = tokenizer(text + "<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    for tag in FORMAT_TOKENS:
        assert len(tokenizer(tag)["input_ids"]) == 1


def test_every_digit_is_a_token_and_any_text_round_trips(loaded) -> None:
    tokenizer = loaded[1].tokenizer
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("2048 57.30")["input_ids"])
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("20485730")
    for text in ("héllo 中文 🙂\n\ttabs", "no  single   blanks", "<answer>-1e5%</answer>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_rationale_costs_little_more_than_a_token_per_word(loaded) -> None:
    tokenizer = loaded[1].tokenizer
    texts = default_corpus(20, seed=5)[:40]  # the rationales come first
    tokens = sum(len(tokenizer(t)["input_ids"]) for t in texts)
    assert tokens <= 1.2 * sum(len(t.split()) for t in texts)


def test_features_are_the_models_image_tokens_crop_by_crop(loaded) -> None:
    model, processor = loaded
    pixels = _crops(3)
    with torch.no_grad():
        seen = processor.image_processor(images=[Image.fromarray(p) for p in pixels], return_tensors="pt")
        features = model.model.get_image_features(seen["pixel_values"], seen["image_grid_thw"], return_dict=True)
        tokens = tower.features(model.model.visual, pixels)
    assert tokens.shape == (3, 16, 128)
    torch.testing.assert_close(tokens, torch.stack(list(features.pooler_output)), atol=1e-5, rtol=1e-4)


def test_the_aligned_forward_equals_the_models_own(loaded) -> None:
    model, processor = loaded
    pixels = _crops(1)
    writer = align.Writer(processor.tokenizer)
    ids, _ = writer.rows([[("Measure noise.", "noise=43"), ("Describe the image.", "Nothing.")]])
    text = processor.tokenizer.decode(ids[0])
    text = text.replace("<|image_pad|>" * align.IMAGE_TOKENS, "<|image_pad|>")
    inputs = processor(text=[text], images=[Image.fromarray(pixels[0])], return_tensors="pt")
    assert inputs["input_ids"].tolist() == ids.tolist()
    with torch.no_grad():
        tokens = tower.features(model.model.visual, pixels)
        ours = model.lm_head(align.hidden_states(model, ids, tokens))
        theirs = model(**inputs).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_align_labels_cover_exactly_the_replies_and_their_ends(loaded) -> None:
    tokenizer = loaded[1].tokenizer
    _, labels = align.Writer(tokenizer).rows([[("Measure noise.", "noise=43"), ("Measure blur.", "blur=07")]])
    assert tokenizer.decode(labels[0][labels[0] >= 0]) == "noise=43<|im_end|>blur=07<|im_end|>"


def test_tied_and_untied_variants_are_what_they_say(tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLForConditionalGeneration

    for tie in (True, False):
        path = build(tmp_path / str(tie), tie=tie, sizes=SMALL, corpus=["a b c"] * 3)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path)
        shared = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        assert shared is tie


def test_the_same_seed_gives_the_same_weights(loaded) -> None:
    tokenizer = loaded[1].tokenizer
    first, again, other = (make_model(tokenizer, seed=s, sizes=SMALL).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_chat_template_renders_system_image_and_generation_prompt(loaded) -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "S"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
    ]
    text = loaded[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Q<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_symmetries_of_the_square_are_eight_different_ones() -> None:
    x = torch.from_numpy(_crops(1))
    assert len({tower.dihedral(x, k).numpy().tobytes() for k in range(8)}) == 8


def test_a_turned_crop_keeps_its_subject_in_its_box() -> None:
    pixels, box = np.zeros((112, 112, 3), np.float32), (0.125, 0.25, 0.5, 0.375)
    pixels[28:42, 14:56] = 255
    turned = set()
    for seed in range(60):
        scene = crops.remixed(Scene(pixels, PHOTOS[0], box), "train", np.random.default_rng(seed))
        x0, y0, x1, y1 = (round(112 * edge) for edge in scene.box)
        if scene.pixels.max() == 255 and (scene.pixels == 255).all(-1).sum() == 14 * 42:  # not blended
            assert (scene.pixels[y0:y1, x0:x1] == 255).all() and (y1 - y0) * (x1 - x0) == 14 * 42
            turned.add(scene.box)
    assert len(turned) == 4
