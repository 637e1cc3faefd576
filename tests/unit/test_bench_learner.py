"""The learner's bench: its count of FLOPs against torch's own, its ratio, the JSON that every comparison prints."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from tatar_dist.bench import learner, subject  # noqa: E402
from tatar_dist.bench.harness import in_turns, ratio, result  # noqa: E402
from tatar_dist.bench.table import cells  # noqa: E402

ATEN = torch.ops.aten


def attention(q, k, causal):
    """4 pairs D: two products over every (query, key) pair, half of them under a causal mask."""
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3] // (2 if causal else 1)


# torch counts neither attention on the CPU nor a product added in place; backward counts twice the forward, as in the
# bench, though flash attention's makes the scores once more
UNCOUNTED = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, dropout=0.0, causal=False, **_: attention(
        q, k, causal
    ),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, out, lse, dropout, causal, **_: 2 * attention(q, k, causal)
    ),
    ATEN.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1],
}


@pytest.mark.parametrize("packed", [False, True])
def test_flops_are_those_of_the_operators_that_run(packed, tmp_path):
    work = subject.Work(groups=2, size=2, tokens=24, pixels=112, vocab=8192)
    update, model, prompt = learner._update(work, tmp_path, packed)
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        update()
    text = model.config.text_config
    # the row's last token predicts nothing, but a row-wise forward makes its logits, too
    surplus = 0 if packed else 4 * 3 * 2 * text.hidden_size * text.vocab_size
    assert counter.get_total_flops() == pytest.approx(subject.flops(model.config, work, prompt, packed) + surplus)
    kernels = counter.get_flop_counts()["Global"]
    attended = kernels[ATEN._scaled_dot_product_flash_attention_for_cpu]
    sizes, images, patches, _, pairs = subject.counts(model.config, work, prompt, packed)
    assert attended == pytest.approx(sizes.attention_flops(images, patches, pairs))


@pytest.mark.parametrize("work", [subject.Work(size=2, tokens=24, pixels=112), subject.Work(2, 3, 8, 224, vocab=1024)])
def test_what_is_kept_for_backward_is_counted(work, tmp_path):
    update, model, prompt = learner._update(work, tmp_path, True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        update()
    measured = sum(storage.nbytes() for storage in kept.values())
    assert measured == pytest.approx(subject.kept_bytes(model.config, work, prompt), rel=0.06)  # and what the ends keep


def test_the_peak_is_the_largest_of_three_moments(tmp_path):
    config = learner._update(subject.Work(pixels=112), tmp_path, True)[1].config
    work = subject.Work(pixels=112)
    kept, logits = subject.kept_bytes(config, work, 40), 4 * 8 * 64 * config.text_config.vocab_size
    assert subject.peak_bytes(config, work, 40, 14_000_000) == kept + 3 * logits
    assert subject.peak_bytes(config, work, 40, 10**9) == 4e9
    chunk, many = 256 << 20, subject.Work(groups=40, pixels=112)
    config.text_config.vocab_size = 8192
    assert subject.peak_bytes(config, many, 40, 14_000_000) == subject.kept_bytes(config, many, 40) + 4 * chunk


def test_shared_prompts_are_counted_once(tmp_path):
    config = learner._update(subject.Work(pixels=112), tmp_path, True)[1].config
    alone, group = (subject.Work(size=n, tokens=1) for n in (1, 8))
    prompts = [subject.flops(config, w, 1054, True) for w in (alone, group)]
    head = 2 * config.text_config.hidden_size * config.text_config.vocab_size
    assert prompts[1] - prompts[0] == pytest.approx(7 * 4 * head)  # their first token is predicted from the prompt
    assert subject.flops(config, group, 1054, False) == pytest.approx(8 * subject.flops(config, alone, 1054, False))


def test_checkpointing_costs_one_forward_more_of_all_but_the_ends(tmp_path):
    config = learner._update(subject.Work(pixels=112), tmp_path, True)[1].config
    off, on = (subject.flops(config, subject.Work(pixels=112, checkpointing=c), 40, False) for c in (False, True))
    v, t = config.vision_config, config.text_config
    head = 3 * 8 * 64 * 2 * t.hidden_size * t.vocab_size
    pixels = 2 * 8 * 64 * 2 * v.in_channels * v.temporal_patch_size * v.patch_size**2 * v.hidden_size
    assert on - off == pytest.approx((off - head - pixels) / 3)


def test_rounds_alternate_and_the_first_does_not_count():
    called = []
    seconds = in_turns(lambda: called.append("a"), lambda: called.append("b"), rounds=2)
    assert called == list("ababab")
    assert [len(s) for s in seconds] == [2, 2]


def test_a_ratio_is_of_pairs_not_of_best_runs():
    assert ratio([4.0, 9.0, 10.0], [2.0, 1.0, 2.0]) == {"min": 2.0, "median": 5.0, "max": 9.0}


def test_the_json_of_a_comparison_is_complete():
    found = result("learner", "rows", {"min": 1.0, "median": 7.0, "max": 9.0}, 7.0, "8 times by FLOPs", growth=[1])
    asked = {"name", "baseline", "ratio", "target", "met", "limit", "versions", "machine"}
    assert asked | {"growth"} == set(found)
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["machine"]["cores"] >= 1 and found["machine"]["cpu"]
    assert cells(found)[3:] == ("7", "yes", "8 times by FLOPs")


def test_a_median_below_the_target_or_another_target_missed_is_not_met():
    found = result("learner", "rows", {"min": 6.0, "median": 6.999, "max": 9.0}, 7.0, "")
    assert found["met"] is False and cells(found)[4] == "no"
    assert result("learner", "rows", {"min": 6.0, "median": 8.0, "max": 9.0}, 7.0, "", False)["met"] is False
