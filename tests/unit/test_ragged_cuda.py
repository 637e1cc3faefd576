"""The CUDA branch of ragged attention on the CPU: torch's own wrapper over dense stand-ins for the CUDA kernels.

Only `_flash_attention_forward` and `_backward` are stood in for, behind torch's dispatcher: names, order and types of
the arguments are checked against the real schema; the stand-ins demand what the kernels demand of their tensors.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from test_shared_prefix import SCALE, dense, gradients, mask, tensors  # noqa: E402

from tatar_dist.learner import ragged  # noqa: E402
from tatar_dist.learner.shared_prefix import Layout, _SharedPrefix, _Windows  # noqa: E402

LAYOUTS = [
    Layout((9,), ((5, 6),)),
    Layout((70, 3, 20), ((40, 0, 33), (1, 1), (0,))),
    Layout((6, 5), ((0,), (0, 0))),
]


def segments(q, k, cu_q, cu_k, max_q, max_k):
    """(query slice, key slice) of every segment, after the checks of the kernels."""
    for cu, longest, total, least in ((cu_q, max_q, len(q), 2), (cu_k, max_k, len(k), 0)):
        assert cu.dtype == torch.int32 and cu.is_contiguous()
        assert int(cu[0]) == 0 and int(cu[-1]) == total and max(least, int(cu.diff().max())) == longest
    assert len(cu_q) == len(cu_k) and q.stride(-1) == k.stride(-1) == 1
    ends = zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in ends]


def probabilities(q, k, scale, causal, lse=None):
    """(H, L, S) softmax, or exp(scores - lse) with an lse (H, L) that is given; and the lse."""
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    if causal:  # aligned at the last query and key, as flash attention has it
        scores = scores.masked_fill(torch.ones_like(scores[0]).tril(len(k) - len(q)) == 0, float("-inf"))
    lse = scores.logsumexp(-1) if lse is None else lse
    return (scores - lse[..., None]).exp(), lse


def flash_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
    *, scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None,
    num_splits=None,
):  # fmt: skip
    """torch.ops.aten._flash_attention_forward in its varlen form: out (T, H, D), lse (H, T) of natural logarithms."""
    assert (dropout_p, return_debug_mask, window_size_left, window_size_right) == (0.0, False, -1, -1)
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
    for at, keys in segments(query, key, cum_seq_q, cum_seq_k, max_q, max_k):
        p, lse[:, at] = probabilities(query[at], key[keys], scale, is_causal)
        v = value[keys].repeat_interleave(query.shape[1] // key.shape[1], 1)
        out[at] = torch.einsum("hqk,khd->qhd", p, v)
    state, unused = (torch.zeros(n, dtype=torch.uint64) for n in (2, 0))
    return out, lse, state, unused, query.new_empty(0)


def flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    """torch.ops.aten._flash_attention_backward: with the lse and the output that it is given."""
    assert (dropout_p, window_size_left, window_size_right) == (0.0, -1, -1)
    assert grad_out.is_contiguous() and out.is_contiguous() and logsumexp.is_contiguous()  # read through pointers
    assert logsumexp.shape == (query.shape[1], len(query)) and out.shape == grad_out.shape == query.shape
    assert rng_state.dtype == torch.uint64 and rng_state.shape == (2,)
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    for at, keys in segments(query, key, cum_seq_q, cum_seq_k, max_q, max_k):
        g, k, v = grad_out[at], *(x[keys].repeat_interleave(groups, 1) for x in (key, value))
        p, _ = probabilities(query[at], key[keys], scale, is_causal, logsumexp[:, at])
        dp = torch.einsum("qhd,khd->hqk", g, v) - (g * out[at]).sum(-1).T[..., None]
        ds = p * dp * scale
        dq[at] = torch.einsum("hqk,khd->qhd", ds, k)
        for total, x in ((dk, torch.einsum("hqk,qhd->khd", ds, query[at])), (dv, torch.einsum("hqk,qhd->khd", p, g))):
            total[keys] = x.unflatten(1, (-1, groups)).sum(2)
    return dq, dk, dv


@pytest.fixture
def cuda_branch(monkeypatch):
    """Every tensor takes the branch of half precision on CUDA; counts the kernels' calls."""
    calls = []

    def counted(name, kernel):
        def run(*args, **kwargs):
            calls.append(name)
            return kernel(*args, **kwargs)

        return run

    with torch.library._scoped_library("aten", "IMPL") as library:
        for kernel in (flash_forward, flash_backward):
            name = kernel.__name__.replace("flash", "_flash_attention")
            library.impl(name, counted(name, kernel), "CPU")
        monkeypatch.setattr(ragged, "_has_varlen", lambda q: True)
        yield calls


def both(monkeypatch, function, inputs):
    """Output and gradients through the CUDA branch, then through the CPU branch."""
    found = []
    for branch in (True, False):
        monkeypatch.setattr(ragged, "_has_varlen", lambda q, branch=branch: branch)
        out = function(*inputs)
        found.append([out, *gradients(out, inputs)])
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
def test_packed_rows_are_as_on_the_cpu(layout, heads, cuda_branch, monkeypatch):
    inputs = tensors(layout.tokens, *heads)
    cuda, cpu = both(monkeypatch, lambda *x: _SharedPrefix.apply(*x, layout, SCALE), inputs)
    calls = 2 if layout.tokens > layout.prompt_tokens else 1
    assert cuda_branch == ["_flash_attention_forward"] * calls + ["_flash_attention_backward"] * calls
    for a, b in zip(cuda, cpu, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    torch.testing.assert_close(cuda[0], dense(*inputs, mask(layout)), atol=1e-10, rtol=0)


def test_vision_windows_are_as_on_the_cpu(cuda_branch, monkeypatch):
    lengths = (16, 4, 16, 9)
    segments = ragged.ragged(lengths, lengths, False)
    cuda, cpu = both(monkeypatch, lambda *x: _Windows.apply(*x, segments, SCALE), tensors(sum(lengths), 4, 4))
    assert cuda_branch == ["_flash_attention_forward", "_flash_attention_backward"]
    for a, b in zip(cuda, cpu, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
