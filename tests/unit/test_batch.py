"""Rows to one packed row to log-probabilities: the loss sees the answer and nothing else."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from PIL import Image  # noqa: E402

from tatar_dist.algo.loss import sft_loss  # noqa: E402
from tatar_dist.config.load import load_config  # noqa: E402
from tatar_dist.data.images import UnreadableImage  # noqa: E402
from tatar_dist.demo.tiny.build import TinySizes, build  # noqa: E402
from tatar_dist.errors import RunError  # noqa: E402
from tatar_dist.learner.batch import Collator, PromptMismatch  # noqa: E402
from tatar_dist.learner.policy import PolicyModel, TokenLogprobs  # noqa: E402
from tatar_dist.models import family  # noqa: E402
from tatar_dist.types import LearnerRow  # noqa: E402

PIXELS = 112
SMALL = TinySizes(vocab=512, text_layers=2, text_intermediate=64, vision_depth=2, vision_intermediate=64)
TEXTS = {
    "iqa": "How good is the technical quality of this image?",
    "iaa": "How beautiful is this image? Weigh at length theme, emotion and the overall impression.",
}
ANSWERS = (
    "<think>a plain view of it</think><answer>41.00</answer>",
    "<answer>7.25</answer>",
    "<think>a plain view of it a plain view of it</think><answer>93.50</answer>",
    "<think>of it</think><answer>100.00</answer>",
)


def png(seed: int, size: tuple[int, int] = (PIXELS, PIXELS)) -> bytes:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A random model, its backbone, and rows with uneven prompts (text and image) and uneven completions."""
    torch.set_num_threads(1)
    corpus = [*TEXTS.values(), "a plain view of it", "system user assistant"] * 20
    path = build(tmp_path_factory.mktemp("tiny"), corpus=corpus, sizes=SMALL)
    words = [f"model.path={path}", "model.dtype=float32", f"model.min_pixels={PIXELS**2}"]
    config = load_config([], ["output=unused", *words, f"model.max_pixels={4 * PIXELS**2}"])
    backbone = family("qwen2_5_vl")(config.model)
    # a policy exchanges its model's attention and head, `plain` keeps transformers' own
    model, plain = backbone.load_model().eval(), backbone.load_model().eval()
    prompts = {
        task: backbone.tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for task, text in TEXTS.items()
    }
    images = {"a": png(1), "b": png(2, (2 * PIXELS, PIXELS))}
    rows = []
    for i, (image, answer) in enumerate(zip("abab", ANSWERS, strict=True)):
        ids = backbone.tokenizer(answer, add_special_tokens=False)["input_ids"]
        task = "iqa" if image == "a" else "iaa"
        completion = (*ids, backbone.end_of_turn())
        logprobs = tuple(-0.125 * (i + 1) - 0.25 * k for k in range(len(completion)))
        rows.append(LearnerRow(image, images[image], prompts[task], completion, task, i - 1.5, logprobs))
    return SimpleNamespace(backbone=backbone, model=model, plain=plain, rows=rows, prompts=prompts, images=images)


def prompt_ids(tiny: SimpleNamespace, row: LearnerRow) -> list[int]:
    image = Image.open(io.BytesIO(row.image)).convert("RGB")
    return tiny.backbone.encode_prompt(row.prompt_text, image).ids.tolist()


# Collator -----------------------------------------------------------------------------------------------------------


def test_the_rows_of_this_file_are_uneven_in_prompt_and_completion(tiny):
    assert len({len(prompt_ids(tiny, r)) for r in tiny.rows}) == 2
    assert len({len(r.completion_ids) for r in tiny.rows}) == 4


def test_the_loss_covers_the_answer_with_its_end_of_turn_and_nothing_of_the_prompt(tiny):
    batch = Collator(tiny.backbone)(tiny.rows)
    for r, (row, answer) in enumerate(zip(tiny.rows, ANSWERS, strict=True)):
        mine = batch.row == r
        assert batch.column[mine].tolist() == list(range(len(row.completion_ids)))
        assert batch.mask[r].sum() == len(row.completion_ids)
        assert tiny.backbone.tokenizer.decode(batch.target[mine]) == answer + "<|im_end|>"
        assert int(batch.target[mine][-1]) == tiny.backbone.end_of_turn()


def test_a_packed_row_holds_every_prompt_once_then_its_completions_without_their_last_tokens(tiny):
    batch = Collator(tiny.backbone)(tiny.rows)
    a, b = prompt_ids(tiny, tiny.rows[0]), prompt_ids(tiny, tiny.rows[1])
    answers = [tiny.rows[r].completion_ids[:-1] for r in (0, 2, 1, 3)]
    assert batch.ids.tolist() == [*a, *b, *(t for answer in answers for t in answer)]
    assert batch.layout.prompts == (len(a), len(b))
    assert batch.layout.completions == (tuple(map(len, answers[:2])), tuple(map(len, answers[2:])))
    assert batch.layout.tokens == len(batch.ids)


