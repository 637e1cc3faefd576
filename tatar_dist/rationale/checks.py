"""Hard checks of a teacher's text: pure functions, no model asked. What fails here costs no judge.

In: the text as it came, how it ended, and what the text must not give away (the score) or copy (attribute texts).
Out: a list of `Reason`, empty when the text may be kept. Nothing is ever repaired or completed: a text is taken as it
is or not at all. Codes are stable (reports count them); the sentence beside a code is for people.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tatar_dist.data.templates import EIGHT
from tatar_dist.errors import UserError
from tatar_dist.prompts import answer_text, parse
from tatar_dist.rationale.settings import RationaleConfig, TextConfig
from tatar_dist.rationale.wording import Wording, plain
from tatar_dist.records import Task

MAX_CHARS = 20_000  # a longer text is rejected unread: a hard bound on the work per text


@dataclass(frozen=True)
class Reason:
    """Why a text was not kept: a stable short code and a sentence."""

    code: str
    says: str


# A tag or what is left of one, chat-template tokens, instruction marks, code fences. "a < b" is none.
_DEBRIS = re.compile(
    r"</?[a-zA-Z!?][^<>\n]{0,60}>?|<\||\|>|<<\s*/?\s*SYS|\[/?INST\]|```|\{\{|\}\}|\[/?(?:THINK|ANSWER)\]", re.I
)
_ROLE = re.compile(r"^\s*(?:assistant|user|system|human|ai)\s*:", re.I)
_MARKUP = re.compile(r"\*\*|__|^\s*#{1,6}\s|^\s*[{\[]|^\s*\|", re.M)
_LIST = re.compile(
    r"^\s*(?:[-*\u2022\u2023\u25aa\u25e6\u2013\u2014]\s|\(?[a-z]{1,2}[.)]\s|\(?\w{1,3}\)\s)", re.I | re.M
)
_STEP = re.compile(
    r"(?<!\w)(?:step|point|item|number)\s+(?:one|two|three|four|five|six|seven|eight)(?!\w)|(?<!\w)\([a-h]\)", re.I
)
# Abbreviations whose full stop ends no sentence; "etc." ends one only before a capital.
_NEVER_END = frozenset("e.g i.e eg ie vs cf approx fig mr mrs ms dr prof st viz resp".split())
_MAY_END = frozenset(("etc", "al"))
_STOP = re.compile(r"[.!?]+[\"'\u201d\u2019)\]]*(?=\s|$)")

_UNITS = "one two three four five six seven eight nine".split()
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_COMPOUND = re.compile(rf"(?<!\w)(?:{'|'.join(_TENS)})[\s-]+(?:{'|'.join(_UNITS)})(?!\w)")
_DASHES = str.maketrans({c: "-" for c in "\u2010\u2011\u2012\u2013\u2014\u2212\u00ad"})


def without_reasoning(text: str) -> str:
    """The text after a teacher's own reasoning: what stands before the first `</think>` is dropped, with the tag."""
    before, tag, after = text.partition("</think>")
    return (after if tag else before).strip()


def sentences(text: str) -> list[str]:
    """The sentences of an English text. Full stops in "e.g.", "J. Smith", "3.5" and "..." in mid-sentence end none."""
    found, start = [], 0
    for stop in _STOP.finditer(text):
        after = text[stop.end() :].lstrip()
        words = text[start : stop.start()].split()
        word = words[-1].casefold().lstrip("(\"'\u201c\u2018[") if words else ""
        mark = stop.group().rstrip("\"'\u201d\u2019)]")
        starts_low = after[:1].islower()
        if mark == "." and after:
            initial = len(word) == 1 and word.isalpha() and word not in "ai"
            if word in _NEVER_END or initial or (word in _MAY_END and starts_low):
                continue
        if mark.startswith("..") and starts_low:
            continue
        if text[start : stop.end()].strip():
            found.append(text[start : stop.end()].strip())
        start = stop.end()
    if rest := text[start:].strip():
        found.append(rest)
    return found


def spelled(number: int) -> str:
    """A whole number from 0 to 100 in English words: 72 -> "seventy-two"."""
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


def number_leak(text: str, score: float, wording: Wording) -> str | None:
    """What gives a number away, or None: any numeral of any script, number phrases, the score in words.

    A compound such as "seventy-two" is a leak whatever the score; single words only where they are the score, rounded
    up or down, and more than ten, because "two blurred edges" says nothing of the score.
    """
    folded = unicodedata.normalize("NFKC", text)
    for character in folded:
        if unicodedata.numeric(character, None) is not None:
            return character
    words = plain(folded.translate(_DASHES))
    if found := wording.number_phrases.search(words):
        return found.group()
    if found := _COMPOUND.search(words):
        return found.group()
    for value in sorted({math.floor(score), math.ceil(score)}):
        name = spelled(value)
        if value > 10 and re.search(rf"(?<!\w){name}(?!\w)", words):
            return name
    return None


