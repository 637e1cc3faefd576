"""Good texts of many styles are accepted, and bad ones are rejected for what is wrong with them."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rationale_cases import build_config

from tatar_dist.demo.data.distortions import Distortion
from tatar_dist.demo.data.make import make_crop
from tatar_dist.demo.data.texts import FAMILY_NAMES, iaa_rationale, iqa_rationale
from tatar_dist.errors import UserError
from tatar_dist.rationale.checks import attributes_in_order, check_text, number_leak, sentences
from tatar_dist.rationale.template import ATTRIBUTES
from tatar_dist.rationale.wording import load_wording, phrase_pattern, plain

CONFIG = build_config().rationale
WORDING = load_wording(CONFIG.prompts)
SCORE = 72.4
TEXTS = yaml.safe_load(Path(__file__).with_name("rationale_texts.yaml").read_text(encoding="utf-8"))


def reasons(text, task="iqa", score=SCORE):
    return check_text(text, "stop", task, score, {}, CONFIG, WORDING)


@pytest.mark.parametrize("text", TEXTS["good_fast"])
def test_a_good_fast_text_is_accepted_at_every_score(text):
    assert [r for score in range(101) for r in reasons(text, "iqa", float(score))] == []


@pytest.mark.parametrize("text", TEXTS["good_slow"])
def test_a_good_slow_text_is_accepted_at_every_score(text):
    assert [r for score in range(0, 101, 5) for r in reasons(text, "iaa", float(score))] == []


@pytest.mark.parametrize("bad", TEXTS["bad_fast"])
def test_a_bad_fast_text_is_rejected_for_its_fault(bad):
    assert bad["code"] in {r.code for r in reasons(bad["text"])}


@pytest.mark.parametrize("bad", TEXTS["bad_slow"])
def test_a_bad_slow_text_is_rejected_for_its_fault(bad):
    assert bad["code"] in {r.code for r in reasons(bad["text"], "iaa", 64.2)}


def test_the_templates_texts_are_accepted():
    rng = np.random.default_rng(0)
    for _ in range(100):
        known = tuple(Distortion(str(f), rng.random()) for f in rng.choice(list(FAMILY_NAMES), 2, replace=False))
        text = iqa_rationale(known[: int(rng.integers(1, 3))], "street", score := 100 * rng.random(), rng)
        assert reasons(text, "iqa", score) == [], text
        text = iaa_rationale({name: rng.random() for name in ATTRIBUTES}, "street", score := 100 * rng.random(), rng)
        assert reasons(text, "iaa", score) == [], text


@pytest.mark.parametrize("task", ["iqa", "iaa"])
def test_the_demos_texts_are_accepted(task):
    for i in range(6):
        crop = make_crop(task, "train", i, 0)
        faults = check_text(crop.rationale, "stop", task, crop.score, crop.attributes or {}, CONFIG, WORDING)
        assert faults == [], crop.rationale


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("The U.S. Capitol is sharp. So is the sky.", 2),
        ("The U.K. flag waves. Good.", 2),
        ("It was taken in Washington, D.C. The sky is clear.", 2),
        ("It was taken in the U.S. in winter.", 1),
        ("It was shot at noon, a.k.a. the worst hour. Still good.", 2),
        ("Exhibit No. 2 is soft. So is the wall.", 2),
        ("Is it soft? No. It is sharp.", 3),
        ("By J. R. Smith Jr. himself. Good.", 2),
        ("Plan B. The other one is lost.", 2),
        ("Near Mt. Fuji it rains, e.g. In June.", 1),
    ],
)
def test_initials_and_names_end_a_sentence_only_before_one_that_begins(text, n):
    assert len(sentences(text)) == n


@pytest.mark.parametrize(
    "text",
    [
        "a fifty-year-old wall", "fifty years of wear", "thirty-five millimetre film", "a twenty-first-century tower",
        "at one point two lines cross", "a two-point perspective", "three-point lighting", "a hundred details",
        "the roaring twenties",
        "a mood of the eighties", "two of three boats", "a strong one", "the scale of the dunes", "a musical score",
        "a grand scale",
        "stars above the sea", "the decorated wall", "an overrated motif", "one of a kind", "tens of boats",
        "a scored plate",
    ],
)  # fmt: skip
def test_what_only_sounds_like_a_number_or_a_rating_is_none(text):
    assert number_leak(text, 31.0, WORDING) is None
    assert WORDING.checks.ratings.search(plain(text)) is None


@pytest.mark.parametrize(
    "text",
    [
        "seventytwo", "seventy odd", "SEVENTY\u2011TWO", "upper fifties", "mid-sixties", "ninety-nine",
        "six point five", "ten of ten",
        "five stars", "a five-star view", "a perfect ten", "per cent", "out of a hundred", "nine-tenths",
        "the top decile", "twenty",
    ],
)  # fmt: skip
def test_numbers_in_words_leak_at_every_score(text):
    assert all(number_leak(f"it is {text} here", float(score), WORDING) for score in range(101))


def test_a_decade_leaks_beside_the_score_only():
    assert [s for s in range(101) if number_leak("in the seventies", float(s), WORDING)] == list(range(69, 81))


@pytest.mark.parametrize(
    "word",
    ["software", "hazelnut", "lighthouse", "blockbuster", "Colorado", "Shakespeare", "quantity", "bandit", "castle",
     "exposition", "blockade", "grainfield"],
)  # fmt: skip
def test_a_quality_factor_is_a_word_of_its_own(word):
    assert WORDING.checks.quality_factors.search(plain(f"a {word} there")) is None


@pytest.mark.parametrize(
    "word", ["compost", "harmonica", "subjective", "ideal", "responsible", "composite", "craftsman"]
)
def test_an_attribute_is_a_word_of_its_own(word):
    assert not [p.pattern for p in WORDING.checks.attributes.values() if p.search(plain(f"a {word} there"))]


def test_phrases_take_alternatives_endings_and_what_may_be_missing():
    pattern = phrase_pattern(["(a|the) (big )?dog", "cat*", "what?"])
    assert all(pattern.search(t) for t in ("a dog", "the big dog", "cats", "so what?"))
    assert not any(pattern.search(t) for t in ("dog", "a bigdog", "the doggy", "concat", "what"))


def test_a_phrase_whose_brackets_do_not_match_is_refused_by_its_key(tmp_path):
    with open(CONFIG.prompts, encoding="utf-8") as f:
        text = f.read().replace("white balance,", '"white (balance",')
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"checks\.quality_factors: 'white \(balance'"):
        load_wording(tmp_path / "p.yaml")


@given(st.lists(st.sampled_from("abcdx"), max_size=12))
def test_the_longest_chain_is_what_trying_all_words_finds(words):
    def longest(words, last):
        if not words:
            return 0
        word, *rest = words
        best = longest(rest, last)
        return max(best, 1 + longest(rest, word)) if word != "x" and word > last else best

    patterns = [phrase_pattern([w]) for w in "abcd"]
    assert attributes_in_order(" ".join(words), patterns) == (len({*words} - {"x"}), longest(words, ""))
