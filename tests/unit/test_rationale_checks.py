"""Hard checks: each reason has a text that meets it and a near one that does not; no text breaks them."""

import math
import os
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_server import FAST, SLOW
from rationale_cases import NOTES, build_config

from tatar_dist.errors import UserError
from tatar_dist.prompts.answer import answer_text, parse
from tatar_dist.rationale.checks import (
    attributes_in_order,
    check_text,
    copied,
    number_leak,
    sentences,
    without_reasoning,
)
from tatar_dist.rationale.questions import ordered_attributes
from tatar_dist.rationale.wording import load_wording, phrase_pattern, plain

FUZZ_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "1000"))
CONFIG = build_config().rationale
WORDING = load_wording(CONFIG.prompts)


def codes(text, task="iqa", finish="stop", score=34.25):
    notes = NOTES if task == "iaa" else {}
    return {r.code for r in check_text(text, finish, task, score, notes, CONFIG, WORDING)}


def test_the_texts_of_the_tests_pass():
    assert codes(FAST) == set() and codes(SLOW, "iaa") == set()


def changed(old, new):
    assert old in FAST
    return FAST.replace(old, new)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("Noise is seen. It is soft.", "too-short"),
        (f"{FAST} {FAST}", "too-long"),
        (f"{FAST} {FAST}", "sentences"),
        (FAST.replace(". Its", ", its"), "sentences"),
        (FAST.rstrip("."), "unfinished"),
        (f"<think>{FAST}", "training-text"),
        (f"{FAST[:-1]}</think>.", "training-text"),
        (f"{FAST}<answer>", "training-text"),
        (f"{FAST[:-1]} <|im_end|>.", "training-text"),
        (f"{FAST[:-1]} <|im_start|>.", "training-text"),
        (f"{FAST[:-1]} [INST].", "training-text"),
        (f"```\n{FAST}\n```", "training-text"),
        (f"Assistant: {FAST}", "training-text"),
        (f"{FAST[:-1]} {{{{ text }}}}.", "training-text"),
        (FAST.replace(" ", "\x00 ", 1), "training-text"),
        (f"{FAST[:-1]}, at seven\u200bty.", "training-text"),
        (changed("slight noise", "slight noise of 34"), "number"),
        (changed("slight noise", "noise of \u0663\u0664"), "number"),
        (changed("slight noise", "noise of \uff13"), "number"),
        (changed("slight noise", "noise of \u00bd"), "number"),
        (changed("slight noise", "noise \u2462"), "number"),
        (changed("slight noise", "a thirty-four noise"), "number"),
        (changed("slight noise", "a seventy two noise"), "number"),
        (changed("slight noise", "a Ninety\u2011One noise"), "number"),
        (changed("slight noise", "noise, three out of ten"), "number"),
        (changed("slight noise", "thirty percent noise"), "number"),
        (f"I'm sorry, but {FAST}", "refusal"),
        (f"I\u2019m sorry, but {FAST}", "refusal"),
        (f"As an AI, {FAST}", "refusal"),
        ("The animal sits in the grass near a large wooden house and waits there for its owner to come home. "
         "Behind it there is a garden with some trees and a path that leads to an old gate.", "no-quality-factor"),
    ],
)  # fmt: skip
def test_each_fault_of_a_fast_text_has_its_code(text, code):
    assert code in codes(text)


@pytest.mark.parametrize(
    "text",
    [
        changed("slight noise", "noise, e.g. grain,"),
        changed("slight noise", "noise (i.e. fine grain)"),
        changed("slight noise", "noise... faint grain"),
        changed("slight noise", "noise that seems to begin and end"),
        changed("slight noise", "two spots of noise"),
        changed("slight noise", "noise that weighs often"),
        changed("to the eye.", "to the eye!"),
        changed("slight noise", "noise < grain,"),
        changed("slight noise", "noise \u2013 fine grain \u2013"),
    ],
)
def test_what_only_looks_like_a_fault_passes(text):
    assert codes(text) == set()


