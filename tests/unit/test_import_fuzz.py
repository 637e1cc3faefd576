"""Importers under hypothesis: whatever the bytes, either a clear `UserError` or rows that keep every promise.

The promises: accepted rows have a finite raw score inside the declared range, their score is its map, rows are kept or
dropped and none vanishes. FUZZ_EXAMPLES sets the number of examples, shared out over the tests.
"""

import io
import json
import math
import os
import re
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_import_formats import FORMATS

from tatar_dist.data.imports.importer import Choices, Sources, assemble
from tatar_dist.data.imports.rows import to_score
from tatar_dist.data.registry import read_registry
from tatar_dist.data.writing import write_table
from tatar_dist.errors import UserError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "1000"))
REGISTRY = read_registry()
FILES = {p.name: p.read_bytes() for p in (Path(__file__).parent / "annotations").iterdir()}
NAMES = st.sampled_from(list(REGISTRY.datasets))
SET_OF = {file: name for file, (name, *_) in FORMATS.items()}


def fuzz(share):
    return settings(
        max_examples=max(1, round(EXAMPLES * share)),
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


def check(data, name, drop_bad, attributes=None, lists=()):
    """Import; a UserError is an answer (one line), anything else must keep the promises. Returns the result or None."""
    dataset = REGISTRY.find(name)
    sources = Sources((("F", data),), lists, ("A", attributes) if attributes is not None else None)
    try:
        made = assemble(sources, dataset, Choices(drop_bad=drop_bad))
    except UserError as e:
        assert str(e) and "\n" not in str(e)
        return None
    report, table = made.report, made.table
    file = report["files"][0]
    fmt = dataset.formats[file["format"]]
    raw, score = (table[c].to_numpy() for c in ("score_raw", "score"))
    assert np.isfinite(raw).all() and (raw >= fmt.range.low).all() and (raw <= fmt.range.high).all()
    assert (score >= 0).all() and (score <= 100).all()
    np.testing.assert_array_equal(score, to_score(raw, fmt.range, fmt.lower_is_better))
    assert report["rows"] == report["kept"] + sum(report["dropped"].values())
    assert len(made.dropped) == sum(report["dropped"].values()) and (drop_bad or not made.dropped)
    images = table["image"].to_pylist()
    assert report["images"] == len(images) == len(set(images)) == len(set(table["sample_id"].to_pylist())) > 0
    assert all(i and ".." not in i.split("/") and not i.startswith("/") and "\\" not in i for i in images)
    assert sum(report["splits"].values()) == len(images)
    assert all(re.match(r"F(:| row|: row)", d["at"]) and d["reason"] and d["text"] for d in made.dropped)
    for column in ("meta", "attributes"):
        assert all(isinstance(json.loads(v), dict) for v in table[column].to_pylist() if v)
    return made


# Pieces that meet the importers' edges more often than random bytes do.
PIECES = st.sampled_from(
    [
        *(
            b"image,score\n",
            b"a.jpg",
            b"b.jpg",
            b",",
            b"\n",
            b"\r\n",
            b" ",
            b'"',
            b"\x00",
            b"\xef\xbb\xbf",
            b"\xff",
            b"3",
        ),
        *(
            b"nan",
            b"-",
            b"1e999",
            b"[",
            b"]",
            b"{",
            b"}",
            b'{"image": "',
            b'", "gt_score": ',
            b":",
            b"null",
            b"true",
            b"\\",
        ),
        *(
            b'"image"',
            b'"gt_score"',
            b"I01_01_01.png",
            b"A0001_00_00.bmp,",
            b"PK\x03\x04",
            b"1 2 3 4 5 6 7 8 9 10 11 12 13",
        ),
        *(b"../", b"\xc3\xa9", b"\xe2\x80\xa8", b"\t", b";", b"\\ud800", b"0" * 400, b"worker, imagePair, score\n"),
    ]
)
MESS = st.lists(PIECES, max_size=25).map(b"".join)
BYTES = st.one_of(st.binary(max_size=80), MESS)
STARTED = st.builds(bytes.__add__, st.just(b"image,score\na.jpg,3\nb.jpg,4\n"), MESS)


@fuzz(0.25)
@given(st.one_of(BYTES, STARTED), st.one_of(st.just("tad66k"), NAMES), st.booleans())
def test_no_bytes_are_misread(data, name, drop_bad):
    check(data, name, drop_bad)


@st.composite
def damaged(draw):
    file = draw(st.sampled_from(sorted(FILES)))
    data = bytearray(FILES[file])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.integers(0, 2))
        if kind == 0:
            data[at : at + draw(st.integers(1, 30))] = b""
        elif kind == 1:
            data[at:at] = draw(PIECES)
        else:
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
    return bytes(data), SET_OF.get(file) or draw(NAMES)