def attributes_in_order(text: str, patterns: Sequence[re.Pattern[str]]) -> tuple[int, int]:
    """(attributes touched, longest chain of attributes whose words stand in the method's order)."""
    words = plain(unicodedata.normalize("NFKC", text))
    touched = 0
    ends: list[int] = [0]  # ends[k]: the earliest place at which a chain of k attributes can end
    for pattern in patterns:
        touched += pattern.search(words) is not None
        for k in range(len(ends) - 1, -1, -1):
            hit = pattern.search(words, ends[k])
            if hit is None:
                continue
            if k + 1 == len(ends):
                ends.append(hit.end())
            else:
                ends[k + 1] = min(ends[k + 1], hit.end())
    return touched, len(ends) - 1


def copied(text: str, sources: Sequence[str], n: int) -> str | None:
    """The first n words in a row that the text shares with one of the sources, or None."""

    def grams(words: list[str]) -> list[tuple[str, ...]]:
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    def bare(t: str) -> list[str]:
        return re.findall(r"\w+", plain(unicodedata.normalize("NFKC", t)).replace("'", ""))

    known = {gram for source in sources for gram in grams(bare(source))}
    return next((" ".join(gram) for gram in grams(bare(text)) if gram in known), None)


def _ending(finish: str) -> list[Reason]:
    if finish == "stop":
        return []
    if finish == "length":
        return [Reason("cut-off", "the token limit cut it off")]
    return [Reason("not-finished", f"the endpoint ended it with {finish!r}")]


def _form(text: str, wanted: TextConfig) -> list[Reason]:
    """Length, sentences, and everything that is not plain prose."""
    reasons = []
    n_words = len(text.split())
    if n_words < wanted.min_words:
        reasons.append(Reason("too-short", f"{n_words} words, at least {wanted.min_words} are wanted"))
    if n_words > wanted.max_words:
        reasons.append(Reason("too-long", f"{n_words} words, at most {wanted.max_words} are wanted"))
    found = sentences(text)
    if wanted.sentences and len(found) != wanted.sentences:
        reasons.append(Reason("sentences", f"{len(found)} sentence(s), exactly {wanted.sentences} are wanted"))
    if not re.search(r"[.!?\u2026][\"'\u201d\u2019)]*$", text):
        reasons.append(Reason("unfinished", "it does not end like a sentence"))
    if debris := _DEBRIS.search(text) or _ROLE.search(text):
        reasons.append(Reason("debris", f"{debris.group().strip()!r} belongs to a chat template or a tag"))
    if _LIST.search(text) or _STEP.search(text):
        reasons.append(Reason("list", "it is a list or goes by steps, not prose"))
    if markup := _MARKUP.search(text):
        reasons.append(Reason("markup", f"{markup.group().strip()!r} is markup"))
    if any(unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn") and c not in "\n\t\r" for c in text):
        reasons.append(Reason("debris", "it holds control or unassigned characters"))
    return reasons


def _content(text: str, task: Task, config: RationaleConfig, wording: Wording, sources: Sequence[str]) -> list[Reason]:
    """What the text must speak of, and what it must not take over."""
    if task == "iqa":
        if not wording.quality_factors.search(plain(unicodedata.normalize("NFKC", text))):
            return [Reason("no-quality-factor", "it names no quality factor")]
        return []
    reasons = []
    touched, chain = attributes_in_order(text, wording.attributes)
    least = config.min_attributes
    if touched < least:
        reasons.append(Reason("attributes", f"it touches {touched} of {len(EIGHT)} attributes, {least} are wanted"))
    elif chain < least:
        reasons.append(Reason("attribute-order", f"only {chain} attributes come in order, {least} are wanted"))
    if gram := copied(text, sources, config.copied_words):
        reasons.append(Reason("copied", f"it copies the attribute texts: {gram!r}"))
    return reasons


def training_text_problem(text: str, score: float) -> Reason | None:
    """Why the assembled training text is not one think and one answer pair with the row's score, or None."""
    try:
        assembled = answer_text(text, score)
    except UserError as e:
        return Reason("training-text", str(e))
    lowered = assembled.lower()
    pairs = [lowered.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    value = parse(assembled).value
    if pairs != [1, 1, 1, 1] or value is None or abs(value - score) > 0.005 + 1e-9:
        return Reason("training-text", "with its answer it is not one think and one answer pair")
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
    """Every reason against a text whose reasoning has been dropped already; none means that it may be kept.

    Args:
        finish: "stop" when the teacher ended by itself, "length" when the token limit cut it.
        score: the row's score on 0-100, which the text must not give away.
        attributes: attribute name -> text, what an IAA text may not copy.
    """
    text = text.strip()
    if len(text) > MAX_CHARS:
        return [*_ending(finish), Reason("too-long", f"{len(text)} characters, which no rationale has")]
    if not text:
        return [*_ending(finish), Reason("empty", "there is no text")]
    reasons = _ending(finish) + _form(text, config.fast if task == "iqa" else config.slow)
    if leak := number_leak(text, score, wording):
        reasons.append(Reason("number", f"{leak!r} gives a number away"))
    if refusal := wording.refusals.search(plain(text)):
        reasons.append(Reason("refusal", f"the teacher refuses: {refusal.group()!r}"))
    reasons += _content(text, task, config, wording, list(attributes.values()))
    problem = training_text_problem(text, score)
    return [*reasons, problem] if problem else reasons
