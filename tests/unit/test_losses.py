"""Every form of the loss equals a slow float64 reference on ragged batches, values and gradients, however split."""

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tatar_dist.algo.aggregation import token_weights
from tatar_dist.algo.loss import PolicyLoss, k3_kl, policy_loss, sft_loss
from tatar_dist.config.schema import Aggregation

LIMIT = 9  # tokens, the constant normaliser's length
SPLITS = [[7], [1, 6], [3, 1, 2, 1], [1] * 7]  # rows of each (rank, accumulation step): uneven on purpose

AGGREGATIONS = get_args(Aggregation)


def ragged(seed=0, rows=7, width=LIMIT, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=gen)
    mask = torch.arange(width)[None] < lengths[:, None]

    def noise(scale):
        return scale * torch.randn(rows, width, generator=gen, dtype=torch.float64)

    logp = -2 + noise(0.5)
    old, ref, engine = logp + noise(0.3), logp + noise(0.4), logp + noise(0.3)
    advantage = torch.randn(rows, generator=gen, dtype=torch.float64)
    logp, old, ref, engine, advantage = (x.to(dtype) for x in (logp, old, ref, engine, advantage))
    return logp.requires_grad_(), old, ref, engine, advantage, mask


def reference(logp, old, ref, engine, advantage, mask, trained, form, aggregation, beta):
    """The formulas, one token at a time in float64; nothing shared with the code under test."""
    logp, old, ref, engine = (x.double() for x in (logp, old, ref, engine))
    kept = [b for b in range(len(mask)) if trained[b]]
    n_tokens = sum(int(mask[b].sum()) for b in kept)
    total = logp.sum() * 0
    for b in kept:
        tokens = [t for t in range(mask.shape[1]) if mask[b, t]]
        mean_log_ratio = sum(logp[b, t] - old[b, t] for t in tokens) / len(tokens)
        sequence_off = math.exp(sum(float(old[b, t] - engine[b, t]) for t in tokens))
        row = 0.0
        for t in tokens:
            r = torch.exp(mean_log_ratio if form.ratio == "sequence" else logp[b, t] - old[b, t])
            a, value = float(advantage[b]), float(r.detach())
            low, high = 1 - form.clip_low, 1 + form.clip_high
            if form.objective == "cispo":
                pg = -min(max(value, low), high) * a * logp[b, t]
            elif form.objective == "sapo":
                tau = form.tau_positive if a > 0 else form.tau_negative
                pg = -(4 / tau) / (1 + torch.exp(-tau * (r - 1))) * a
            elif (a > 0 and value > high) or (a < 0 and value < low):
                pg = -((high if a > 0 else low) * a)
            elif form.clip_delta and a < 0 and value > form.clip_delta:
                pg = -(form.clip_delta * a)
            else:
                pg = -(r * a)
            if form.importance != "none":
                w = sequence_off if form.importance == "sequence" else math.exp(float(old[b, t] - engine[b, t]))
                if form.importance_mode == "truncate":
                    w = min(w, form.importance_cap)
                elif w > form.importance_cap or w < (form.importance_floor or 1 / form.importance_cap):
                    w = 0.0
                pg = pg * w
            if beta:
                pg = pg + beta * (torch.exp(ref[b, t] - logp[b, t]) - (ref[b, t] - logp[b, t]) - 1)
            row = row + pg
        if aggregation == "sequence-mean":
            row = row / len(tokens) / len(kept)
        elif aggregation == "token-mean":
            row = row / n_tokens
        else:
            row = row / (len(kept) * LIMIT)
        total = total + row
    return total


def weights_of(mask, trained, aggregation):
    return torch.from_numpy(token_weights(mask.sum(1).numpy(), np.array(trained), aggregation, LIMIT))


