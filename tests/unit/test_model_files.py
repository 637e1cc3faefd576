"""Model directories that lack weights, or hold other ones: refused, with what is wrong and what to do."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tatar_dist.assets import TINY_MODEL
from tatar_dist.config.load import load_config
from tatar_dist.errors import UserError
from tatar_dist.models import family
from tatar_dist.models.files import INDEX
from tatar_dist.scoring.directory import model_config


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(TINY_MODEL, tmp_path / "model"))


def backbone(model):
    return family("qwen2_5_vl")(load_config([], ["output=unused", f"model.path={model}", "model.dtype=float32"]).model)


def weights(model, change):
    save_file(change(load_file(model / "model.safetensors")), model / "model.safetensors", metadata={"format": "pt"})


def setting(model, **values):
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def narrow(w):
    return {k: v[:-8].contiguous() if k == "model.layers.0.mlp.up_proj.weight" else v for k, v in w.items()}


@pytest.mark.parametrize(
    "change, found",
    [
        (
            lambda w: {f"base_model.model.{k}": v for k, v in w.items()},
            r": 93 missing \(lm_head.weight, .*93 unknown \(base_m",
        ),
        (
            lambda w: {k: v for k, v in w.items() if "visual" not in k},
            r": 54 missing \(model.visual.blocks.0.attn.proj.bias, ",
        ),
        (
            lambda w: {k: v for k, v in w.items() if "layers.1.mlp" not in k},
            r": 3 missing \(model.language_model.layers.1.mlp",
        ),
        (lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}, r": 1 missing \(lm_head.weight\)$"),
        (lambda w: w | {"score.weight": torch.ones(1)}, r": 1 unknown \(score.weight\)$"),
        (
            narrow,
            r": 1 of another shape \(model.language_model.layers.0.mlp.up_proj.weight \(376, 128\) for \(384, 128\)\)$",
        ),
    ],
    ids=["prefix", "no tower", "no layer", "no head", "more", "shape"],
)
def test_weights_that_do_not_fit_the_configuration_are_named(model, change, found):
    weights(model, change)
    for use in (backbone(model).check_weights, backbone(model).load_model):
        with pytest.raises(UserError, match=f"its weights do not fit its config.json{found}"):
            use()


def test_a_tied_head_and_both_layouts_of_names_are_whole(model):
    old = load_file(model / "model.safetensors")
    loaded = dict(backbone(model).load_model().named_parameters())
    new = {n: loaded[n].detach().clone() for n in loaded}
    assert set(new) != set(old)
    save_file(new, model / "model.safetensors", metadata={"format": "pt"})
    backbone(model).check_weights()
    again = dict(backbone(model).load_model().named_parameters())
    assert all(torch.equal(again[n], w) for n, w in new.items())
    weights(model, lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"})
    setting(model, tie_word_embeddings=True)
    backbone(model).check_weights()
    assert backbone(model).load_model().lm_head.weight is not None


def bad_shard(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pointer(model):
    (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def absent(model):
    (model / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}))


def pickled(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def adapter(model):
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))


def empty(model):
    (model / "model.safetensors").write_bytes(b"")


def header(model):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"{no}" + b"0" * 10)


@pytest.mark.parametrize(
    "damage, line",
    [
        (bad_shard, r"model.safetensors: cut off after \d+ of \d+ bytes: fetch it again"),
        (pointer, "model.safetensors: a Git LFS pointer, not the weights: run `git lfs pull`"),
        (absent, r"1 of 2 weight files that model.safetensors.index.json names are absent \(model-00002.safetensors\)"),
        (pickled, "holds no .*safetensors weights, only pytorch_model.bin: save it again"),
        (adapter, "an adapter of org/base, not a model: merge it first"),
        (header, "model.safetensors: not a safetensors file: its header is damaged"),
        (empty, "model.safetensors: not a safetensors file, or cut off after 0 bytes"),
        (lambda m: (m / "chat_template.jinja").unlink(), "no chat template .*: copy it from the model"),
    ],
)  # fmt: skip
def test_a_damaged_directory_is_refused_before_anything_starts(model, damage, line):
    damage(model)
    for check in (family("qwen2_5_vl").check_directory, model_config):
        with pytest.raises(UserError, match=line):
            check(str(model))


def test_hidden_files_and_a_template_of_the_processor_are_no_fault(model):
    (model / "._model.safetensors").write_bytes(b"resource fork")
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    file = model / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    assert family("qwen2_5_vl").check_directory(str(model))


def test_quantised_weights_can_answer_but_not_train(model):
    setting(model, quantization_config={"quant_method": "awq"})
    kind = family("qwen2_5_vl")
    assert kind.check_directory(str(model)) and model_config(model)
    with pytest.raises(UserError, match=r"its weights are quantised \(awq\); quantised weights cannot be trained"):
        kind.check_directory(str(model), trained=True)
