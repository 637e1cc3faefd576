"""Attention of packed rows against a dense mask in float64: outputs, gradients, every shape a batch can have."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tatar_dist.learner import ragged  # noqa: E402
from tatar_dist.learner.shared_prefix import Layout, _SharedPrefix, _windows_of, attention  # noqa: E402

SCALE = 0.37


def tensors(tokens: int, heads: int, kv_heads: int, seed: int = 0, dim: int = 8):
    g = torch.Generator().manual_seed(seed)
    made = (torch.randn(tokens, h, dim, generator=g, dtype=torch.float64) for h in (heads, kv_heads, kv_heads))
    return [x.requires_grad_() for x in made]


def dense(q, k, v, allowed):
    """Softmax attention under a (T, S) mask, by its definition."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v)


def segments_of(layout: Layout) -> list[tuple[int, int]]:
    """(group, completion) of every token; completion -1: the prompt."""
    prompts = [(g, -1) for g, n in enumerate(layout.prompts) for _ in range(n)]
    return prompts + [
        (g, c) for g, group in enumerate(layout.completions) for c, n in enumerate(group) for _ in range(n)
    ]


def mask(layout: Layout) -> torch.Tensor:
    of = segments_of(layout)
    return torch.tensor(
        [
            [q[0] == k[0] and ((k[1] == -1 and q[1] != -1) or (q == k and j <= i)) for j, k in enumerate(of)]
            for i, q in enumerate(of)
        ]
    )


def gradients(out, inputs):
    return torch.autograd.grad((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum(), inputs)


layouts = st.lists(
    st.tuples(st.integers(1, 70), st.lists(st.integers(0, 40), min_size=1, max_size=4)), min_size=1, max_size=3
).map(lambda groups: Layout(tuple(p for p, _ in groups), tuple(tuple(c) for _, c in groups)))


@settings(deadline=None, max_examples=60)
@given(layouts, st.sampled_from([(4, 4), (4, 2), (3, 1)]))
def test_output_and_gradients_are_those_of_a_dense_mask(layout, heads):
    inputs = tensors(layout.tokens, *heads)
    out = _SharedPrefix.apply(*inputs, layout, SCALE)
    expected = dense(*inputs, mask(layout))
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    for found, right in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(found, right, atol=1e-9, rtol=0)


def test_a_wrong_layout_is_seen():
    """Otherwise the equality above would not tell whether completions see each other."""
    right, wrong = Layout((9,), ((5, 6),)), Layout((9,), ((11,),))
    inputs = tensors(right.tokens, 4, 2)
    difference = _SharedPrefix.apply(*inputs, wrong, SCALE) - dense(*inputs, mask(right))
    assert difference[:14].abs().max() < 1e-10  # prompt and first completion see the same
    assert difference[14:].abs().max() > 1e-2


def test_the_gradient_passes_torchs_own_check():
    layout = Layout((3, 5), ((2, 0, 3), (1, 4)))
    assert torch.autograd.gradcheck(
        lambda *x: _SharedPrefix.apply(*x, layout, SCALE), tensors(layout.tokens, 2, 1, dim=4)
    )


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_windows_of_the_vision_tower_see_themselves_alone(lengths):
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    assert _windows_of(bounds) is _windows_of(bounds)
    inputs = tensors(sum(lengths), 2, 2)
    heads_first = [x.transpose(0, 1)[None] for x in inputs]
    out = attention(torch.nn.Identity(), *heads_first, None, SCALE, cu_seq_lens_q=bounds)[0][0]
    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    expected = dense(*inputs, of[:, None] == of[None])
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    for found, right in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(found, right, atol=1e-9, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_the_explicit_kernel_is_the_flash_kernel(causal, heads):
    q, k, v = (x.detach().transpose(0, 1)[None] for x in tensors(33, *heads))
    flash, explicit = ragged._attend(q, k, v, causal, SCALE), ragged.explicit(q, k, v, causal, SCALE)
    for a, b in zip(flash, explicit, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    grad = torch.randn_like(q)
    arguments = (grad, q, k, v, *flash, causal, SCALE)
    for a, b in zip(ragged._attend_backward(*arguments), ragged.explicit_backward(*arguments), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def per_row(q, k, v, layout):
    """Every completion behind its own copy of its prompt, through torch's public attention."""
    of, out = segments_of(layout), torch.zeros_like(q)
    for g, group in enumerate(layout.completions):
        for c in range(len(group)):
            at = torch.tensor([i for i, s in enumerate(of) if s in ((g, -1), (g, c))])
            row = [x[at].transpose(0, 1)[None] for x in (q, k, v)]
            seen = torch.nn.functional.scaled_dot_product_attention(*row, is_causal=True, scale=SCALE, enable_gqa=True)
            out = out.index_put((at,), seen[0].transpose(0, 1))
    return out


@pytest.mark.parametrize("seed", range(6))
def test_in_bfloat16_the_error_is_that_of_rows_alone(seed):
    """At most 1.5 times it: the merge rounds each part once more, which measures up to 1.13 times."""
    layout = Layout((40, 33), ((20, 7), (31,)))
    low = [x.detach().bfloat16().requires_grad_() for x in tensors(layout.tokens, 4, 2, seed, dim=32)]
    exact = [x.detach().float().requires_grad_() for x in low]

    def results(out, inputs):
        share = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
        return [out, *torch.autograd.grad((out.float() * share).sum(), inputs)]

    packed, rows = results(_SharedPrefix.apply(*low, layout, SCALE), low), results(per_row(*low, layout), low)
    right = results(dense(*exact, mask(layout)), exact)
    assert {x.dtype for x in packed} == {torch.bfloat16}
    for mine, theirs, r in zip(packed, rows, right, strict=True):
        error, limit = ((x.float() - r).norm() for x in (mine, theirs))
        assert error <= 1.5 * limit
        assert limit < 0.005 * r.norm()  # of a bfloat16's 0.004, or the bound would bound nothing
