"""The learning rate: Hugging Face's schedules, computed from the step alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tatar_dist.algo.schedule import importance, kl_beta, learning_rate, needs_reference
from tatar_dist.config.load import load_config
from tatar_dist.config.schema import GRPOConfig, OptimConfig

KINDS = ("constant", "linear", "cosine")
NAMES_OF_TRANSFORMERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def optim(schedule: str, warmup: int = 0, lr: float = 2e-5) -> OptimConfig:
    return OptimConfig(lr=lr, schedule=schedule, warmup_steps=warmup)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_has_the_rate_that_transformers_gives_it(kind, warmup):
    torch = pytest.importorskip("torch")
    from transformers.optimization import get_scheduler

    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-5)
    scheduler = get_scheduler(NAMES_OF_TRANSFORMERS[kind], sgd, num_warmup_steps=warmup, num_training_steps=30)
    for step in range(30):
        assert learning_rate(optim(kind, warmup), step, 30) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        sgd.step()
        scheduler.step()


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_in_equal_steps_from_zero_to_the_full_rate(kind):
    rates = [learning_rate(optim(kind, warmup=4, lr=8.0), step, 40) for step in range(5)]
    assert rates == pytest.approx([0.0, 2.0, 4.0, 6.0, 8.0])


def test_without_warm_up_the_first_update_has_the_full_rate():
    assert [learning_rate(optim(kind), 0, 10) for kind in KINDS] == [2e-5] * 3


def test_half_way_linear_and_cosine_stand_at_half_the_rate_and_constant_at_all_of_it():
    at = {kind: learning_rate(optim(kind, warmup=10, lr=1.0), 60, 110) for kind in KINDS}
    assert at == pytest.approx({"constant": 1.0, "linear": 0.5, "cosine": 0.5})
    early = {kind: learning_rate(optim(kind, warmup=10, lr=1.0), 35, 110) for kind in KINDS}
    assert early["linear"] == pytest.approx(0.75) and early["cosine"] > 0.8  # a cosine falls late


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), st.integers(0, 50), st.integers(1, 50), st.integers(0, 200))
def test_the_rate_stays_between_zero_and_its_peak_at_any_step(kind, warmup, total, step):
    """A resumed run may ask for steps past the end, and a warm-up may be longer than the run."""
    assert 0.0 <= learning_rate(optim(kind, warmup, lr=0.3), step, total) <= 0.3


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(("linear", "cosine")), st.integers(0, 10), st.integers(11, 60))
def test_after_warm_up_the_rate_falls_at_every_step_and_ends_at_zero(kind, warmup, total):
    rates = [learning_rate(optim(kind, warmup, lr=1.0), step, total) for step in range(warmup, total + 1)]
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.4] * 5), ("linear", [0.4, 0.3, 0.2, 0.1, 0.0]), ("cosine", [0.4, 0.341421, 0.2, 0.058579, 0.0])],
)
def test_the_weight_of_the_kl_goes_from_its_first_value_to_its_last(schedule, expected):
    grpo = GRPOConfig(kl_beta=0.4, kl_beta_end=0.0, kl_schedule=schedule)
    assert [kl_beta(grpo, step, 5) for step in range(5)] == pytest.approx(expected, abs=1e-6)
    assert kl_beta(grpo, 0, 1) == 0.4


def test_a_reference_is_needed_when_any_step_weighs_the_kl():
    assert needs_reference(GRPOConfig(kl_beta=0.1)) and not needs_reference(GRPOConfig(kl_beta=0.0))
    assert needs_reference(GRPOConfig(kl_beta=0.0, kl_beta_end=0.1, kl_schedule="linear"))
    assert not needs_reference(GRPOConfig(kl_beta=0.0, kl_beta_end=0.1))  # constant: the end plays no part


@pytest.mark.parametrize(
    ("words", "form"),
    [
        ([], "none"),
        (["grpo.staleness=1"], "token"),
        (["model.lora_rank=4"], "token"),
        (["model.lora_rank=4", "model.dtype=float32"], "none"),
        (["rollout.quantization=fp8"], "token"),
        (["rollout.quantization=fp8", "grpo.importance=sequence"], "sequence"),
    ],
)
def test_engines_of_other_probabilities_are_corrected_for(words, form):
    assert importance(load_config([], ["output=x", "model.path=m", "grpo.logprob_gap_limit=0.2", *words])) == form