def split_loss(form, aggregation, beta, data, trained, split):
    """Loss and gradient summed over uneven parts, each padded to its own longest row."""
    logp, old, ref, engine, advantage, mask = data
    weight = weights_of(mask, trained, aggregation)
    total, grad, start = 0.0, torch.zeros_like(logp), 0
    for size in split:
        part = slice(start, start + size)
        start += size
        cut = (part, slice(0, int(mask[part].sum(1).max())))
        loss = policy_loss(
            form,
            logp[cut],
            old[cut],
            ref[cut] if beta else None,
            advantage[part],
            mask[cut],
            weight[part],
            kl_beta=beta,
            engine_logp=engine[cut],
        ).loss
        grad += torch.autograd.grad(loss, logp, retain_graph=True)[0]
        total += float(loss.detach())
    return total, grad


FORMS = [
    PolicyLoss(0.1, 0.3, ratio, importance, mode, 1.1)
    for ratio, (importance, mode) in itertools.product(
        ("token", "sequence"),
        (("none", "truncate"), *itertools.product(("token", "sequence"), ("truncate", "mask"))),
    )
] + [
    PolicyLoss(0.1, 0.3, ratio, importance, "mask", 1.3, 0.6, objective, delta, 1.0, 1.7)
    for ratio, importance, (objective, delta) in itertools.product(
        ("token", "sequence"), ("none", "token"), (("clip", 1.35), ("cispo", None), ("sapo", None))
    )
]


