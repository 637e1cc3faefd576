"""Mutated annotation files, configurations and model directories: refused with one line, or read as they stand.

MUTATED sets the number of examples, shared out over the tests; `make nightly` runs 10,000.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tatar_dist.assets import CONFIGS, TINY_MODEL
from tatar_dist.config.load import known_keys, load_config
from tatar_dist.config.schema import Config, ModelConfig
from tatar_dist.data.imports.importer import Choices, Sources, assemble
from tatar_dist.data.registry import read_registry
from tatar_dist.errors import UserError
from tatar_dist.models import family
from tatar_dist.models.files import INDEX
from tatar_dist.prompts.render import PromptTexts
from tatar_dist.scoring.directory import model_config

EXAMPLES = int(os.environ.get("MUTATED", "120"))
PLACE = st.floats(0, 1, exclude_max=True)
PIECES = st.one_of(
    st.binary(max_size=4),
    st.sampled_from([b"\n", b",", b'"', b"{", b"}", b"[", b"]", b": ", b"0", b"-", b"1e9", b"nan", b"null", b"\xff"]),
)
CHANGES = st.lists(st.tuples(st.sampled_from(["put", "drop", "double", "cut"]), PLACE, PLACE, PIECES), max_size=3)


def mutated(data: bytes, changes) -> bytes:
    """Put a piece over bytes, drop or double a span of at most 40 bytes, or cut the end off."""
    for kind, start, length, piece in changes:
        at = int(start * (len(data) + 1))
        end = at + 1 + int(length**3 * 40)
        inside = {"put": piece, "drop": b"", "double": data[at:end] * 2, "cut": b""}[kind]
        rest = {"cut": b"", "put": data[at + len(piece) :]}.get(kind, data[end:])
        data = data[:at] + inside + rest
    return data


def examples(share):
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
    return settings(max_examples=max(5, round(EXAMPLES * share)), deadline=None, suppress_health_check=slow)


def refused(call):
    """Return what `call` returns, or None after a refusal in one line."""
    try:
        return call()
    except UserError as e:
        assert str(e).strip() and "Traceback" not in str(e)
        return None


# -- annotations -------------------------------------------------------------------------------------------------------

SCORES = [(f"{i}.jpg", f"{i + 0.25}") for i in range(8)]
CSV = "image,score\n" + "".join(f"{image},{score}\n" for image, score in SCORES)
JSON = json.dumps([{"image": image, "gt_score": float(score)} for image, score in SCORES])


def number(text):
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def by_csv(data):
    header, *rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""))
    names = [name.strip().lower() for name in header]
    image, score = names.index("image"), names.index("score")
    return [(row[image].strip(), number(row[score])) for row in rows if len(row) > max(image, score)]


def by_json(data):
    rows = json.loads(data)
    return [(row["image"].strip(), number(row["gt_score"])) for row in rows if isinstance(row.get("image"), str)]


@examples(0.4)
@given(st.sampled_from([(CSV, by_csv), (JSON, by_json)]), CHANGES, st.booleans())
def test_rows_of_a_mutated_annotation_file_are_what_another_reader_reads(file, changes, drop_bad):
    text, read = file
    data = mutated(text.encode(), changes)
    dataset = read_registry().find("tad66k")
    made = refused(lambda: assemble(Sources((("F", data),), (), None), dataset, Choices(drop_bad=drop_bad)))
    if made is None:
        return
    rows = read(data)
    accepted = zip(made.table["image"].to_pylist(), made.table["score_raw"].to_pylist(), strict=True)
    for image, raw in accepted:
        assert any(image == name and raw == value for name, value in rows), (image, raw, rows)
    if not drop_bad:
        assert made.report["images"] == len({name for name, _ in rows})


# -- configurations ----------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(sorted(set(known_keys()) - {"output"}))
VALUES = st.one_of(
    st.integers(-2, 600),
    st.floats(allow_nan=True),
    st.sampled_from([2**70, "", "x", "${seed}", "auto", "true", [], {}, ["a"], [1.5], {"a": 1}, None, True, "???"]),
    st.text(max_size=5),
)
TEXTS = [(CONFIGS / name).read_text() for name in ("grpo.yaml", "sft.yaml", "demo.yaml")]


def flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def same(asked, got):
    if isinstance(asked, list | tuple):
        return len(asked) == len(got) and all(map(same, asked, got))
    if isinstance(got, bool) or got is None or isinstance(asked, bool):
        return asked == got or str(asked).lower() == str(got).lower()
    if isinstance(got, int | float):
        return number(asked) == got
    return str(asked) == str(got)


def check_config(asked, load):
    config = refused(load)
    if config is None:
        return
    before, found = dict(flat(asdict(Config()))), dict(flat(asdict(config)))
    asked = dict(flat(asked))
    open_ended = ("reward.params.", "rationale.")
    for key, value in asked.items():
        if key in found and not str(value).startswith("${") and key not in ("model.path", "output"):
            assert same(value, found[key]), (key, value, found[key])
    for key in found.keys() - asked.keys() - {"output", "model.path"}:
        assert key.startswith(open_ended) or found[key] == before[key], (key, found[key])


@examples(0.3)
@given(st.sampled_from(TEXTS), CHANGES)
def test_a_mutated_configuration_file_is_refused_or_means_what_yaml_says(tmp_path, text, changes):
    file = tmp_path / "c.yaml"
    file.write_bytes(data := mutated(text.encode(), changes))
    try:
        asked = yaml.safe_load(data.decode())
    except (yaml.YAMLError, ValueError):
        asked = None
    load = functools.partial(load_config, [str(file)], ["output=x", "model.path=m"])
    if asked is None and data.strip():
        refused(load)
    elif isinstance(asked or {}, dict):
        check_config(asked or {}, load)
    else:
        assert refused(load) is None


@examples(0.1)
@given(KEYS, VALUES)
def test_a_key_with_any_value_is_refused_or_taken(key, value):
    tree = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    word = f"{key}={json.dumps(value)}"
    check_config(tree, lambda: load_config([], ["output=x", "model.path=m", word]))


# -- model directories -------------------------------------------------------------------------------------------------

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja")
HEADER = 20_000  # the first bytes of the weights: where tensors are said to be


@functools.cache
def originals():
    backbone = family("qwen2_5_vl")(ModelConfig(path=str(TINY_MODEL), dtype="float32"))
    return {n: w.detach().clone() for n, w in backbone.load_model().named_parameters()}


@examples(0.2)
@given(st.sampled_from([*FILES, "model.safetensors", INDEX, "absent"]), CHANGES, st.sampled_from(FILES))
def test_a_mutated_model_directory_is_refused_or_loads_the_same_weights(tmp_path_factory, name, changes, absent):
    model = Path(shutil.copytree(TINY_MODEL, tmp_path_factory.mktemp("m") / "model"))
    file = model / name
    if name == "absent":
        (model / absent).unlink()
    elif name == INDEX:
        weights = dict.fromkeys(load_file(model / "model.safetensors"), "model.safetensors")
        file.write_bytes(mutated(json.dumps({"metadata": {}, "weight_map": weights}).encode(), changes))
    elif name == "model.safetensors":
        data = file.read_bytes()
        file.write_bytes(mutated(data[:HEADER], changes) + data[HEADER:])
    else:
        file.write_bytes(mutated(file.read_bytes(), changes))
    try:
        refused(lambda: model_config(model))
        words = [f"model.path={model}", "model.dtype=float32", "output=x"]
        texts = refused(lambda: PromptTexts(load_config([], words)))
        if texts is not None:
            loaded = refused(lambda: dict(texts.backbone.load_model().named_parameters()))
            for key, weight in (loaded or {}).items():
                if name != "model.safetensors":  # a changed header may name other bytes as a tensor
                    assert torch.equal(weight, originals()[key]), key
            assert loaded is None or loaded.keys() == originals().keys()
    finally:
        shutil.rmtree(model.parent)


def test_the_mutations_leave_a_file_without_changes_as_it_is():
    assert mutated(b"abc", []) == b"abc"
    assert mutated(b"abcdef", [("put", 0.0, 0.0, b"xy"), ("cut", 0.7, 0.0, b"")]) == b"xycd"
    with pytest.raises(ValueError):
        by_csv(b"nothing\n")
