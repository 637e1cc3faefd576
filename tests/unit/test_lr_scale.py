"""Learning-rate factors by parameter name: who is in which optimiser group."""

import pytest

from tatar_dist.config.load import load_config
from tatar_dist.errors import UserError

NAMES = ["visual.blocks.0.norm1.weight", "language_model.layers.0.norm.weight", "lm_head.weight"]


def groups(lr_scale):
    from tatar_dist.learner.zero3 import parameter_groups

    return parameter_groups([(name, name) for name in NAMES], lr_scale)


def test_without_factors_all_parameters_form_one_group():
    assert groups({}) == [{"params": NAMES, "scale": 1.0}]


def test_the_first_part_found_in_a_name_decides():
    found = groups({"visual": 0.1, "norm": 30.0})
    assert {tuple(g["params"]): g["scale"] for g in found} == {
        (n,): s for n, s in zip(NAMES, (0.1, 30.0, 1.0), strict=True)
    }


def test_a_part_of_no_name_is_an_error_that_names_it():
    with pytest.raises(UserError, match="lr_scale.nomr"):
        groups({"nomr": 2.0})


def test_a_negative_factor_is_refused():
    with pytest.raises(UserError, match="lr_scale.norm"):
        load_config([], ["output=x", "model.path=m", "grpo.optim.lr_scale={norm: -1}"])


def test_norms_and_biases_are_not_decayed():
    from types import SimpleNamespace

    from tatar_dist.learner.zero3 import parameter_groups

    matrix, norm = SimpleNamespace(shape=(0,), ds_shape=(4, 4)), SimpleNamespace(shape=(0,), ds_shape=(4,))
    named = [("q.weight", matrix), ("norm.weight", norm), ("head.weight", matrix)]
    assert parameter_groups(named, {"head": 2.0}, weight_decay=0.1) == [
        {"params": [matrix], "scale": 1.0},
        {"params": [norm], "scale": 1.0, "weight_decay": 0.0},
        {"params": [matrix], "scale": 2.0},
    ]
    assert len(parameter_groups(named, {}, weight_decay=0.0)) == 1