def test_a_text_cut_by_the_token_limit_is_rejected_whole_as_it_may_look():
    assert codes(FAST, finish="length") == {"cut-off"}
    assert codes(FAST, finish="content_filter") == {"not-finished"}


@pytest.mark.parametrize(
    ("score", "word", "leaks"),
    [(70.0, "seventy", True), (69.6, "seventy", True), (50.0, "seventy", True), (17.2, "seventeen", True),
     (17.2, "eighteen", True), (5.0, "five", False), (100.0, "hundred", True), (34.0, "thirty", True),
     (50.0, "seventeen", False)],
)  # fmt: skip
def test_whole_tens_and_the_score_in_words_are_leaks_and_other_small_numbers_are_not(score, word, leaks):
    leak = number_leak(f"There are {word} spots.", score, WORDING)
    assert (leak == word) if leaks else (leak is None)


def spelled(number):
    """A number from 11 to 100 in English words."""
    if number < 20:
        return "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()[number - 11]
    tens = "twenty thirty forty fifty sixty seventy eighty ninety hundred".split()[number // 10 - 2]
    units = "one two three four five six seven eight nine".split()
    return f"{tens}-{units[number % 10 - 1]}" if number % 10 else tens


@given(st.integers(11, 100))
def test_every_score_above_ten_written_out_is_found(value):
    assert number_leak(f"I would say {spelled(value)} here", float(value), WORDING)


@given(st.characters(categories=["Nd", "Nl", "No"]), st.floats(0, 100))
def test_every_numeral_of_every_script_is_found(numeral, score):
    folded = unicodedata.normalize("NFKC", numeral)
    if any(unicodedata.numeric(c, None) is not None for c in folded):
        assert number_leak(f"a {numeral} b", score, WORDING)


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("One here. Two here.", 2),
        ("It is soft, e.g. at the edges. The rest is fine.", 2),
        ("Noise, blur, etc. are seen. Fine.", 2),
        ("Noise, blur, etc. Fine.", 2),
        ("A value of 3.5 is fine... and so on. Good?", 2),
        ('He said "soft." It is. Yes!', 3),
        ("By J. Smith and Dr. Brown vs. others.", 1),
        ("No stop at the end", 1),
        ("Really?! Yes.", 2),
        ("", 0),
        ("Wait\u2026 no. so.", 2),
    ],
)
def test_sentences_are_counted_as_a_reader_would(text, n):
    assert len(sentences(text)) == n


@given(st.text())
def test_sentences_lose_no_word(text):
    assert " ".join(sentences(text)).split() == text.split()


@pytest.mark.parametrize(
    ("text", "left"),
    [("I think.</think>Text.", "Text."), ("<think>a</think>\n\nText.", "Text."), ("Text.", "Text."), ("a</think>", "")],
)
def test_reasoning_before_the_text_is_dropped(text, left):
    assert without_reasoning(text) == left


def test_keywords_are_whole_words():
    pattern = phrase_pattern(["line", "lines", "blur*", "depth of field"])
    assert not pattern.search(plain("an outline, streamlined, headlines"))
    assert pattern.search(plain("a LINE")) and pattern.search(plain("Blurred")) and pattern.search("depth of field")


def test_five_attributes_in_order_are_wanted_of_a_slow_text():
    assert attributes_in_order(SLOW, WORDING.checks.attributes.values()) == (8, 8)
    assert attributes_in_order("nothing of the kind", WORDING.checks.attributes.values()) == (0, 0)
    touched, chain = attributes_in_order(" ".join(sentences(SLOW)[::-1]), WORDING.checks.attributes.values())
    assert touched == 8 and chain < 8
    bare = "The evening came and many people walked along the river to their homes beyond the old bridge. " * 9
    assert "attributes" in codes(bare.strip(), "iaa")


