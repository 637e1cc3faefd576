"""Find numbers in words that reveal a score, in `plain` text (wording.py) with straight hyphens.

A whole ten ("just above seventy"), a compound ("seventy-two") or a decimal is a leak whatever the score (0-100), since
a text without numbers has little use for it; years and focal lengths are allowed. 11 to 19 and "hundred" are a leak
only if they are the score, a decade only beside it. Smaller numbers ("two blurred edges") are not. Phrases such as "out
of ten" are part of the wording (configs/rationale_prompts.yaml).
"""

from __future__ import annotations

import math
import re

_UNITS = "one two three four five six seven eight nine".split()
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_DECADES = [ten[:-1] + "ies" for ten in _TENS]

_COMPOUND = rf"(?:{'|'.join(_TENS)})(?:[\s-]*(?:{'|'.join(_UNITS)})(?!\w))?+"
# "a fifty-year-old wall", "thirty-five millimetre film", "a twenty-first century skyline", "a twenty-something"
_NO_SCORE = r"(?![\s-]+(?:years?|millimet(?:re|er)s?|something|first[\s-]century)(?!\w))"
_TEN = re.compile(rf"(?<!\w){_COMPOUND}(?!\w){_NO_SCORE}")
# "seven point two". No "one": "at one point two lines meet" is none.
_POINT = re.compile(
    rf"(?<!\w)(?:zero|{'|'.join([*_UNITS[1:], *_TEENS])})[\s-]+point[\s-]+(?:zero|{'|'.join(_UNITS)})(?!\w)"
)
_PART_OF_DECADE = re.compile(rf"(?<!\w)(?:low|lower|mid|middle|high|higher|upper)[\s-]+(?:{'|'.join(_DECADES)})(?!\w)")


def spelled(number: int) -> str:
    """Write a whole number from 0 to 100 in English words: 72 -> "seventy-two"."""
    if number == 0:
        return "zero"
    if number == 100:
        return "hundred"
    if number < 10:
        return _UNITS[number - 1]
    if number < 20:
        return _TEENS[number - 10]
    tens, unit = divmod(number, 10)
    return _TENS[tens - 2] + (f"-{_UNITS[unit - 1]}" if unit else "")


def decade(score: float) -> str | None:
    """Decade of a score: "seventies" for 70-79, None below 20 and at 100."""
    return _DECADES[int(score // 10) - 2] if 20 <= score < 100 else None


def words_that_leak(words: str, score: float) -> str | None:
    """The number in words that reveals the score, or None. A decade ("the seventies") counts only near the score."""
    for pattern in (_TEN, _POINT, _PART_OF_DECADE):
        if found := pattern.search(words):
            return found.group()
    near = {spelled(n) for n in (math.floor(score), math.ceil(score)) if 10 < n < 20 or n == 100}
    near |= {name for name in (decade(score - 1), decade(score), decade(score + 1)) if name}
    return next((name for name in sorted(near) if re.search(rf"(?<!\w){name}(?!\w)", words)), None)
