"""One parser and one wording: what counts as an answer, what does not, and that reading stays linear in the text."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tatar_dist.errors import UserError
from tatar_dist.prompts.answer import MAX_CHARS, Prompts, answer_text, parse, think_text, think_words
from tatar_dist.types import TASKS

WORDING = "configs/prompts.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<answer>57.30</answer>", 57.3),
        ("<think>a b</think><answer>57.30</answer><|im_end|>", 57.3),
        ("<think>a</think>\n<ANSWER>\t 57 \n</Answer>  <|im_end|>\n", 57.0),
        ("<answer>+5.5e1</answer> trailing text", 55.0),
        ("<answer>1E2</answer>", 100.0),
        ("<answer>-3</answer>", -3.0),
        ("<answer>120</answer>", 120.0),
        ("<answer>0.000000000000000000000000000000000001</answer>", 1e-36),
    ],
)
def test_strict_takes_one_bare_number_in_one_block(text, value):
    assert parse(text).value == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "57.30",
        "<answer></answer>",
        "<answer>57.30",
        "57</answer><answer>",
        "<answer>50</answer><answer>60</answer>",
        "<answer>50</answer> <answer>",
        "<answer><answer>50</answer></answer>",
        "<answer>50 points</answer>",
        "<answer>50%</answer>",
        "<answer>50/100</answer>",
        "<answer>.5</answer>",
        "<answer>5.</answer>",
        "<answer>1_0</answer>",
        "<answer>0x10</answer>",
        "<answer>1e999</answer>",
        "<answer>nan</answer>",
        "<answer>inf</answer>",
        "<answer>٥٠</answer>",
        "<answer>５０</answer>",
        "<answer>5 0</answer>",
        "<an\u017fwer>50</an\u017fwer>",
        "<answer>\u00a050</answer>",
    ],
)
def test_strict_refuses_everything_else_with_a_reason(text):
    result = parse(text)
    assert result.value is None and result.reason and not result.out_of_range


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<answer>.5</answer>", 0.5),
        ("<answer>50 %</answer>", 50.0),
        ("<answer>57.5 / 100</answer>", 57.5),
        ("<answer>100</answer>", 100.0),
        ("<answer>100/100</answer>", 100.0),
        ("<answer>```text\n57.30\n```</answer>", 57.3),
        ("```\n<answer>57.30</answer>\n```", 57.3),
        ("<answer>50</answer> no: <answer>60</answer>", 60.0),
        ("<answer>50</answer> cut <answer>6", 50.0),
    ],
)
def test_lenient_adds_percent_fraction_fences_and_the_last_answer(text, value):
    assert parse(text, strict=False).value == value


@pytest.mark.parametrize("text", ["<answer>1e999</answer>", "<answer>fifty</answer>", "<answer>%</answer>", "57"])
def test_lenient_still_refuses_what_is_no_finite_number(text):
    assert parse(text, strict=False).value is None


def test_out_of_range_keeps_the_raw_value_and_is_flagged():
    above, below, inside = parse("<answer>120</answer>"), parse("<answer>-1</answer>"), parse("<answer>100</answer>")
    assert (above.value, above.out_of_range) == (120.0, True)
    assert (below.value, below.out_of_range) == (-1.0, True)
    assert not inside.out_of_range


@given(st.text() | st.text(alphabet="<>/answerthink0123456789.eE+- |_im"), st.booleans())
def test_parse_never_raises_and_is_never_infinite(text, strict):
    value = parse(text, strict).value
    assert value is None or math.isfinite(value)
    assert think_words(text) >= 0


@given(st.floats(0, 100), st.booleans())
def test_a_training_target_parses_back_to_its_two_decimals(score, with_rationale):
    text = answer_text("soft edges and noise" if with_rationale else None, score)
    for ending in ("", "<|im_end|>", "<|im_end|>\n"):
        assert parse(text + ending).value == float(f"{score:.2f}")
    assert think_words(text) == (4 if with_rationale else 0)


def test_a_training_target_looks_as_promised():
    assert answer_text("It is sharp.", 57.3) == "<think>It is sharp.</think><answer>57.30</answer>"
    assert answer_text(None, 0.0) == "<answer>0.00</answer>" == answer_text(None, -0.0)


@pytest.mark.parametrize(
    ("rationale", "score"), [("a", 101.0), ("a", math.nan), ("<answer>3</answer>", 5), ("a</think>", 5)]
)
def test_a_target_that_would_break_the_format_is_refused(rationale, score):
    with pytest.raises(UserError):
        answer_text(rationale, score)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<think>one two\nthree</think><answer>1</answer>", 3),
        ("one two <answer>1</answer>", 0),
        ("<think>one</think> lost <THINK>two three</think>", 3),
        ("<think>one two <answer>1</answer>", 2),
        ("<think>cut off here<|im_end|>", 3),
        ("<think>one <think>two</think></think>", 3),
        ("</think>", 0),
    ],
)
def test_think_words_counts_whitespace_tokens_inside_think(text, words):
    # A nested opening tag is part of the text it stands in, so "<think>two" is one token.
    assert think_words(text) == words - (1 if "one <think>two" in text else 0)
    assert len(think_text(text).split()) == think_words(text)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        "<answer>" * 100_000,
        "<think>" * 100_000,
        "<answer>" + " " * 400_000 + "x</answer>",
        "<answer>" + "1" * 400_000 + "</answer>",
        "<answer>" + "1" * 400_000 + "e" + "</answer>",
        "<answer>" + "`" * 400_000 + "</answer>",
        "<|im_end|>" * 90_000,
        "<answer>5</answer>" + "x" * (2 * MAX_CHARS),
    ],
)
def test_hostile_texts_are_read_in_linear_time(text, strict):
    start = time.thread_time()  # not of the clock on the wall, which goes on while other processes run
    parse(text, strict)
    think_words(text)
    assert time.thread_time() - start < 2.0


def test_the_wording_is_short_and_states_format_scale_and_task():
    prompts = Prompts.load(WORDING)
    for task in TASKS:
        system, user = prompts.messages(task)
        assert user["content"][0] == {"type": "image"}
        text = user["content"][1]["text"]
        assert f"TASK: {task.upper()}" in text and "0 " in text and "100 " in text
        assert "<think>" in system["content"][0]["text"] and "<answer>NN.NN</answer>" in system["content"][0]["text"]
        assert len((system["content"][0]["text"] + " " + text).split()) <= 75


def test_render_hands_the_messages_to_the_chat_template():
    rendered = Prompts.load(WORDING).render("iqa", lambda m: "|".join(x["role"] for x in m))
    assert rendered == "system|user"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("system: a\nusr: {iqa: a, iaa: b}\n", "did you mean 'user'"),
        ("system: a\nuser: {iqa: a}\n", "missing key 'user.iaa'"),
        ("system: a\nuser: {iqa: a, iaa: 3}\n", "user.iaa=3: must be text"),
        ("system: [", "not valid YAML"),
    ],
)
def test_a_broken_wording_file_names_the_key(tmp_path, content, said):
    path = tmp_path / "prompts.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        Prompts.load(path)