def test_a_slow_text_must_follow_the_order():
    words = ["colours", "composition", "gestalt", "technical", "theme", "mood", "originality", "altogether"]
    filler = "was noted there by somebody who went past it on a slow and rainy morning in the town."
    forwards = " ".join(f"The {w} {filler}" for w in words)
    backwards = " ".join(f"The {w} {filler}" for w in words[::-1])
    assert "attribute-order" not in codes(forwards, "iaa") and "attributes" not in codes(forwards, "iaa")
    assert "attribute-order" in codes(backwards, "iaa")


def test_sixteen_words_in_a_row_from_the_notes_are_a_copy_and_fifteen_are_not():
    source = " ".join(f"word{chr(97 + i)}" for i in range(20))
    words = source.split()
    assert copied("So: " + " ".join(words[2:18]).upper() + "!", [source], 16)
    assert copied("So: " + " ".join(words[2:17]), [source], 16) is None


@pytest.mark.parametrize("length", [124, 125])
def test_a_slow_text_has_at_least_125_words(length):
    words = SLOW.split()
    assert len(words) > 125
    text = " ".join(words[:length]).rstrip(".,") + "."
    assert ("too-short" in codes(text, "iaa")) == (length < 125)


_pieces = st.sampled_from(
    [*FAST.split(), *SLOW.split()[:40], "<think>", "</think>", "<answer>", "</answer>", "<|im_end|>", "e.g.", "...",
     "7",      "seventy-two", "\n- ", "```", "{", "\u0663", "\ud800", "\x00", "[INST]", "out of ten", "."]
)  # fmt: skip


@settings(max_examples=FUZZ_EXAMPLES)
@given(
    st.one_of(st.text(max_size=300), st.lists(_pieces, max_size=60).map(" ".join), st.just(FAST), st.just(SLOW)),
    st.sampled_from(["iqa", "iaa"]),
    st.sampled_from(["stop", "length", ""]),
    st.floats(0, 100),
)
def test_whatever_passes_the_checks_is_fit_for_training(text, task, finish, score):
    reasons = check_text(text, finish, task, score, NOTES, CONFIG, WORDING)
    assert all(r.code and r.says for r in reasons)
    if reasons:
        return
    assert finish == "stop"
    assembled = answer_text(text, score)
    assert [assembled.lower().count(t) for t in ("<think>", "</think>", "<answer>", "</answer>")] == [1, 1, 1, 1]
    assert math.isclose(parse(assembled).value, score, abs_tol=0.00501)
    assert not any(unicodedata.numeric(c, None) is not None for c in unicodedata.normalize("NFKC", text))
    least, most = (30, 50) if task == "iqa" else (125, 400)
    assert least <= len(text.split()) <= most


def test_attribute_texts_come_in_the_methods_order_whatever_the_spelling_of_their_names():
    names = ["Overall Evaluation", "Visual Elements", "composition and structure", "something else", "empty"]
    texts = ordered_attributes({n: f"text of {n}" if n != "empty" else " " for n in names})
    assert [n for n, _ in texts] == [
        "Visual Elements",
        "composition and structure",
        "Overall Evaluation",
        "something else",
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "$score on a scale on which 0",
            "high on a scale on which 0",
            r"fast\.user: its blanks must be \$score, .*missing are \['score'\]",
        ),
        ("      $rationale", "      $rational", r"judge\.iqa\.user: .*unknown are \['rational'\]"),
        ("refusals:", "refusal:", "unknown key 'checks.refusal'; did you mean 'refusals'"),
        ("overall gestalt:", "gestalt:", r"unknown are \['gestalt'\], missing are \['overall gestalt'\]"),
        ("fast:", "fast: [", "not valid YAML"),
    ],
)
def test_a_prompt_file_that_cannot_work_is_refused_by_its_key(tmp_path, old, new, said):
    with open(CONFIG.prompts, encoding="utf-8") as f:
        text = f.read()
    assert old in text
    file = tmp_path / "p.yaml"
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=said):
        load_wording(file)
