"""Hard checks of a teacher's text, as pure functions.

`check_text` takes the text, how it ended, the score that the text must not reveal and the attribute texts that it must
not copy. It returns a list of `Reason`, empty when the text is accepted. A text that fails is not sent to the judge,
which saves its cost. Texts are never repaired or completed. Codes are stable, because reports count them.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations

from tatar_dist.config.rationale import RationaleConfig
from tatar_dist.errors import UserError
from tatar_dist.prompts.answer import answer_text, parse
from tatar_dist.rationale.number_words import words_that_leak
from tatar_dist.rationale.prose import form_faults, sentences
from tatar_dist.rationale.wording import Wording, plain
from tatar_dist.types import EIGHT, Task

MAX_CHARS = 20_000  # a longer text is rejected unread: a hard bound on the work per text
SPREAD = 3  # sentences over which a slow text's attributes are spread at least, where it has so many


@dataclass(frozen=True)
class Reason:
    """Why a text was rejected: a stable short code and a sentence for people."""

    code: str
    says: str


_DASHES = str.maketrans({c: "-" for c in "\u2010\u2011\u2012\u2013\u2014\u2212\u00ad"})


def without_reasoning(text: str) -> str:
    """Remove a teacher's own reasoning: everything up to and including the first `</think>`."""
    before, tag, after = text.partition("</think>")
    return (after if tag else before).strip()


def number_leak(text: str, score: float, wording: Wording) -> str | None:
    """The first numeral of any script, number phrase or number word that reveals the score, or None."""
    folded = unicodedata.normalize("NFKC", text)
    for character in folded:
        if unicodedata.numeric(character, None) is not None:
            return character
    words = plain(folded.translate(_DASHES))
    if found := wording.number_phrases.search(words):
        return found.group()
    return words_that_leak(words, score)


def attributes_in_order(parts: Sequence[str], patterns: Sequence[re.Pattern[str]], most: int) -> tuple[int, int]:
    """(number of attributes mentioned, length of the longest chain of attributes in the method's order).

    A chain follows the text: part by part, and within a part by word position. It uses at most `most` per part.
    """
    touched: set[int] = set()
    longest = [0] * (len(patterns) + 1)  # longest[a]: the longest chain so far of attributes before a
    for part in parts:
        words = plain(unicodedata.normalize("NFKC", part))
        places = {a: [m.span() for m in pattern.finditer(words)] for a, pattern in enumerate(patterns)}
        here = [a for a, spans in places.items() if spans]
        touched.update(here)
        grown = longest.copy()
        for size in range(1, min(most, len(here)) + 1):
            for group in combinations(here, size):
                if _follow([places[a] for a in group]):
                    grown[group[-1] + 1] = max(grown[group[-1] + 1], longest[group[0]] + size)
        longest = list(accumulate(grown, max))
    return len(touched), longest[-1]


def _follow(places: Sequence[Sequence[tuple[int, int]]]) -> bool:
    """Whether one span can be chosen from each list so that each starts at or after the end of the one before."""
    at = 0
    for spans in places:
        ends = [end for start, end in spans if start >= at]
        if not ends:
            return False
        at = min(ends)
    return True


def copied(text: str, sources: Sequence[str], n: int) -> str | None:
    """The first n-gram of words that the text shares with one of the sources, or None."""

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


def _content(text: str, task: Task, config: RationaleConfig, wording: Wording, sources: Sequence[str]) -> list[Reason]:
    """Check that the text mentions what it must and does not copy the sources."""
    if task == "iqa":
        if not wording.quality_factors.search(plain(unicodedata.normalize("NFKC", text))):
            return [Reason("no-quality-factor", "it names no quality factor")]
        return []
    reasons = []
    least, parts = config.min_attributes, sentences(text)
    touched, chain = attributes_in_order(parts, wording.attributes, len(EIGHT))
    most = math.ceil(least / max(min(SPREAD, len(parts)), 1))
    if touched < least:
        reasons.append(Reason("attributes", f"it touches {touched} of {len(EIGHT)} attributes, {least} are wanted"))
    elif chain < least:
        reasons.append(Reason("attribute-order", f"only {chain} attributes come in order, {least} are wanted"))
    elif attributes_in_order(parts, wording.attributes, most)[1] < least:
        reasons.append(Reason("heaped", f"its attributes are heaped up: at most {most} of a sentence count"))
    if gram := copied(text, sources, config.copied_words):
        reasons.append(Reason("copied", f"it copies the attribute texts: {gram!r}"))
    return reasons


def training_text_problem(text: str, score: float) -> Reason | None:
    """Reason why the training text is not one think and one answer pair with the row's score, or None."""
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
    """Reasons to reject a text from which reasoning was removed; empty if accepted. Stops early if empty or too long.

    Args:
        finish: "stop" when the teacher ended by itself, "length" when the token limit cut the text off.
        score: the row's score on 0-100, which the text must not reveal.
        attributes: attribute name -> text that an IAA text must not copy.
    """
    text = text.strip()
    if len(text) > MAX_CHARS:
        return [*_ending(finish), Reason("too-long", f"{len(text)} characters, which no rationale has")]
    if not text:
        return [*_ending(finish), Reason("empty", "there is no text")]
    reasons = _ending(finish)
    reasons += [Reason(*fault) for fault in form_faults(text, config.fast if task == "iqa" else config.slow)]
    if leak := number_leak(text, score, wording):
        reasons.append(Reason("number", f"{leak!r} gives a number away"))
    if rating := wording.ratings.search(plain(text)):
        reasons.append(Reason("rating", f"{rating.group()!r} speaks of a rating, which a reader has not seen"))
    if chat := wording.chat.search(plain(text)):
        reasons.append(Reason("chat", f"{chat.group()!r} speaks to whoever asked"))
    if refusal := wording.refusals.search(plain(text)):
        reasons.append(Reason("refusal", f"the teacher refuses: {refusal.group()!r}"))
    reasons += _content(text, task, config, wording, list(attributes.values()))
    problem = training_text_problem(text, score)
    return [*reasons, problem] if problem else reasons