@pytest.mark.parametrize("beta", [0.0, 0.04], ids=["no kl", "kl"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.objective}-{f.ratio}-{f.importance}-{f.importance_mode}")
def test_every_form_equals_the_reference_over_uneven_splits(form, aggregation, beta):
    for seed, split in enumerate(SPLITS):
        data = ragged(seed)
        trained = [True, seed != 1, True, True, False, True, seed != 2]  # dropped groups, truncated completions
        expected = reference(*data, trained, form, aggregation, beta)
        (expected_grad,) = torch.autograd.grad(expected, data[0])
        total, grad = split_loss(form, aggregation, beta, data, trained, split)
        assert total == pytest.approx(float(expected.detach()), abs=1e-12)
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_in_float32_every_form_stays_within_1e_6_of_the_float64_reference(data):
    form = PolicyLoss(
        data.draw(st.floats(0.01, 0.5)),
        data.draw(st.floats(0.01, 0.5)),
        data.draw(st.sampled_from(["token", "sequence"])),
        data.draw(st.sampled_from(["none", "token", "sequence"])),
        data.draw(st.sampled_from(["truncate", "mask"])),
        data.draw(st.floats(1.0, 3.0)),
        objective=data.draw(st.sampled_from(["clip", "cispo", "sapo"])),
        clip_delta=data.draw(st.sampled_from([None, 1.51, 2.0])),
        tau_negative=data.draw(st.floats(0.5, 2.0)),
    )
    rows = data.draw(st.integers(1, 9))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(rows - 1, 1)), max_size=4)) & set(range(1, rows)))
    split = np.diff([0, *cuts, rows]).tolist()
    trained = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    aggregation, beta = data.draw(st.sampled_from(AGGREGATIONS)), data.draw(st.sampled_from([0.0, 0.001, 0.1]))
    batch = ragged(data.draw(st.integers(0, 10**6)), rows, dtype=torch.float32)
    if form.importance != "none" and _near_an_edge(batch, form):
        return  # a ratio that rounding may put on either side of the cap
    expected = reference(*batch, trained, form, aggregation, beta)
    (expected_grad,) = torch.autograd.grad(expected, batch[0])
    total, grad = split_loss(form, aggregation, beta, batch, trained, split)
    assert total == pytest.approx(float(expected.detach()), abs=1e-6, rel=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


def _near_an_edge(batch, form):
    _, old, _, engine, _, mask = batch
    off = ((old - engine) * mask).double()
    off = off.sum(1) if form.importance == "sequence" else off[mask]
    return bool(((off.abs() - math.log(form.importance_cap)).abs() < 1e-4).any())


def test_weights_by_hand():
    lengths, trained = np.array([2, 4, 3]), np.array([True, True, False])
    np.testing.assert_allclose(token_weights(lengths, trained, "sequence-mean", 10), [1 / 4, 1 / 8, 0])
    np.testing.assert_allclose(token_weights(lengths, trained, "token-mean", 10), [1 / 6, 1 / 6, 0])
    np.testing.assert_allclose(token_weights(lengths, trained, "constant", 10), [1 / 20, 1 / 20, 0])
    for aggregation in AGGREGATIONS:  # nothing trained: no division by zero, nothing counts
        assert not token_weights(lengths, np.zeros(3, bool), aggregation, 10).any()


def plain(logp, old, ref, advantage, mask, aggregation="sequence-mean", form=None, **more):
    weight = weights_of(mask, [True] * len(mask), aggregation)
    return policy_loss(form or PolicyLoss(), logp, old, ref, advantage, mask, weight, **more)


def test_sums_add_up_over_micro_batches():
    logp, old, ref, engine, advantage, mask = ragged(5)
    form = PolicyLoss(importance="token", importance_cap=1.1)
    weight = weights_of(mask, [True] * 6 + [False], "token-mean")

    def parts_of(p):
        more = dict(entropy=-logp[p], engine_logp=engine[p], kl_beta=0.1)
        return policy_loss(form, logp[p], old[p], ref[p], advantage[p], mask[p], weight[p], **more)

    whole, parts = parts_of(slice(None)), [parts_of(p) for p in (slice(0, 2), slice(2, 7))]
    for key, value in whole.sums.items():
        assert sum(p.sums[key] for p in parts) == pytest.approx(value, abs=1e-12)
    assert max(p.ratio_max for p in parts) == whole.ratio_max
    assert whole.sums["tokens"] == float(mask.sum()) and whole.sums["trained"] == float(mask[:6].sum())
    assert whole.sums["entropy"] == pytest.approx(float(-(logp.detach() * mask).sum()))
    w = (old - engine).exp()[:6][mask[:6]]
    assert whole.sums["importance_mean"] == pytest.approx(float(w.clamp(max=1.1).sum()))
    assert whole.sums["importance_cut"] == float((w > 1.1).sum()) > 0


def test_clipped_counts_only_the_side_that_is_cut():
    old = torch.zeros(2, 4, dtype=torch.float64)
    ratio = torch.tensor([0.5, 0.9, 1.1, 1.5], dtype=torch.float64)
    logp = ratio.log().repeat(2, 1).requires_grad_()
    mask = torch.ones(2, 4, dtype=torch.bool)
    for advantage, cut in (([1.0, 1.0], 3), ([-1.0, -1.0], 0)):
        parts = plain(logp, old, None, torch.tensor(advantage), mask)
        assert parts.sums["clipped"] == 2
        (grad,) = torch.autograd.grad(parts.loss, logp)
        assert (grad[:, cut] == 0).all() and int((grad == 0).sum()) == 2
    assert parts.ratio_max == pytest.approx(1.5)
    assert plain(logp, old, None, torch.tensor([0.0, 0.0]), mask).sums["clipped"] == 0


def test_what_the_other_objectives_count_as_clipped_and_which_tokens_keep_a_gradient():
    ratio = torch.tensor([0.5, 0.9, 1.1, 1.5, 3.0], dtype=torch.float64)
    mask = torch.ones(1, 5, dtype=torch.bool)

    def found(form, sign):
        logp = ratio.log()[None].clone().requires_grad_()
        parts = plain(logp, torch.zeros_like(logp), None, torch.tensor([sign]), mask, form=form)
        return parts.sums["clipped"], torch.autograd.grad(parts.loss, logp)[0][0] * 5

    for sign in (1.0, -1.0):
        clipped, grad = found(PolicyLoss(objective="cispo"), sign)
        assert clipped == 3
        torch.testing.assert_close(grad, -sign * ratio.clamp(0.8, 1.2))
        clipped, grad = found(PolicyLoss(objective="sapo", tau_positive=2.0, tau_negative=3.0), sign)
        tau = 2.0 if sign > 0 else 3.0
        s = torch.sigmoid(tau * (ratio - 1))
        assert clipped == 0
        torch.testing.assert_close(grad, -sign * 4 * s * (1 - s) * ratio)
    clipped, grad = found(PolicyLoss(clip_delta=2.0), -1.0)
    assert clipped == 2 and grad.tolist() == pytest.approx([0, 0.9, 1.1, 1.5, 0])
    assert found(PolicyLoss(clip_delta=2.0), 1.0)[0] == 2


def test_without_old_probabilities_the_ratio_is_1_and_the_gradient_is_the_policy_gradient():
    logp, _, _, _, advantage, mask = ragged(1)
    parts = plain(logp, None, None, advantage, mask)
    (grad,) = torch.autograd.grad(parts.loss, logp)
    expected = -(advantage[:, None] * mask) / mask.sum(1, keepdim=True) / len(mask)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-15)
    assert parts.ratio_max == 1.0 and parts.sums["clipped"] == 0


