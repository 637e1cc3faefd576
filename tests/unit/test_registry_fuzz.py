"""The registry under hypothesis: whatever its YAML says, one line of refusal or sets whose files can be imported.

FUZZ_EXAMPLES sets the number of examples, shared out over the tests.
"""

import copy
import json
import math
import os
from dataclasses import fields

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tatar_dist.data import registry
from tatar_dist.data.imports.importer import Choices, Sources, assemble
from tatar_dist.data.registry import read_registry
from tatar_dist.errors import UserError
from tatar_dist.types import SPLITS

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))

GOOD = yaml.safe_load(r"""
list_formats:
  list: {kind: [json, jsonl], columns: [image, gt_score], image: image, score: gt_score, source: s}
  told: {task: iqa, kind: json, columns: [image, gt_score, why], image: image, score: gt_score, rationale: why,
         source: s}
datasets:
  Mine:
    task: iqa
    in_domain: true
    url: https://example.org
    terms: mine
    counts: {total: 2, test: 1}
    list_range: [0, 20]
    names: {pattern: '^(?P<reference>\w+?)_(?P<type>\w+)_(?P<level>\w+)', levels: 5,
            distortions: {"01": blur, "02": noise}}
    split: {by: reference, fractions: {train: 0.5, validation: 0.5}, test: [I2], official: none}
    formats:
      table:
        kind: [csv, xlsx]
        columns: [file, points, dev, part, extra]
        image: file
        score: points
        range: [0, 50]
        better: lower
        std: {column: dev, range: [1, 5]}
        split: {column: part, values: {a: train, b: test}}
        image_pattern: "{}.png"
        source: own
      votes:
        kind: text
        separator: blank
        columns: {name: text, n1: number, n2: number, total: integer}
        image: name
        votes: {n1: 1, n2: 2}
        votes_total: total
        range: [1, 2]
        source: own
      ratings: {kind: csv, columns: [who, what, stars], image: what, score: stars, worker: who, range: [1, 5],
                source: own}
""")
FILES = [
    b"file,points,dev,part,extra\nI1_01_1,5,0.5,a,\nI2_02_5,50,1,b,\n",
    b"I1_01_9 0.5 0.5 2\nI2_02_x 1 0 3\nI2_01_2 1 0 3\n",
    b"who,what,stars\nA,I1_01_1,5\nB,I1_01_1,1\nB,I2_9_1,1\n",
    b'[{"image": "I1_01_1", "gt_score": 20}, {"image": "I9_02_0", "gt_score": 3}, {"image": "x", "gt_score": 3}]',
    b'[{"image": "I1_01_1", "gt_score": 20, "why": "Sharp."}]',
]
WORDS = [
    "file",
    "points",
    "dev",
    "name",
    "csv",
    "text",
    "iqa",
    "test",
    "image",
    "reference",
    "{}",
    "(",
    "table",
    "blank",
]
LEAF = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.dates(), st.sampled_from(WORDS)),
    st.sampled_from(
        [10**400, 1e-320, -1e308, 1e308, 0, 1, 2, 5, "(?P<reference>.*)?", "a{999999999999}", "no", " x", "a\nb"]
    ),
)
VALUE = st.one_of(LEAF, st.lists(LEAF, max_size=3), st.dictionaries(st.one_of(LEAF), LEAF, max_size=2))


def places(tree, at=()):
    yield at
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield from places(tree[key], (*at, key))


@st.composite
def changed(draw):
    tree = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 3))):
        if not tree:
            break
        *way, last = draw(st.sampled_from([p for p in places(tree) if p]))
        inside = tree
        for key in way:
            inside = inside[key]
        kind = draw(st.integers(0, 3))
        if kind == 0:
            del inside[last]
        elif kind == 1 and isinstance(inside, dict):
            inside[draw(st.one_of(LEAF, st.sampled_from(sorted(f.name for f in fields(registry.Format)))))] = draw(
                VALUE
            )
        else:
            inside[last] = draw(VALUE)
    return tree


def answer(path):
    """None for a refusal in one line, else the registry; every set and format of it keeps what it promises."""
    try:
        found = read_registry()
    except UserError as e:
        assert str(e).startswith(str(path)) and len(str(e).splitlines()) == 1 and len(str(e)) < 2000
        return None
    for dataset in found.datasets.values():
        assert dataset.formats and all(isinstance(g, str) for g in dataset.split.test)
        assert math.isclose(sum(dataset.split.fractions.values()), 1) and set(dataset.split.fractions) <= set(SPLITS)
        for fmt in dataset.formats.values():
            assert fmt.kind and 0 < fmt.range.points < math.inf and fmt.image in fmt.columns
            assert (fmt.score is None or fmt.score in fmt.columns) and (fmt.score or fmt.votes)
            assert fmt.votes or fmt.votes_total is None
            assert (fmt.split is None or fmt.split.values) and (fmt.std is None or fmt.std.range.points > 0)
            assert all(isinstance(c, str) and c for c in fmt.columns)
        for data in FILES:
            imported(data, dataset)
    return found


def imported(data, dataset):
    try:
        made = assemble(Sources((("F", data),)), dataset, Choices(drop_bad=True))
    except UserError as e:
        assert len(str(e).splitlines()) == 1
        return
    assert all(0 <= s <= 100 for s in made.table["score"].to_pylist())
    assert all(s is None or 0 <= s < math.inf for s in made.table["score_std"].to_pylist())
    for meta in made.table["meta"].to_pylist():
        for distortion in json.loads(meta or "{}").get("distortions", []):
            assert 0 < distortion["strength"] <= 1


def fuzz(share):
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
    return settings(max_examples=max(1, round(EXAMPLES * share)), deadline=None, suppress_health_check=checks)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where the test writes its registry. It stands for the checkout's, which would take most of the time."""
    monkeypatch.setattr(registry, "REGISTRY", tmp_path / "r.yaml")
    return tmp_path / "r.yaml"


def test_the_registry_that_is_changed_is_itself_a_good_one(path):
    path.write_text(yaml.safe_dump(GOOD, sort_keys=False))
    found = answer(path)
    made = [assemble(Sources((("F", data),)), found.find("mine"), Choices(drop_bad=True)) for data in FILES]
    assert [m.report["files"][0]["format"] for m in made] == ["table", "votes", "ratings", "list", "told"]
    assert [m.report["kept"] for m in made] == [2, 1, 2, 1, 1]


@fuzz(0.7)
@given(changed())
def test_fuzz_a_changed_registry_is_refused_in_one_line_or_can_be_used(path, tree):
    path.write_text(yaml.dump(tree, sort_keys=False), encoding="utf-8")
    answer(path)


TEXT = yaml.safe_dump(GOOD, sort_keys=False)
PIECES = st.sampled_from(
    [
        *": {}[],'\"#&*!|>-?%@\n\t",
        "\n  ",
        "<<: *a",
        "&a ",
        "*a",
        "!!int x",
        "!!timestamp x",
        "!!bool x",
        "!!float .",
        "\x00",
    ]
    + ["2024-13-45", "0x" + "f" * 6000, "1" * 5000, ".nan", "1:" * 400, "? ", "- ", "é", "\u2028", "null", "~"]
)


@fuzz(0.3)
@given(st.lists(st.tuples(st.integers(0, len(TEXT)), st.integers(0, 20), PIECES), min_size=1, max_size=3))
def test_fuzz_damaged_yaml_is_refused_in_one_line_or_can_be_used(path, damages):
    text = TEXT
    for at, gone, new in damages:
        text = text[:at] + new + text[at + gone :]
    path.write_text(text, encoding="utf-8")
    answer(path)
