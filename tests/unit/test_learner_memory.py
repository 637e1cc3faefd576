"""Peak memory of the head, forward and backward, every allocation of torch's allocator counted.

A vocabulary costs its weights' gradients and a chunk of logits, never tokens times vocabulary.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from tatar_dist.learner import policy as head  # noqa: E402

CHUNK = 128 << 10
FORWARD, BACKWARD = 4, 2  # chunks at the same time, the backward's beside the gradients
WIDTH = 32


def peak(run) -> int:
    """The most bytes above the start that `run` holds at any time, temporary ones inside operators included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    assert events
    return highest


def test_the_measure_sees_a_temporary_tensor():
    assert peak(lambda: [torch.ones(1 << 20).exp().sum() for _ in range(10)]) in range(8 << 20, 9 << 20)


def head_peak(tokens: int, vocabulary: int, dtype, plain: bool = False) -> int:
    states, weight = (torch.randn(n, WIDTH, dtype=dtype).requires_grad_() for n in (tokens, vocabulary))
    targets, forbidden = torch.zeros(tokens, dtype=torch.long), torch.tensor([1])

    def run():
        if plain:
            (states @ weight.T).float().log_softmax(-1).gather(-1, targets[:, None]).sum().backward()
        else:
            head.TokenLogprob.apply(states, weight, targets, forbidden, 1.0)[0].sum().backward()

    return peak(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens, vocabulary", [(200, 1000), (200, 4000), (800, 1000)])
def test_the_head_holds_the_gradients_and_a_chunk(tokens, vocabulary, dtype, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", CHUNK)
    # in bfloat16 the sum in float32, a chunk's part of it, and what the CPU's product needs for that
    sums = {torch.float32: 4, torch.bfloat16: 4 + 2 + 4}[dtype] * vocabulary * WIDTH
    per_token = tokens * (WIDTH * dtype.itemsize + 64)
    found = head_peak(tokens, vocabulary, dtype)
    assert found <= per_token + max(FORWARD * CHUNK, sums + BACKWARD * CHUNK)
    assert head_peak(tokens, vocabulary, dtype, plain=True) > 4 * tokens * vocabulary  # what is told apart
