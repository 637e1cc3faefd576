"""Check a teacher's text: score leaks, copies, truncation, length, content. Pure functions.

`check_text` returns a list of `Reason`, empty when the text is accepted. A text that fails is not sent to the judge,
which saves its cost. Texts are never repaired or completed. Codes are stable, because reports count them.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tatar_dist.config.rationale import RationaleConfig
from tatar_dist.errors import UserError
from tatar_dist.prompts.answer import answer_text
from tatar_dist.rationale.wording import Wording, plain
from tatar_dist.types import EIGHT, Task

MAX_CHARS = 20_000  # a longer text is rejected unread: a hard bound on the work per text


@dataclass(frozen=True)
class Reason:
    """Why a text was rejected: a stable short code and a sentence for people."""

    code: str
    says: str


def without_reasoning(text: str) -> str:
    """Remove a teacher's own reasoning: everything up to and including the first `</think>`."""
    before, tag, after = text.partition("</think>")
    return (after if tag else before).strip()


# Numbers in words. A whole ten ("just above seventy"), a compound ("seventy-two") or a decimal is a leak whatever the
# score (0-100); years and focal lengths are allowed. 11 to 19 and "hundred" are a leak only if they are the score, a
# decade only beside it. Smaller numbers ("two blurred edges") are not. Phrases such as "out of ten" are in the wording.
_UNITS = "one two three four five six seven eight nine".split()
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_DECADES = [ten[:-1] + "ies" for ten in _TENS]
_COMPOUND = rf"(?:{'|'.join(_TENS)})(?:[\s-]*(?:{'|'.join(_UNITS)})(?!\w))?+"
# "a fifty-year-old wall", "thirty-five millimetre film", "a twenty-first century skyline", "a twenty-something"
_NO_SCORE = r"(?![\s-]+(?:years?|millimet(?:re|er)s?|something|first[\s-]century)(?!\w))"
_NUMBER_WORDS = (
    re.compile(rf"(?<!\w){_COMPOUND}(?!\w){_NO_SCORE}"),
    # "seven point two". No "one": "at one point two lines meet" is none.
    re.compile(
        rf"(?<!\w)(?:zero|{'|'.join([*_UNITS[1:], *_TEENS])})[\s-]+point[\s-]+(?:zero|{'|'.join(_UNITS)})(?!\w)"
    ),
    re.compile(rf"(?<!\w)(?:low|lower|mid|middle|high|higher|upper)[\s-]+(?:{'|'.join(_DECADES)})(?!\w)"),
)
_DASHES = str.maketrans({c: "-" for c in "\u2010\u2011\u2012\u2013\u2014\u2212\u00ad"})