def test_padding_never_matters_not_even_nan():
    logp, old, ref, _, advantage, mask = ragged(2)
    clean = plain(logp, old, ref, advantage, mask, kl_beta=0.1)
    holes = [torch.where(mask, x.detach(), torch.full_like(x, math.nan)) for x in (logp, old, ref)]
    holes[0].requires_grad_()
    dirty = plain(*holes, advantage, mask, kl_beta=0.1)
    (grad,) = torch.autograd.grad(dirty.loss, holes[0])
    (expected,) = torch.autograd.grad(clean.loss, logp)
    assert float(dirty.loss.detach()) == float(clean.loss.detach())
    torch.testing.assert_close(grad, expected)
    assert (grad[~mask] == 0).all()


def test_k3_is_never_negative_and_0_only_at_equality():
    logp = torch.linspace(-3, 0, 7, dtype=torch.float64)
    kl = k3_kl(logp, torch.full_like(logp, -1.5))
    assert (kl >= 0).all() and kl[3] == 0 and (kl[[0, 1, 2, 4, 5, 6]] > 0).all()
    r = -1.5 - logp
    torch.testing.assert_close(kl, r.exp() - r - 1)


def test_half_precision_is_raised_to_float32():
    logp, old, _, _, advantage, mask = ragged()
    parts = plain(logp.detach().bfloat16(), old.bfloat16(), None, advantage, mask)
    assert parts.loss.dtype == torch.float32


def test_the_correction_of_an_engine_that_is_the_learner_is_1():
    logp, old, _, _, advantage, mask = ragged(6)
    for importance, mode in itertools.product(("token", "sequence"), ("truncate", "mask")):
        form = PolicyLoss(importance=importance, importance_mode=mode, importance_cap=1.0)
        parts = plain(logp, old, None, advantage, mask, form=form, engine_logp=old)
        assert parts.sums["importance_mean"] == float(mask.sum()) and parts.sums["importance_cut"] == 0
        uncorrected = plain(logp, old, None, advantage, mask)
        torch.testing.assert_close(parts.loss, uncorrected.loss, rtol=0, atol=1e-15)


def test_impossible_requests_are_refused():
    logp, old, _, _, advantage, mask = ragged()
    with pytest.raises(ValueError, match="needs ref_logp"):
        plain(logp, old, None, advantage, mask, kl_beta=0.1)
    with pytest.raises(ValueError, match="needs engine_logp"):
        plain(logp, old, None, advantage, mask, form=PolicyLoss(importance="token"))
    with pytest.raises(ValueError, match="without a trained token"):
        sft_loss(logp, mask, 0)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_sft_loss_is_the_mean_over_the_global_batchs_trained_tokens(split):
    logp, *_, mask = ragged(8)
    expected = -sum(logp[b, t] for b, t in mask.nonzero().tolist()) / int(mask.sum())
    (expected_grad,) = torch.autograd.grad(expected, logp)
    parts = [sft_loss(x, m, int(mask.sum())) for x, m in zip(logp.split(split), mask.split(split), strict=True)]
    (grad,) = torch.autograd.grad(sum(parts), logp)
    assert float(sum(parts).detach()) == pytest.approx(float(expected.detach()), abs=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-15)
