"""The learner's bench: its count of FLOPs against torch's own, its ratio, the JSON that every comparison prints."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from tatar_dist.bench import learner  # noqa: E402
from tatar_dist.bench.result import in_turns, ratio, result, summary  # noqa: E402

ATEN = torch.ops.aten


def attention(q, k, causal):
    """4 pairs D: two products over every (query, key) pair, half of them under a causal mask."""
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3] // (2 if causal else 1)


# torch counts no attention on the CPU; backward counts twice the forward here, as in the bench
KERNELS = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, dropout=0.0, causal=False, **_: attention(
        q, k, causal
    ),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, out, lse, dropout, causal, **_: 2 * attention(q, k, causal)
    ),
}


@pytest.mark.parametrize("packed", [False, True])
def test_flops_are_those_of_the_operators_that_run(packed, tmp_path):
    work = learner.Work(groups=2, size=2, tokens=24, pixels=112, vocab=8192)
    update, model, prompt = learner._update(work, tmp_path, packed)
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        update()
    # the bench counts the patch embedding three times as anything else; pixels need no gradient, so two of them run
    v = model.config.vision_config
    images = work.groups if packed else work.groups * work.size
    excess = images * (work.pixels // 14) ** 2 * 2 * v.in_channels * v.temporal_patch_size * 14**2 * v.hidden_size
    foretold = learner.flops(model.config, work, prompt, packed) - excess
    assert counter.get_total_flops() == pytest.approx(foretold, rel=0.005)
    assert counter.get_flop_counts()["Global"][ATEN._scaled_dot_product_flash_attention_for_cpu] > 0


def test_checkpointing_costs_one_forward_more_of_all_but_the_head(tmp_path):
    config = learner._update(learner.Work(pixels=112), tmp_path, True)[1].config
    head = 8 * 64 * 2 * config.text_config.hidden_size * config.text_config.vocab_size
    off, on = (learner.flops(config, learner.Work(pixels=112, checkpointing=c), 40, False) for c in (False, True))
    assert on - off == pytest.approx((off - 3 * head) / 3)


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
    assert "target 7 reached" in summary(found)


def test_a_median_below_the_target_has_not_met_it():
    found = result("learner", "rows", {"min": 6.0, "median": 6.999, "max": 9.0}, 7.0, "")
    assert found["met"] is False and "missed" in summary(found)