def number_leak(text: str, score: float, wording: Wording) -> str | None:
    """Return the first numeral (any script), number phrase or word that tells the score, if any."""
    folded = unicodedata.normalize("NFKC", text)
    for character in folded:
        if unicodedata.numeric(character, None) is not None:
            return character
    words = plain(folded.translate(_DASHES))
    for pattern in (wording.checks.number_phrases, *_NUMBER_WORDS):
        if match := pattern.search(words):
            return match.group()
    whole = (math.floor(score), math.ceil(score))
    near = {_TEENS[n - 10] for n in whole if 10 < n < 20} | {"hundred" for n in whole if n == 100}
    near |= {_DECADES[int(s // 10) - 2] for s in (score - 1, score, score + 1) if 20 <= s < 100}
    return next((name for name in sorted(near) if re.search(rf"(?<!\w){name}(?!\w)", words)), None)


def attributes_in_order(text: str, patterns: Iterable[re.Pattern[str]]) -> tuple[int, int]:
    """Return the counts (attributes mentioned, longest chain of mentions in `patterns` order)."""
    words = plain(text)
    mentions = sorted((m.start(), m.end(), a) for a, pattern in enumerate(patterns) for m in pattern.finditer(words))
    chains: list[int] = []  # longest chain that ends with each mention
    for i, (start, _, attribute) in enumerate(mentions):
        before = [chains[j] for j in range(i) if mentions[j][1] <= start and mentions[j][2] < attribute]
        chains.append(1 + max(before, default=0))
    return len({attribute for *_, attribute in mentions}), max(chains, default=0)


def copied(text: str, sources: Iterable[str], n: int) -> str | None:
    """Return the first n-gram of words that the text shares with one of the sources, or None."""

    def grams(words: list[str]) -> list[tuple[str, ...]]:
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    def bare(t: str) -> list[str]:
        return re.findall(r"\w+", plain(t).replace("'", ""))

    known = {gram for source in sources for gram in grams(bare(source))}
    return next((" ".join(gram) for gram in grams(bare(text)) if gram in known), None)


# What stands before a full stop, and what must follow for it to end a sentence; after any other word it does.
_STARTER = "A An And At But He Her His I If In It Its No On She So That The Their There These They This Those We You"
_BEFORE_STOP = (
    (re.compile(r"e\.g|i\.e|eg|ie|vs|cf|approx|fig|mr|mrs|ms|dr|prof|st|mt|viz|resp"), re.compile(r"(?!)")),
    (re.compile(r"no"), re.compile(r"(?!\d)")),  # "No. 2"
    (re.compile(r"etc|al"), re.compile(r"(?![a-z])")),
    (
        re.compile(r"jr|sr|inc|ltd|co|corp|(?![ai]$)(?:[a-z]\.)*[a-z]"),
        re.compile(rf"(?:{_STARTER.replace(' ', '|')})\b"),
    ),
)
_STOP = re.compile(r"([.!?]+)[\"'\u201d\u2019)\]]*(?=\s|$)")


def _ends(word: str, after: str) -> bool:
    """Return whether a full stop after `word` ends a sentence that `after` follows."""
    must_follow = (follow for before, follow in _BEFORE_STOP if before.fullmatch(word))
    return all(follow.match(after) for follow in must_follow)


def sentences(text: str) -> list[str]:
    """Split English text into sentences. "e.g.", "U.S." and mid-sentence "..." do not end one."""
    parts, start = [], 0
    for stop in _STOP.finditer(text):
        after = text[stop.end() :].lstrip()
        words = text[start : stop.start()].split() or [""]
        word = words[-1].casefold().lstrip("(\"'\u201c\u2018[")
        if after and stop.group(1) == "." and not _ends(word, after):
            continue
        if stop.group(1).startswith("..") and after[:1].islower():
            continue
        parts.append(text[start : stop.end()].strip())
        start = stop.end()
    return [part for part in (*parts, text[start:].strip()) if part]


_CHAT_TEMPLATE = re.compile(r"<\||\|>|\[/?INST\]|```|\{\{|\}\}|^\s*(?:assistant|user|system)\s*:", re.I | re.M)
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn")  # could hide a number from `number_leak`, or be debris


def training_text_fault(text: str, score: float) -> str | None:
    """Return why the text cannot stand in a training target with the row's score, or None."""
    if token := _CHAT_TEMPLATE.search(text):
        return f"{token.group()!r} belongs to a chat template or to markup"
    if hidden := next((c for c in text if unicodedata.category(c) in _INVISIBLE and c not in "\n\r\t"), None):
        return f"holds the invisible character U+{ord(hidden):04X}"
    try:
        answer_text(text, score)
    except UserError as e:  # it holds a tag of the answer format
        return str(e)
    return None


def check_text(
    text: str,
    finish: str,
    task: Task,
    score: float,
    attributes: Mapping[str, str],
    config: RationaleConfig,
    wording: Wording,
) -> list[Reason]:
    """Return reasons to reject a `without_reasoning` text; stop early if empty or too long.

    Args:
        finish: "stop" when the teacher ended by itself, "length" when the token limit cut the text off.
        score: the row's score on 0-100, which the text must not reveal.
        attributes: attribute name -> text that an IAA text must not copy.
    """
    text, reasons = text.strip(), []
    if finish == "length":
        reasons.append(Reason("cut-off", "the token limit cut it off"))
    elif finish != "stop":
        reasons.append(Reason("not-finished", f"the endpoint ended it with {finish!r}"))
    if len(text) > MAX_CHARS:
        return [*reasons, Reason("too-long", f"{len(text)} characters, which no rationale has")]
    if not text:
        return [*reasons, Reason("empty", "there is no text")]
    wanted = config.fast if task == "iqa" else config.slow
    n_words, n_sentences = len(text.split()), len(sentences(text))
    if n_words < wanted.min_words:
        reasons.append(Reason("too-short", f"{n_words} words, at least {wanted.min_words} are wanted"))
    if n_words > wanted.max_words:
        reasons.append(Reason("too-long", f"{n_words} words, at most {wanted.max_words} are wanted"))
    if wanted.sentences and n_sentences != wanted.sentences:
        reasons.append(Reason("sentences", f"{n_sentences} sentence(s), exactly {wanted.sentences} are wanted"))
    if not re.search(r"[.!?\u2026][\"'\u201d\u2019)]*$", text):
        reasons.append(Reason("unfinished", "it does not end like a sentence"))
    if leak := number_leak(text, score, wording):
        reasons.append(Reason("number", f"{leak!r} gives a number away"))
    words, checks = plain(text), wording.checks
    for code, pattern, problem in (
        ("rating", checks.ratings, "speaks of a rating, which a reader has not seen"),
        ("chat", checks.chat, "speaks to whoever asked"),
        ("refusal", checks.refusals, "is a refusal"),
    ):
        if match := pattern.search(words):
            reasons.append(Reason(code, f"{match.group()!r} {problem}"))
    if task == "iqa":
        if not checks.quality_factors.search(words):
            reasons.append(Reason("no-quality-factor", "it names no quality factor"))
    else:
        touched, chain = attributes_in_order(text, checks.attributes.values())
        least = config.min_attributes
        if touched < least:
            reasons.append(Reason("attributes", f"it touches {touched} of {len(EIGHT)} attributes, {least} are wanted"))
        elif chain < least:
            reasons.append(Reason("attribute-order", f"only {chain} attributes come in order, {least} are wanted"))
        if gram := copied(text, attributes.values(), config.copied_words):
            reasons.append(Reason("copied", f"it copies the attribute texts: {gram!r}"))
    if fault := training_text_fault(text, score):
        reasons.append(Reason("training-text", fault))
    return reasons