def test_a_token_is_predicted_by_the_one_before_it_the_first_by_the_prompts_last(tiny):
    batch = Collator(tiny.backbone)(tiny.rows)
    last = {"a": batch.layout.prompts[0] - 1, "b": sum(batch.layout.prompts) - 1}
    for r, row in enumerate(tiny.rows):
        source = batch.source[batch.row == r].tolist()
        assert source[0] == last[row.image_id]
        assert batch.ids[source[1:]].tolist() == list(row.completion_ids[:-1])


def test_a_completion_of_one_token_adds_none_to_the_packed_row(tiny):
    short = replace(tiny.rows[0], completion_ids=tiny.rows[0].completion_ids[-1:], sampled_logprobs=None)
    batch = Collator(tiny.backbone)([short])
    assert batch.ids.tolist() == prompt_ids(tiny, short)
    assert (batch.target.tolist(), batch.source.tolist()) == ([tiny.backbone.end_of_turn()], [len(batch.ids) - 1])


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_completion_of_no_tokens_is_refused_by_the_name_of_its_image(tiny, place):
    rows = list(tiny.rows)
    rows[place] = replace(rows[place], completion_ids=(), sampled_logprobs=())
    with pytest.raises(RunError, match=f"^{rows[place].image_id}: a completion has no tokens") as raised:
        Collator(tiny.backbone)(rows)
    assert "\n" not in str(raised.value)


def test_positions_are_the_models_and_a_completion_goes_on_from_its_prompts_highest(tiny):
    batch = Collator(tiny.backbone)(tiny.rows)
    at = 0
    for row, n in zip(tiny.rows, batch.layout.prompts, strict=False):
        image = Image.open(io.BytesIO(row.image)).convert("RGB")
        prompt = tiny.backbone.encode_prompt(row.prompt_text, image)
        expected, _ = tiny.model.model.get_rope_index(
            prompt.ids[None], prompt.type_ids[None], image_grid_thw=prompt.grid
        )
        assert torch.equal(batch.positions[:, at : at + n], expected[:, 0])
        answer = batch.source[batch.row == tiny.rows.index(row)][1:]
        start = int(expected.max()) + 1
        assert start < n  # an image takes fewer positions than tokens
        assert (batch.positions[:, answer] == start + torch.arange(len(answer))).all()
        at += n


def test_an_image_is_in_the_batch_once_however_many_rows_ask_about_it(tiny):
    batch = Collator(tiny.backbone)(tiny.rows)
    assert batch.grids.tolist() == [[1, 8, 8], [1, 8, 16]]
    assert batch.pixel_values.shape[0] == 8 * 8 + 8 * 16


def test_an_image_is_decoded_once_a_step(tiny):
    collate = Collator(tiny.backbone)
    first = collate(tiny.rows[:1])
    unreadable = [replace(tiny.rows[2], image=b"not decoded again")]
    assert torch.equal(collate(unreadable).pixel_values, first.pixel_values)
    collate.new_step()
    with pytest.raises(UnreadableImage, match="^a: "):
        collate(unreadable)


def test_advantages_and_sampled_log_probabilities_stand_beside_their_tokens(tiny):
    rows = [*tiny.rows[:2], replace(tiny.rows[2], sampled_logprobs=None)]
    batch = Collator(tiny.backbone)(rows)
    assert batch.advantage.tolist() == [-1.5, -0.5, 0.5]
    for r in (0, 1):
        assert batch.sampled_logprobs[r][batch.mask[r]].tolist() == list(rows[r].sampled_logprobs)
        assert not batch.sampled_logprobs[r][~batch.mask[r]].any()
    assert not batch.sampled_logprobs[2].any()


def test_the_prompt_that_the_engine_read_is_accepted_and_any_other_is_refused(tiny):
    row = tiny.rows[0]
    ids = tuple(prompt_ids(tiny, row))
    Collator(tiny.backbone)([replace(row, prompt_token_ids=ids)])
    for other in (ids[:-1], (*ids[:-1], ids[-1] + 1), ()):
        with pytest.raises(PromptMismatch, match=f"^a: the engine read {len(other)} prompt tokens"):
            Collator(tiny.backbone)([replace(row, prompt_token_ids=other)])


def test_an_image_known_from_an_earlier_micro_batch_is_compared_too(tiny):
    collate = Collator(tiny.backbone)
    collate(tiny.rows[:1])
    with pytest.raises(PromptMismatch):
        collate([replace(tiny.rows[0], prompt_token_ids=(1, 2, 3))])


# PolicyModel --------------------------------------------------------------------------------------------------------


def policy(tiny: SimpleNamespace, forbidden: list[int], temperature: float = 1.0) -> PolicyModel:
    return PolicyModel(tiny.model, tiny.backbone, forbidden, temperature)


def run(tiny, rows, forbidden: list[int] | None = None, temperature: float = 1.0) -> TokenLogprobs:
    with torch.no_grad():
        return policy(tiny, forbidden or [], temperature)(Collator(tiny.backbone)(rows))


