"""The chunked head against a plain log-softmax over all logits: values and gradients, in bfloat16 too."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from tatar_dist.learner import policy as head  # noqa: E402


def plain(states, weight, targets, forbidden, temperature):
    logits = (states @ weight.T / temperature).index_fill(-1, forbidden, float("-inf"))
    logp = logits.log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], torch.special.entr(logp.exp()).sum(-1)


@pytest.mark.parametrize("tokens", [1, 7, 16, 17])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("trained", [True, False])
def test_values_and_gradients_are_those_of_all_logits_at_once(tokens, temperature, trained, monkeypatch):
    g = torch.Generator().manual_seed(tokens)
    vocabulary, hidden = 50, 12
    monkeypatch.setattr(head, "CHUNK_BYTES", 8 * 4 * vocabulary)  # 8 tokens at a time
    linear = torch.nn.Linear(hidden, vocabulary, bias=False)
    linear.weight.requires_grad_(trained)
    head.install_head(linear, temperature)
    states = torch.randn(tokens, hidden, generator=g).requires_grad_()
    forbidden = torch.tensor([3, 49])
    targets = torch.randint(4, 49, (tokens,), generator=g)
    inputs = [states, linear.weight] if trained else [states]
    found = linear(states, targets, forbidden)
    expected = plain(states, linear.weight, targets, forbidden, temperature)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert not found[1].requires_grad
    share = torch.randn(tokens, generator=g)
    mine, right = (torch.autograd.grad((x[0] * share).sum(), inputs) for x in (found, expected))
    for a, b in zip(mine, right, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_forbidden_target_is_impossible_and_no_target_gives_no_gradient():
    linear = torch.nn.Linear(4, 9, bias=False)
    head.install_head(linear, 1.0)
    states = torch.randn(2, 4, requires_grad=True)
    logp, entropy = linear(states, torch.tensor([5, 5]), torch.tensor([5]))
    assert torch.isneginf(logp).all() and torch.isfinite(entropy).all()
    none, _ = linear(states[:0], torch.tensor([], dtype=torch.long), torch.tensor([5]))
    none.sum().backward()  # a rank without tokens takes part in every collective
    assert none.shape == (0,) and not linear.weight.grad.any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk", [8, 64])
def test_in_bfloat16_many_chunks_add_up_to_what_one_gives(seed, chunk, monkeypatch):
    """Both are rounded to 8 bits, 2^-9 of a value; added up in bfloat16, chunks of 8 are off by 0.015."""
    g = torch.Generator().manual_seed(seed)
    tokens, vocabulary = 2048, 64
    states = (torch.randn(tokens, 32, generator=g) + 0.5).bfloat16()
    weight = (torch.randn(vocabulary, 32, generator=g) * 0.3).bfloat16().requires_grad_()
    targets = torch.randint(4, 20, (tokens,), generator=g)
    share = torch.rand(tokens, generator=g)

    def gradient(size):
        monkeypatch.setattr(head, "CHUNK_BYTES", size * 4 * vocabulary)
        logp, _ = head.TokenLogprob.apply(states, weight, targets, torch.tensor([3]), 1.0)
        (found,) = torch.autograd.grad((logp * share).sum(), weight)
        assert found.dtype == torch.bfloat16
        return found.float()

    one, many = gradient(tokens), gradient(chunk)
    assert (many - one).norm() <= 2**-8 * one.norm()
