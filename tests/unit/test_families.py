"""Every model family: the packed forward against transformers' own padded rows, log-probabilities and gradients."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_batch import png  # noqa: E402

from tatar_dist.bench import per_row  # noqa: E402
from tatar_dist.config.load import load_config  # noqa: E402
from tatar_dist.demo.tiny.build import TinySizes, build, make_config, make_processor, train_tokenizer  # noqa: E402
from tatar_dist.errors import UserError  # noqa: E402
from tatar_dist.learner.batch import Collator  # noqa: E402
from tatar_dist.learner.policy import PolicyModel  # noqa: E402
from tatar_dist.learner.shared_prefix import Layout  # noqa: E402
from tatar_dist.models import family  # noqa: E402
from tatar_dist.models.costs import Unit  # noqa: E402
from tatar_dist.types import LearnerRow  # noqa: E402

SIZES = TinySizes(
    vocab=512, text_hidden=64, text_layers=2, text_heads=2, text_kv_heads=1, text_intermediate=64,
    vision_hidden=64, vision_depth=2, vision_heads=2, vision_intermediate=64,
)  # fmt: skip
TEXTS = {"a": "how good", "b": "a plain view of it", "c": "it"}
IMAGES = {"a": (112, 112), "b": (224, 112), "c": (96, 160)}
CORPUS = [*TEXTS.values(), "system user assistant"] * 20
TEMPERATURE = 0.7


def build_qwen3(directory, tie: bool):
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = train_tokenizer(CORPUS, SIZES.vocab)
    known = make_config(tokenizer, SIZES, tie).to_dict()
    # vLLM reads the flag that published configurations have; transformers always interleaves
    rope = known["text_config"]["rope_parameters"] | {"mrope_interleaved": True}
    text = {k: known["text_config"][k] for k in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "initializer_range",
    )}  # fmt: skip
    vision = {k: known["vision_config"][k] for k in ("depth", "hidden_size", "intermediate_size", "num_heads")}
    ids = {k: v for k, v in known.items() if k.endswith("_token_id")}
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config=text | {"head_dim": 32, "tie_word_embeddings": tie, "rope_parameters": rope},
        vision_config=vision | {
            "out_hidden_size": SIZES.text_hidden, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=tie,
        **ids,
    )  # fmt: skip
    Qwen3VLForConditionalGeneration(config).save_pretrained(directory)
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=make_processor(tokenizer).chat_template,
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["qwen2_5_vl-tied", "qwen2_5_vl-untied", "qwen3_vl-tied", "qwen3_vl-untied"])
def tiny(request, tmp_path_factory) -> SimpleNamespace:
    torch.set_num_threads(1)
    name, tie = request.param.split("-")
    path = tmp_path_factory.mktemp(name)
    if name == "qwen3_vl":
        build_qwen3(path, tie == "tied")
    else:
        build(path, corpus=CORPUS, sizes=SIZES, tie=tie == "tied")
    words = [f"model.path={path}", f"model.family={name}", "model.dtype=float32"]
    config = load_config([], ["output=unused", *words, "model.min_pixels=12544", "model.max_pixels=50176"])
    backbone = family(name)(config.model)
    assert backbone.check_directory(str(path))["model_type"] == name
    rng, rows = np.random.default_rng(0), []
    for image, n in zip("abacb", (7, 1, 40, 12, 33), strict=True):
        content = [{"type": "image"}, {"type": "text", "text": TEXTS[image]}]
        prompt = backbone.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        ids = tuple(int(i) for i in rng.integers(40, 200, n))
        rows.append(LearnerRow(image, png(ord(image), IMAGES[image]), prompt, ids, "iqa"))
    plain = backbone.load_model().train()
    collate = Collator(backbone)
    batch = collate(rows)
    logp = per_row.token_logprobs(plain, collate, rows, backbone.forbidden_ids(), TEMPERATURE)
    weights = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1)) * batch.mask
    (logp * weights).sum().backward()
    policy = PolicyModel(backbone.load_model().train(), backbone, backbone.forbidden_ids(), TEMPERATURE)
    return SimpleNamespace(**locals())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_and_every_gradient_are_those_of_padded_rows(tiny, checkpointing):
    model = tiny.policy.backbone
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    tiny.policy.zero_grad()
    out = tiny.policy(tiny.batch).logp
    (out * tiny.weights).sum().backward()
    torch.testing.assert_close(out, tiny.logp, atol=1e-5, rtol=0)
    expected = {n: p.grad for n, p in tiny.plain.named_parameters()}
    largest = max(g.norm() for g in expected.values())
    assert ("lm_head.weight" in expected) == (tiny.tie == "untied")
    for n, p in model.named_parameters():
        # a key's bias moves all scores of a query alike: its true gradient is 0, what is left is rounding
        error = (p.grad - expected[n]).norm() / max(expected[n].norm(), 1e-4 * largest)
        assert error <= 1e-5, f"{n}: {error:.2e} of {expected[n].norm():.2e}"


def test_every_parameter_is_in_a_part_that_a_push_may_miss(tiny):
    parts = {n: tiny.backbone.part_of(n) for n, _ in tiny.plain.named_parameters()}
    assert {p for n, p in parts.items() if "visual." in n} == {"vision", "merger"}
    assert {p for n, p in parts.items() if "language_model.layers." in n} == {"even layers", "odd layers"}
    rest = {n: p for n, p in parts.items() if "visual." not in n and ".layers." not in n}
    expected = {"model.language_model.embed_tokens.weight": "embedding", "model.language_model.norm.weight": "norm"}
    assert rest == expected | ({"lm_head.weight": "head"} if tiny.tie == "untied" else {})


def test_with_a_frozen_vision_tower_the_others_gradients_are_the_same_and_it_has_none(tiny):
    backbone = family(tiny.name)(replace(tiny.config.model, train_vision=False))
    plain, packed = backbone.load_model().train(), backbone.load_model().train()
    policy = PolicyModel(packed, backbone, backbone.forbidden_ids(), TEMPERATURE)
    out = policy(tiny.batch).logp
    expected = per_row.token_logprobs(plain, tiny.collate, tiny.rows, backbone.forbidden_ids(), TEMPERATURE)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    for logp in (out, expected):
        (logp * tiny.weights).sum().backward()
    trained = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    largest = max(g.norm() for g in trained.values())
    for n, p in packed.named_parameters():
        assert (p.grad is None) == n.startswith("model.visual.") == (n not in trained), n
        if n in trained:
            error = (p.grad - trained[n]).norm() / max(trained[n].norm(), 1e-4 * largest)
            assert error <= 1e-5, f"{n}: {error:.2e} of {trained[n].norm():.2e}"


def test_positions_are_the_models_own(tiny):
    for row in tiny.rows:
        prompt = tiny.collate.encode(row)
        expected, _ = tiny.plain.model.get_rope_index(
            prompt.ids[None], prompt.type_ids[None], image_grid_thw=prompt.grid
        )
        assert torch.equal(tiny.backbone.positions(prompt), expected[:, 0])


def test_image_tokens_are_counted_as_the_processor_places_them(tiny):
    for row in tiny.rows:
        assert int(tiny.collate.encode(row).type_ids.sum()) == tiny.backbone.image_tokens(*IMAGES[row.image_id]) + 1


def difference(tiny, batch) -> float:
    with torch.no_grad():
        return float((tiny.policy(batch).logp - tiny.logp).abs().max())


def test_completions_that_see_each_other_are_found_out(tiny):
    lengths = tiny.batch.layout.completions
    joined = Layout(tiny.batch.layout.prompts, tuple((sum(group),) for group in lengths))
    assert difference(tiny, replace(tiny.batch, layout=joined)) > 1e-3


def test_a_completion_one_position_late_is_found_out(tiny):
    positions = tiny.batch.positions.clone()
    positions[:, tiny.batch.layout.prompt_tokens :] += 1
    assert difference(tiny, replace(tiny.batch, positions=positions)) > 1e-3


def test_patches_in_another_order_are_found_out(tiny):
    """Otherwise the equality would hold for a forward that never looks."""
    pixels = tiny.batch.pixel_values.flip(0)
    assert difference(tiny, replace(tiny.batch, pixel_values=pixels)) > 1e-3


def test_what_families_share_is_no_family():
    with pytest.raises(UserError, match="known families are qwen2_5_vl, qwen3_vl"):
        family("base")


def test_a_qwen3_without_the_flag_that_the_engine_reads_is_refused(tmp_path):
    import json

    build_qwen3(tmp_path, False)
    assert family("qwen3_vl").check_directory(str(tmp_path))["model_type"] == "qwen3_vl"
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    del settings["text_config"]["rope_parameters"]["mrope_interleaved"]
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="mrope_interleaved=true, which Qwen3-VL needs"):
        family("qwen3_vl").check_directory(str(tmp_path))


@pytest.mark.parametrize("tokens", [16, 128, 1024])
def test_a_units_cost_is_as_its_flops(tokens, tmp_path):
    """Beside bench/subject.py, which leaves nothing out: attention in the vision tower, its merger, the head."""
    from transformers import Qwen2_5_VLConfig

    from tatar_dist.bench.subject import SIZES as REAL
    from tatar_dist.bench.subject import Work, flops

    config = load_config([], ["output=unused", f"model.path={build(tmp_path, corpus=CORPUS, sizes=REAL)}"])
    costs, sizes = family("qwen2_5_vl")(config.model).costs(), Qwen2_5_VLConfig.from_pretrained(tmp_path)
    mine, counted = (
        [of(n) for n in (64, tokens)]
        for of in (
            lambda n: costs.of(Unit(tuple(range(8)), 1050, (n,) * 8)),
            lambda n: flops(sizes, Work(tokens=n, vocab=1), 1050, packed=True),
        )
    )
    assert mine[1] / mine[0] == pytest.approx(counted[1] / counted[0], rel=0.1)