@fuzz(0.25)
@given(damaged(), st.booleans())
def test_damaged_files_of_the_releases_are_not_misread(file, drop_bad):
    check(*file, drop_bad)


NUMBER_TEXT = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True).map(repr),
    st.floats(0, 10).map(lambda x: f"{x:.3g}"),
    st.sampled_from(["", " ", "1_0", "0x1p3", "٣", "1,5", "+5", ".5", "5.", "1e1", "1e400", "NaN", "NA", "--1", "5 5"]),
)
IMAGE = st.one_of(st.sampled_from(["a.jpg", "b.jpg", "c d.jpg", "x/e.jpg", "", "..", "/a"]), st.text(max_size=6))


def oracle_number(text):
    """What a decimal number is, said another way than in the importer."""
    text = text.strip()
    if not text or not text.isascii() or set(text) - set("0123456789+-.eE"):
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


@fuzz(0.2)
@given(st.lists(st.tuples(IMAGE, NUMBER_TEXT), min_size=1, max_size=12))
def test_csv_rows_are_accepted_exactly_when_their_number_is_in_range(rows):
    import csv

    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["image", "score"])
    writer.writerows(rows)
    try:
        data = out.getvalue().encode()
    except UnicodeEncodeError:  # half a character, which no file holds
        return
    made = check(data, "tad66k", True)
    kept = (
        {}
        if made is None
        else dict(zip(made.table["image"].to_pylist(), made.table["score_raw"].to_pylist(), strict=True))
    )
    for image, raw in kept.items():
        assert raw in [oracle_number(n) for i, n in rows if i.strip() == image]
    plain = [(i.strip(), oracle_number(n)) for i, n in rows]
    for image, raw in plain:
        alone = [i for i, _ in plain].count(image) == 1
        if alone and image in ("a.jpg", "b.jpg", "c d.jpg", "x/e.jpg") and raw is not None and 0 <= raw <= 10:
            assert kept[image] == raw  # a good row is never dropped


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.floats(0, 10)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=4,
)
KEYS = ["image", "gt_score", "cot_reasoning", "aesthetic_attributes", "reversal_thinking", "other"]
GOOD = st.fixed_dictionaries({"image": IMAGE, "gt_score": st.floats(0, 10)})
ATTRIBUTES = st.dictionaries(
    st.sampled_from(["Overall Gestalt", "visual_elements", "mood", ""]), st.text(max_size=5), max_size=3
)
ANY_ROW = st.one_of(
    GOOD,
    st.builds(dict, GOOD, aesthetic_attributes=ATTRIBUTES, cot_reasoning=st.text(max_size=9)),
    st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5),
    JSON,
)


@fuzz(0.2)
@given(st.lists(ANY_ROW, min_size=1, max_size=8), st.booleans(), st.one_of(st.just("tad66k"), NAMES), st.booleans())
def test_json_rows_of_any_values_are_not_misread(rows, as_lines, name, drop_bad):
    text = "\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows)
    made = check(text.encode(), name, drop_bad)
    if made is None:
        return
    numbers = [r["gt_score"] for r in rows if isinstance(r, dict) and type(r.get("gt_score")) in (int, float)]
    assert set(made.table["score_raw"].to_pylist()) <= set(map(float, numbers))  # never a text, never true


@fuzz(0.06)
@given(st.one_of(BYTES, st.just(FILES["artimuse_text.jsonl"]), JSON.map(lambda v: json.dumps([v]).encode())), BYTES)
def test_attribute_files_and_split_lists_of_any_bytes_are_not_misread(attributes, names):
    check(FILES["ArtiMuse-10K.json"], "artimuse10k", False, attributes)
    check(FILES["ArtiMuse-10K.json"], "artimuse10k", False, lists=(("test", "L", names),))


@fuzz(0.04)
@given(file=damaged())
def test_what_is_accepted_can_be_written(tmp_path_factory, file):
    made = check(*file, True)
    if made is not None:
        path = tmp_path_factory.mktemp("m") / "m.parquet"
        assert write_table(path, made.table) == made.report["images"]
