"""What the benches of weight pushes and of scaling compute from their measurements, and what they refuse."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("ray")

from tatar_dist.bench import scaling, subject, sync  # noqa: E402
from tatar_dist.demo.tiny.build import make_config, train_tokenizer  # noqa: E402
from tatar_dist.errors import UserError  # noqa: E402


def test_a_push_is_compared_with_the_loading_of_its_round_and_shown_beside_two_copies():
    seconds = {"push_seconds": [1.0, 0.5, 2.0], "own_seconds": [0.9, 0.25, 1.6], "copy_seconds": [0.15, 0.1, 0.4]}
    compared = sync.compare({"bytes": 1e9, **seconds}, constant=0.2)
    assert compared["ratio"] == pytest.approx({"min": 0.5, "median": 0.8, "max": 0.9})
    assert compared["two_copies_and_constant_seconds"] == pytest.approx(0.5)
    assert compared["gb_per_second"] == pytest.approx(1.0)
    assert compared["share_of_copy"] == pytest.approx(0.15)


def test_a_copy_copies_with_one_thread_and_gives_the_threads_back():
    before = torch.get_num_threads()
    assert all(seconds > 0 for seconds in sync.copies(1 << 20, rounds=2))
    assert torch.get_num_threads() == before


def test_the_model_of_the_constant_has_as_many_tensors_and_nearly_no_bytes():
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokenizer, models = train_tokenizer(["a plain view"], 1024), []
    for sizes in (sync.THIN, subject.SIZES, sync.LARGE):
        with torch.device("meta"):
            models.append(Qwen2_5_VLForConditionalGeneration(make_config(tokenizer, sizes, False)))
    tensors = [len(list(m.parameters())) for m in models]
    numbers = [sum(p.numel() for p in m.parameters()) for m in models]
    assert tensors[0] == tensors[1] == tensors[2]
    assert numbers[0] < 0.05 * numbers[1] and 100e6 < numbers[2] < 200e6


def test_scaling_needs_two_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    with pytest.raises(UserError, match="^bench scaling: needs 2 cores, this process may use 1$"):
        scaling.run()
