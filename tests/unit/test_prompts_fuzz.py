"""The answer parser against a second reading of its grammar, on texts made of the grammar's own pieces and on any text.

FUZZ_EXAMPLES sets the number of examples, shared out over the tests.
"""

from __future__ import annotations

import decimal
import math
import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tatar_dist.prompts.answer import parse

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "1000"))
PIECES = (
    [
        "<answer>",
        "</answer>",
        "<ANSWER>",
        "</Answer>",
        "<answer",
        "answer>",
        "< answer>",
        "<think>",
        "</think>",
        "<|im_end|>",
    ]
    + [
        "5",
        "57.30",
        "100",
        "-3",
        "+4.5",
        "1e2",
        "1e999",
        "0x1F",
        ".5",
        "5.",
        "1_000",
        "nan",
        "inf",
        "٣",
        "５",
        "½",
        "1,5",
    ]
    + [
        " ",
        "\n",
        "\t",
        "\u00a0",
        "%",
        "/100",
        "```",
        "```json",
        "e",
        "E",
        ".",
        "-",
        "ſ",
        "K",
        "text ",
        "\x00",
        "\ud800",
    ]
)
numbers = st.from_regex(r"[ \t]?[+-]?[0-9]{1,4}(\.[0-9]{0,3})?([eE][+-]?[0-9]{1,3})?[ %]?", fullmatch=True)
answers = st.builds("{}<answer>{}</answer>{}".format, st.sampled_from(PIECES), numbers, st.sampled_from(PIECES))
texts = st.one_of(
    answers,
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.text(max_size=60),
)
many = settings(max_examples=EXAMPLES // 2, deadline=None, suppress_health_check=list(HealthCheck))


def lowered(text: str) -> str:
    """Only A-Z: other letters must not turn into ASCII ones."""
    return "".join(chr(ord(c) + 32) if "A" <= c <= "Z" else c for c in text)


def number(text: str) -> float | None:
    """The bare number by the grammar, read character by character and through decimal, or None."""
    rest = text[1:] if text[:1] in ("+", "-") else text
    mantissa, mark, exponent = lowered(rest).partition("e")
    whole, dot, fraction = mantissa.partition(".")
    digits = [
        whole,
        *([fraction] if dot else []),
        *([exponent.removeprefix("-") if exponent[:1] == "-" else exponent.removeprefix("+")] if mark else []),
    ]
    if not all(part and all(c in "0123456789" for c in part) for part in digits):
        return None
    with decimal.localcontext() as context:
        context.traps[decimal.Overflow] = False
        value = float(decimal.Decimal(text))
    return value if math.isfinite(value) else None


def oracle(text: str) -> float | None:
    """The strict value of a completion: one opening and one closing tag, in order, a bare number between blanks."""
    low = lowered(text)
    if low.count("<answer>") != 1 or low.count("</answer>") != 1:
        return None
    start, end = low.index("<answer>") + 8, low.index("</answer>")
    return number(text[start:end].strip(" \t\r\n\f\v")) if start <= end else None


@many
@given(texts)
def test_fuzz_strict_parse_agrees_with_a_second_reading_of_the_grammar(text):
    found = parse(text)
    assert found.value == oracle(text)
    assert (found.reason is None) == (found.value is not None)
    assert found.out_of_range == (found.value is not None and not 0 <= found.value <= 100)


@many
@given(texts)
def test_fuzz_lenient_parse_takes_all_that_strict_takes_and_nothing_infinite(text):
    strict, lenient = parse(text), parse(text, strict=False)
    if strict.value is not None:
        assert lenient == strict
    if lenient.value is not None:
        assert math.isfinite(lenient.value) and "</answer>" in lowered(text)
        assert any(c in "0123456789" for c in text)