def plain_logits(tiny: SimpleNamespace, row: LearnerRow) -> torch.Tensor:
    """(completion, vocab) logits of transformers' own full forward on this row alone, no padding."""
    image = Image.open(io.BytesIO(row.image)).convert("RGB")
    inputs = dict(tiny.backbone.processor(text=[row.prompt_text], images=[image], return_tensors="pt"))
    prompt, answer = inputs["input_ids"], torch.tensor([row.completion_ids])
    inputs["input_ids"] = torch.cat([prompt, answer], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answer)], 1)
    tiny.plain.model.rope_deltas = None
    with torch.no_grad():
        logits = tiny.plain(**inputs, use_cache=False).logits[0]
    return logits[prompt.shape[1] - 1 : -1].float()


def of_tokens(logp: torch.Tensor, row: LearnerRow) -> torch.Tensor:
    return logp.gather(-1, torch.tensor(row.completion_ids)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_log_probabilities_are_those_of_a_plain_forward_of_each_row_alone(tiny, temperature):
    out = run(tiny, tiny.rows, temperature=temperature)
    for r, row in enumerate(tiny.rows):
        n = len(row.completion_ids)
        expected = (plain_logits(tiny, row) / temperature).log_softmax(-1)
        torch.testing.assert_close(out.logp[r, :n], of_tokens(expected, row), atol=1e-4, rtol=0)
        entropy = -(expected.exp() * expected).sum(-1)
        torch.testing.assert_close(out.entropy[r, :n], entropy, atol=1e-4, rtol=0)
        assert not out.logp[r, n:].any() and not out.entropy[r, n:].any()


def test_the_image_matters(tiny):
    """Otherwise the equalities above would hold for a forward that never looks."""
    row = tiny.rows[0]
    other = replace(row, image_id="c", image=png(9))
    assert (run(tiny, [row]).logp - run(tiny, [other]).logp).abs().max() > 1e-3


def test_a_forbidden_token_has_probability_zero_and_the_others_share_its_part(tiny):
    row = tiny.rows[0]
    batch = Collator(tiny.backbone)([row])
    logits = plain_logits(tiny, row)
    forbidden = [int(i) for i in logits.mean(0).topk(3).indices if int(i) not in row.completion_ids][:2]
    assert forbidden
    with torch.no_grad():
        free, barred = policy(tiny, [])(batch), policy(tiny, forbidden)(batch)
        asked = replace(batch, target=torch.full_like(batch.target, forbidden[0]))
        assert torch.isneginf(policy(tiny, forbidden)(asked).logp).all()
        assert torch.isfinite(policy(tiny, [])(asked).logp).all()
    lost = logits.softmax(-1)[:, forbidden].sum(-1)
    torch.testing.assert_close(barred.logp[0], free.logp[0] - torch.log1p(-lost), atol=1e-4, rtol=0)
    expected = logits.index_fill(-1, torch.tensor(forbidden), -1e30).softmax(-1)
    entropy = torch.special.entr(expected).sum(-1)
    torch.testing.assert_close(barred.entropy[0], entropy, atol=1e-4, rtol=0)


def test_the_vision_placeholders_are_forbidden(tiny):
    forbidden = tiny.backbone.forbidden_ids()
    names = tiny.backbone.tokenizer.convert_ids_to_tokens(forbidden)
    assert set(names) == {"<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"}
    batch = Collator(tiny.backbone)(tiny.rows[:1])
    model = policy(tiny, forbidden)
    for token in forbidden:
        with torch.no_grad():
            out = model(replace(batch, target=torch.full_like(batch.target, token)))
        assert torch.isneginf(out.logp).all() and torch.isfinite(out.entropy).all()


def test_gradients_reach_language_and_vision_and_stay_finite_with_forbidden_tokens(tiny):
    model = policy(tiny, tiny.backbone.forbidden_ids())
    out = model(Collator(tiny.backbone)(tiny.rows[:2]))
    assert not out.entropy.requires_grad
    out.logp.sum().backward()
    try:
        gradients = {n.removeprefix(PolicyModel.PREFIX): p.grad for n, p in model.named_parameters()}
        assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
        assert gradients["model.visual.patch_embed.proj.weight"].abs().sum() > 0
        assert gradients["lm_head.weight"].abs().sum() > 0
    finally:
        model.zero_grad()


def test_parameter_names_are_those_of_the_checkpoint(tiny):
    names = {n.removeprefix(PolicyModel.PREFIX) for n, _ in policy(tiny, [3]).named_parameters()}
    assert names == {n for n, _ in tiny.model.named_parameters()}
    assert set(policy(tiny, [3]).state_dict()) == {PolicyModel.PREFIX + n for n in tiny.model.state_dict()}


def test_a_filler_is_computed_and_counts_nowhere(tiny):
    row = replace(tiny.rows[0], filler=True)
    batch = Collator(tiny.backbone)([row])
    assert not batch.mask.any() and batch.ids.numel() > 0
    policy = PolicyModel(tiny.model, tiny.backbone, tiny.backbone.forbidden_ids())
    out = policy(batch)
    loss = sft_loss(out.logp, batch.mask, 7)
    loss.backward()
    grads = [p.grad for p in policy.parameters() if p.grad is not None]
    assert float(loss.detach()) == 0 and grads and not any(g.any() for g in grads)
    policy.zero_grad()
