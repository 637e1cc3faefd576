"""The losses equal a slow float64 reference on ragged batches, values and gradients, however the batch is split."""

import math

import pytest
import torch

from tatar_dist.algo.losses import k3_kl, policy_loss, sft_loss

SPLITS = [[7], [1, 6], [3, 1, 2, 1], [1] * 7]  # rows of each (rank, accumulation step): uneven on purpose


def ragged(seed=0, rows=7, width=9):
    gen = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=gen)
    mask = torch.arange(width)[None] < lengths[:, None]

    def noise(scale):
        return scale * torch.randn(rows, width, generator=gen, dtype=torch.float64)

    logp = -2 + noise(0.5)
    old, ref, engine = logp + noise(0.3), logp + noise(0.4), logp + noise(0.3)
    return logp.requires_grad_(), old, ref, engine, torch.randn(rows, generator=gen, dtype=torch.float64), mask


def reference(
    logp, old, ref, advantage, mask, *, low, high, beta, kind="sequence", ratio="token", engine=None, cap=None
):
    """The formulas token by token. kind: sequence, token (token-mean) or constant (Dr. GRPO, 9 tokens)."""
    rows, total, n_tokens = len(mask), 0.0, int(mask.sum())
    for b in range(rows):
        tokens = [t for t in range(mask.shape[1]) if mask[b, t]]
        mean_log_ratio = sum(logp[b, t] - old[b, t] for t in tokens) / len(tokens)
        row = 0.0
        for t in tokens:
            r = torch.exp(mean_log_ratio if ratio == "sequence" else logp[b, t] - old[b, t])
            clipped = r.clamp(1 - low, 1 + high)
            pg = -min(r * advantage[b], clipped * advantage[b])
            if cap is not None:
                pg = pg * min(math.exp(old[b, t] - engine[b, t]), cap)
            if beta:
                pg = pg + beta * (torch.exp(ref[b, t] - logp[b, t]) - (ref[b, t] - logp[b, t]) - 1)
            row = row + pg
        total = total + (
            row / len(tokens) / rows if kind == "sequence" else row / (n_tokens if kind == "token" else rows * 9)
        )
    return total


VARIANTS = {
    "grpo": dict(low=0.2, high=0.2, beta=0.001),
    "no reference": dict(low=0.2, high=0.2, beta=0.0),
    "clip higher": dict(low=0.1, high=0.3, beta=0.04),
    "token mean": dict(low=0.2, high=0.2, beta=0.04, kind="token"),
    "dr grpo": dict(low=0.2, high=0.2, beta=0.04, kind="constant"),
    "gspo": dict(low=0.05, high=0.05, beta=0.04, ratio="sequence"),
    "truncated importance": dict(low=0.2, high=0.2, beta=0.04, cap=1.1),
}


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_equals_the_reference_over_uneven_splits(name, split):
    v = VARIANTS[name]
    logp, old, ref, engine, advantage, mask = ragged(3)
    expected = reference(logp, old, ref, advantage, mask, engine=engine, **v)
    (expected_grad,) = torch.autograd.grad(expected, logp)
    kind = v.get("kind", "sequence")
    weight = {"sequence": 1 / 7, "token": 1 / int(mask.sum()), "constant": 1 / (7 * 9)}[kind]
    total, grad, start = 0.0, torch.zeros_like(logp), 0
    for size in split:
        part = slice(start, start + size)
        start += size
        width = int(mask[part].sum(1).max())  # each micro-batch is padded to its own longest row
        cut = (part, slice(0, width))
        loss = policy_loss(
            logp[cut],
            old[cut],
            ref[cut] if v["beta"] else None,
            advantage[part],
            mask[cut],
            clip_low=v["low"],
            clip_high=v["high"],
            kl_beta=v["beta"],
            row_weight=weight,
            reduction="mean" if kind == "sequence" else "sum",
            ratio=v.get("ratio", "token"),
            engine_logp=engine[cut] if "cap" in v else None,
            importance_cap=v.get("cap"),
        ).loss
        grad += torch.autograd.grad(loss, logp, retain_graph=True)[0]
        total += float(loss.detach())
    assert total == pytest.approx(float(expected.detach()), abs=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def plain(logp, old, ref, advantage, mask, **changed):
    settings = dict(clip_low=0.2, clip_high=0.2, kl_beta=0.0, row_weight=1 / len(mask)) | changed
    return policy_loss(logp, old, ref, advantage, mask, **settings)


def test_sums_add_up_over_micro_batches():
    logp, old, ref, _, advantage, mask = ragged(5)
    whole = plain(logp, old, ref, advantage, mask, row_weight=1 / 7, entropy=-logp)
    parts = [
        plain(logp[p], old[p], ref[p], advantage[p], mask[p], row_weight=1 / 7, entropy=-logp[p])
        for p in (slice(0, 2), slice(2, 7))
    ]
    for key, value in whole.sums.items():
        assert sum(p.sums[key] for p in parts) == pytest.approx(value, abs=1e-12)
    assert max(p.ratio_max for p in parts) == whole.ratio_max
    assert whole.sums["tokens"] == float(mask.sum()) and whole.sums["rows"] == 7
    assert whole.sums["entropy"] == pytest.approx(float(-(logp.detach() * mask).sum()))


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


def test_an_empty_or_dropped_row_adds_nothing():
    logp, old, ref, _, advantage, mask = ragged(4)
    keep = torch.tensor([1.0, 0, 1, 1, 1, 1, 1], dtype=torch.float64) / 7
    dropped = plain(logp, old, ref, advantage, mask, kl_beta=0.1, row_weight=keep)
    emptied = mask.clone()
    emptied[1] = False
    empty = plain(logp, old, ref, advantage, emptied, kl_beta=0.1)
    assert float(dropped.loss.detach()) == pytest.approx(float(empty.loss.detach()), abs=1e-15)
    assert empty.sums["rows"] == 6


def test_k3_is_never_negative_and_0_only_at_equality():
    logp = torch.linspace(-3, 0, 7, dtype=torch.float64)
    kl = k3_kl(logp, torch.full_like(logp, -1.5))
    assert (kl >= 0).all() and kl[3] == 0 and (kl[[0, 1, 2, 4, 5, 6]] > 0).all()


def test_half_precision_is_raised_to_float32():
    logp, old, _, _, advantage, mask = ragged()
    parts = plain(logp.detach().bfloat16(), old.bfloat16(), None, advantage, mask)
    assert parts.loss.dtype == torch.float32


def test_sequence_importance_is_the_capped_product_of_its_tokens():
    logp, old, _, engine, advantage, mask = ragged(6)
    parts = plain(logp, old, None, advantage, mask, engine_logp=engine, importance_cap=1.3, importance="sequence")
    product = ((old - engine) * mask).sum(1).exp().clamp(max=1.3)
    assert parts.sums["importance"] == pytest.approx(float((product * mask.sum(1)).sum()), abs=1e-12)


def test_impossible_requests_are_refused():
    logp, old, _, _, advantage, mask = ragged()
    with pytest.raises(ValueError, match="needs ref_logp"):
        plain(logp, old, None, advantage, mask, kl_beta=0.1)
    with pytest.raises(ValueError, match="needs engine_logp"):
        plain(logp, old, None, advantage, mask, importance_cap=2.0)
    with pytest.raises(ValueError, match="ratio='seq'"):
        plain(logp, old, None, advantage, mask, ratio="seq")
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
