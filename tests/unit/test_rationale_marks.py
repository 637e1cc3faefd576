"""The judge's reader takes exactly the schema and nothing else, whatever the judge writes."""

import json
import os

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tatar_dist.rationale.checks import Reason
from tatar_dist.rationale.questions import MARKS, low_marks, marks_schema, read_marks

FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "1000"))
GOOD = {"visual_fidelity": 4, "score_consistency": 5}


def oracle(text, task):
    """The marks by json and jsonschema, with what those two let pass refused: repeated keys, NaN, 4.0, true."""

    def unique(pairs):
        assert len({k for k, _ in pairs}) == len(pairs)
        return dict(pairs)

    def refuse(name):
        raise ValueError(name)

    try:
        found = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
        jsonschema.validate(found, marks_schema(task))
        assert all(type(v) is int for v in found.values())
    except (ValueError, AssertionError, RecursionError, jsonschema.ValidationError):
        return None
    return found


_names = st.sampled_from([*MARKS["iqa"], *MARKS["iaa"], "why", "", "visual_fidelity ", "Cohesion"])
_values = st.one_of(
    st.integers(-1, 7),
    st.sampled_from(
        ["4", "NaN", "Infinity", "-Infinity", "4.0", "4e0", "true", "null", '"4"', "[4]", "{}", "04", "+4"]
    ),
    st.integers().map(str),
)
_pair = st.tuples(_names, _values)
_blank = st.sampled_from(["", " ", "\n", "\t\r\n", "\u00a0", "\ufeff", "\x00"])


@st.composite
def almost_marks(draw):
    """Texts near the real thing: right and wrong keys and values, prose, fences, cuts, single characters changed."""
    task = draw(st.sampled_from(["iqa", "iaa"]))
    if draw(st.booleans()):
        pairs = [(name, draw(_values if draw(st.booleans()) else st.integers(1, 5))) for name in MARKS[task]]
        pairs = draw(st.permutations(pairs))
    else:
        pairs = draw(st.lists(_pair, max_size=4))
    gap = draw(_blank)
    text = "{" + ("," + gap).join(f"{json.dumps(k)}:{gap}{v}" for k, v in pairs) + "}"
    form = draw(st.sampled_from(["as it is"] * 4 + ["prose", "fence", "cut", "changed", "twice", "blank"]))
    if form == "prose":
        text = draw(st.sampled_from(["Marks: ", "", "x"])) + text + draw(st.sampled_from([" Thanks.", "", "."]))
    elif form == "fence":
        text = f"```json\n{text}\n```"
    elif form == "cut":
        text = text[: draw(st.integers(0, len(text)))]
    elif form == "changed":
        i = draw(st.integers(0, len(text) - 1))
        text = text[:i] + draw(st.characters()) + text[i + draw(st.integers(0, 1)) :]
    elif form == "twice":
        text += draw(_blank) + text
    elif form == "blank":
        text = draw(_blank) + text + draw(_blank)
    return text


@settings(max_examples=FUZZ_EXAMPLES)
@example('{"visual_fidelity": true, "score_consistency": 5}', "iqa")
@example('{"visual_fidelity": 4, "score_consistency": 5, "visual_fidelity": 4}', "iqa")
@example('{"visual_fidelity": 4.0, "score_consistency": 5}', "iqa")
@example('{"visual_fidelity": NaN, "score_consistency": 5}', "iqa")
@given(st.one_of(almost_marks(), almost_marks(), almost_marks(), st.text()), st.sampled_from(["iqa", "iaa"]))
def test_the_reader_accepts_what_the_schema_accepts_and_nothing_else(text, task):
    found = read_marks(text, task)
    expected = oracle(text, task)
    if expected is None:
        assert isinstance(found, Reason) and found.code == "judge-json" and found.says
    else:
        assert found == expected and list(found) == list(MARKS[task])


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from(["iqa", "iaa"]), st.booleans())
def test_good_marks_in_either_order_are_read(a, b, task, turned):
    pairs = list(zip(MARKS[task], (a, b), strict=True))
    text = json.dumps(dict(pairs[::-1] if turned else pairs))
    assert read_marks(f" {text}\n", task) == dict(pairs)


@pytest.mark.parametrize("text", ["[" * 5000, '{"a":' * 3000, "9" * 9000, "{" + " " * 20_000 + "}", "\ud800", ""])
def test_monstrous_texts_are_refused_without_a_crash(text):
    assert isinstance(read_marks(text, "iqa"), Reason)


def test_marks_at_or_below_the_threshold_reject():
    assert low_marks(GOOD, 2) == []
    assert [r.code for r in low_marks({**GOOD, "score_consistency": 2}, 2)] == ["low-score_consistency"]
    assert len(low_marks({"groundedness": 1, "cohesion": 2}, 2)) == 2
    assert low_marks({"groundedness": 1, "cohesion": 1}, 0) == []
