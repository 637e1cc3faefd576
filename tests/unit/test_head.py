"""The chunked head against a plain log-softmax over all logits: values, gradients, and the memory it is for."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from tatar_dist.learner import head  # noqa: E402


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
    head.install(linear, temperature)
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
    head.install(linear, 1.0)
    states = torch.randn(2, 4, requires_grad=True)
    logp, entropy = linear(states, torch.tensor([5, 5]), torch.tensor([5]))
    assert torch.isneginf(logp).all() and torch.isfinite(entropy).all()
    none, _ = linear(states[:0], torch.tensor([], dtype=torch.long), torch.tensor([5]))
    none.sum().backward()  # a rank without tokens takes part in every collective
    assert none.shape == (0,) and not linear.weight.grad.any()


def test_memory_does_not_grow_with_the_tokens_times_the_vocabulary(monkeypatch):
    """The largest tensor that exists at any time is a chunk of logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(x))
            return out

    tokens, vocabulary = 400, 1000
    monkeypatch.setattr(head, "CHUNK_BYTES", 10 * 4 * vocabulary)
    states, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
    with Watch():
        logp, _ = head.TokenLogprob.apply(states, weight, torch.zeros(tokens, dtype=torch.long), torch.tensor([1]), 1.0)
        logp.sum().backward()
    assert len(sizes) > 100
    assert max(sizes) == 10 * vocabulary
