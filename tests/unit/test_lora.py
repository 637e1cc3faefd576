"""Low-rank adapters: nothing changes at the start, only they learn, and merged they are the model that was trained."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from tatar_dist.algo.schedule import importance  # noqa: E402
from tatar_dist.config.load import load_config  # noqa: E402
from tatar_dist.config.schema import ModelConfig  # noqa: E402
from tatar_dist.errors import UserError  # noqa: E402
from tatar_dist.learner import lora  # noqa: E402


class Model(nn.Module):
    """A tower that may be frozen, a layer with a bias, one without, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = nn.Linear(6, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "o_proj": nn.Linear(8, 8, False)}) for _ in "ab"
        )
        self.lm_head = nn.Linear(8, 5, bias=False)

    def forward(self, x):
        x = self.visual(x)
        for layer in self.layers:
            x = x + layer["o_proj"](layer["q_proj"](x).tanh())
        return self.lm_head(x)


def config(**words) -> ModelConfig:
    return ModelConfig(path="", **{"lora_rank": 3, "lora_alpha": 6.0} | words)


def installed(**words):
    plain, adapted = Model(), Model()
    if not words.pop("train_vision", True):
        adapted.visual.requires_grad_(False)
    lora.install(adapted, config(**words), 7)
    return plain, adapted, torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def moved(model) -> None:
    """A few steps of an optimizer on what is trained."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for step in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_at_the_start_and_without_its_adapters_it_is_the_model():
    plain, adapted, x = installed()
    assert torch.equal(adapted(x), plain(x))
    moved(adapted)
    after = adapted(x)
    assert (after - plain(x)).abs().max() > 0.01
    with lora.without(adapted):
        assert torch.equal(adapted(x), plain(x))
    assert torch.equal(adapted(x), after)  # and they are back


def test_only_adapters_are_trained_and_names_stay():
    plain, adapted, _ = installed()
    moved(adapted)
    named, right = dict(adapted.named_parameters()), dict(plain.named_parameters())
    assert {n for n, p in named.items() if not lora.is_adapter(n)} == set(right)
    assert all(torch.equal(named[n], p) for n, p in right.items())
    trained = {n for n, p in named.items() if p.requires_grad}
    layers = ["visual", *(f"layers.{i}.{n}" for i in (0, 1) for n in ("q_proj", "o_proj"))]
    assert trained == {f"{layer}.{part}" for layer in layers for part in (lora.DOWN, lora.UP)}


def test_merged_weights_in_a_plain_model_are_the_trained_model():
    plain, adapted, x = installed()
    moved(adapted)
    weights = dict(lora.merged(adapted.named_parameters(), lora.scale(config())))
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(x), adapted(x), atol=1e-6, rtol=0)
    assert weights["lm_head.weight"].data_ptr() == adapted.lm_head.weight.data_ptr()  # nothing is copied in vain


def test_a_frozen_tower_and_layers_that_are_no_target_get_none():
    _, adapted, _ = installed(train_vision=False)
    assert isinstance(adapted.visual, nn.Linear)
    _, adapted, _ = installed(lora_targets=["o_proj"])
    assert isinstance(adapted.layers[0]["q_proj"], nn.Linear)
    assert isinstance(adapted.layers[1]["o_proj"], lora.LoraLinear)


def test_a_target_that_is_no_layer_is_named():
    with pytest.raises(UserError, match="no trained linear layer is called 'k_proj'; use o_proj, q_proj, visual"):
        installed(lora_targets=["k_proj"])


def test_a_rank_above_a_layers_width_is_refused():
    with pytest.raises(UserError, match="model.lora_rank=7: visual is only 6 wide"):
        installed(lora_rank=7)


@pytest.mark.parametrize(
    ("words", "form"),
    [([], "none"), (["model.lora_rank=4"], "token"), (["model.lora_rank=4", "model.dtype=float32"], "none")],
)
def test_rounded_merged_weights_are_corrected_for(words, form):
    chosen = load_config([], ["output=unused", "model.path=unused", *words])
    assert importance(chosen) == form
    assert importance(load_config([], ["output=unused", "model.path=unused", "grpo.staleness=1"])) == "token"


def test_a_recipes_rates_of_frozen_parts_stand_without_effect():
    from tatar_dist.learner.zero3 import parameter_groups

    (group,) = parameter_groups([("q.lora_a", 1)], {"norm": 9.0}, ["norm.weight"])
    assert group == {"params": [1], "scale": 1.0}
    with pytest.raises(UserError, match="no trained parameter's name contains 'nrm'"):
        parameter_groups([("q.lora_a", 1)], {"nrm": 9.0}, ["norm.weight"])
