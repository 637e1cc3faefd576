"""Check that a text is plain English prose, by its form only; pure functions.

`form_faults` takes the text and its length limits and returns faults as (stable code, sentence for people). Lists,
headings, markup, chat-template tags, addresses, other scripts, repetition and strings of keywords are faults. The
limits are far from the values of ordinary texts, because a rule that rejects good texts is worse than none.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

from tatar_dist.config.rationale import TextConfig
from tatar_dist.types import EIGHT

# A tag or what is left of one, chat-template tokens, instruction marks, entities, blanks to fill in. "a < b" is none.
_DEBRIS = re.compile(
    r"</?[a-zA-Z!?][^<>\n]{0,60}>?|<\||\|>|<<\s*/?\s*SYS|\[/?INST\]|```|\{\{|\}\}|&(?:\w{2,6}|#\w{1,6});"
    r"|\[(?!sic\])[a-z/][\w /-]{0,40}\]",
    re.I,
)
_ROLE = re.compile(r"^\s*(?:assistant|user|system|human|ai)\s*:", re.I)
_ADDRESS = re.compile(r"https?:|www\.\w|\w@\w+\.\w|\w\.(?:com|org|net|io)(?!\w)", re.I)
_MARKUP = re.compile(r"\*\*|__|(?<!\w)\*\w[^*\n]{0,60}\*|`\w|^\s*#{1,6}\s|^\s*[{\[]|^\s*\|", re.M)
_LIST = re.compile(
    r"^\s*(?:[-*\u2022\u2023\u25aa\u25e6\u2013\u2014]\s|\(?(?:[a-z]|[ivx]{1,4})[.)]\s|\(?\d{1,3}\)\s)", re.I | re.M
)
_START = r"(?:^|[.!?;][\"'\u201d\u2019)]*\s+|\n\s*)"
_STEP = re.compile(
    _START + r"(?:step|point|item|number)\s+(?:one|two|three|four|five|six|seven|eight)(?:\s*[:,.]|\s+[-\u2013\u2014])"
    r"|(?<!\w)\([a-h]\)(?!\w)|" + _START + r"step\s+(?:one|two|three|four|five|six|seven|eight)(?!\w)",
    re.I,
)
_ORDINAL = re.compile(
    _START + r"(?:(firstly|secondly|thirdly|fourthly|fifthly)(?!\w)|(first|second|third|fourth|fifth)\s*[,:])", re.I
)
# A label is one capitalised word, several, or a known one, with a colon: "Assessment:". "The result: mud" is prose.
_LABELS = (
    *(name.replace(" & ", f" {sign} ") for name in EIGHT for sign in ("&", "and") if sign == "&" or "&" in name),
    *"technical quality|image quality|overall quality|overall assessment|final assessment|final verdict".split("|"),
    *"overall impression|quality assessment|sentence one|sentence two|first sentence|second sentence".split("|"),
)
_LABEL = re.compile(
    _START
    + r"((?i:"
    + "|".join(map(re.escape, _LABELS))
    + r")|[A-Z][\w'-]*(?:\s+(?:&|and|of|[A-Z][\w'-]*)){0,5})\s*:(?=\s)"
)
_RUN_TOGETHER = re.compile(r"[a-z]{2}[.!?][A-Z][a-z]")
_CHAT = re.compile(
    r"^(?:(?:sure|certainly|of course|absolutely|okay|ok|alright|great|understood)!"
    r"|(?:sure|okay|ok|alright|understood)[,.]"
    r"|(?:certainly|of course|absolutely)[,.:]?\s+(?:here|i)(?!\w)"
    r"|here(?:'s|\u2019s| is| are)\s+(?:\w+\s+){0,4}(?:explanation|narrative|rationale|description|analysis|assessment"
    r"|response|answer|text|critique|review|evaluation|summary|paragraph|remark|sentences)(?!\w))",
    re.I,
)
_QUOTES = {'"': '"', "\u201c": "\u201d", "\u201e": "\u201c", "\u00ab": "\u00bb", "\u2018": "\u2019", "'": "'"}
_SIGNS = "\u00a9\u00ae\u00b0\u2122"  # of the symbols, what prose may hold

SMALL = frozenset(
    """a about above across after all almost along also although an and any are around as at be because been before
    behind below beside between beyond both but by can could does each even every for from had has have he her
    here his how i if in into is it its just like many may more most much my nearly neither no nor not nothing of
    off on once one only or other our out over own rather same she should since so some still such than that the
    their them then there these they this those though through throughout to too toward towards under until up
    upon us very was we well were what when where whether which while who whose will with within without would yet
    you""".split()
)
MIN_SMALL = 0.15  # share of such words; the good texts of the tests have 0.36 to 0.59
MAX_COMMAS = 0.3  # commas a word; good ones have at most 0.11
MAX_WORD = 0.2  # share of one word that is not small; good ones have at most 0.06
MAX_REPEATED = 0.25  # share of the words that end a run of four said before; good ones have at most 0.07

# Abbreviations whose full stop ends no sentence; some end one before a capital, names and initials before "The".
_NEVER_END = frozenset("e.g i.e eg ie vs cf approx fig mr mrs ms dr prof st mt viz resp".split())
_MAY_END = frozenset(("etc", "al"))
_NAMES = frozenset("jr sr inc ltd co corp".split())
_INITIALS = re.compile(r"(?:[a-z]\.)*[a-z]")
_STOP = re.compile(r"[.!?]+[\"'\u201d\u2019)\]]*(?=\s|$)")


def _ends(word: str, after: str) -> bool:
    """Whether a full stop after `word` ends a sentence that `after` follows."""
    if word in _NEVER_END or (word == "no" and after[:1].isdigit()):
        return False
    if word in _MAY_END:
        return not after[:1].islower()
    if word in _NAMES or (_INITIALS.fullmatch(word) and word not in ("a", "i")):
        following = re.match(r"[^\W\d_]+", after)
        return after[:1].isupper() and following is not None and following.group().casefold() in SMALL
    return True


def sentences(text: str) -> list[str]:
    """Split an English text into sentences. "e.g.", "the U.S. dome" and "..." in mid-sentence do not end one."""
    found, start = [], 0
    for stop in _STOP.finditer(text):
        after = text[stop.end() :].lstrip()
        words = text[start : stop.start()].split()
        word = words[-1].casefold().lstrip("(\"'\u201c\u2018[") if words else ""
        mark = stop.group().rstrip("\"'\u201d\u2019)]")
        if mark == "." and after and not _ends(word, after):
            continue
        if mark.startswith("..") and after[:1].islower():
            continue
        if text[start : stop.end()].strip():
            found.append(text[start : stop.end()].strip())
        start = stop.end()
    if rest := text[start:].strip():
        found.append(rest)
    return found


def repeated_share(words: list[str], n: int = 4) -> float:
    """Share of words that end an n-gram of words seen earlier (after the filters of Rae et al. 2021)."""
    runs = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return sum(count - 1 for count in runs.values()) / max(len(words), 1)


def _heading(text: str) -> str | None:
    if label := _LABEL.search(text):
        return label.group(1) + ":"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    for line, following in zip(lines, lines[1:], strict=False):
        if len(line.split()) <= 6 and line[-1].isalnum() and following[:1].isupper():
            return line
    return None


def _quoted(text: str) -> bool:
    """Whether one pair of quotation marks encloses the whole text."""
    close = _QUOTES.get(text[:1])
    if close is None or len(text) < 2 or text[-1] != close:
        return False
    inner = re.sub(r"(?<=\w)['\u2019](?=\w)", "", text[1:-1])  # apostrophes
    return text[0] not in inner and close not in inner


def foreign(text: str) -> str | None:
    """The first letter of a script other than Latin, or the first emoji or other pictorial sign; None if neither."""
    for c in unicodedata.normalize("NFKC", text):
        if c.isascii():
            continue
        kind = unicodedata.category(c)
        if kind[0] == "L" and "LATIN" not in unicodedata.name(c, "") and kind != "Lm":
            return c
        if kind == "So" and c not in _SIGNS:
            return c
    return None


def _monotony(text: str) -> Iterator[tuple[str, str]]:
    """Detect repetition, strings of keywords and other languages from word frequencies."""
    words = re.findall(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?", text.casefold())
    if len(words) < 12:
        return
    counts = Counter(words)
    word, count = max(((w, n) for w, n in counts.items() if w not in SMALL), key=lambda p: p[1], default=("", 0))
    if count / len(words) > MAX_WORD or re.search(r"(?<!\w)(\w{2,})(?:\W+\1){2}(?!\w)", text, re.I):
        yield "repetition", f"it says {word!r} over and over"
    elif repeated_share(words) > MAX_REPEATED:
        yield "repetition", "it says the same again and again"
    small = sum(counts[w] for w in SMALL) / len(words)
    if small < MIN_SMALL:
        yield "not-prose", "it has hardly any of the small words that English prose needs"
    elif text.count(",") / len(words) > MAX_COMMAS:
        yield "not-prose", "it is a string of words between commas"


def form_faults(text: str, wanted: TextConfig) -> list[tuple[str, str]]:
    """Faults of a stripped, non-empty text as (code, sentence): not plain prose, or not of the wanted length."""
    faults = []
    n_words = len(text.split())
    if n_words < wanted.min_words:
        faults.append(("too-short", f"{n_words} words, at least {wanted.min_words} are wanted"))
    if n_words > wanted.max_words:
        faults.append(("too-long", f"{n_words} words, at most {wanted.max_words} are wanted"))
    found = sentences(text)
    if wanted.sentences and len(found) != wanted.sentences:
        faults.append(("sentences", f"{len(found)} sentence(s), exactly {wanted.sentences} are wanted"))
    if joined := _RUN_TOGETHER.search(text):
        faults.append(("sentences", f"no blank between two sentences: {joined.group()!r}"))
    if not re.search(r"[.!?\u2026][\"'\u201d\u2019)]*$", text):
        faults.append(("unfinished", "it does not end like a sentence"))
    if debris := _DEBRIS.search(text) or _ROLE.search(text):
        faults.append(("debris", f"{debris.group().strip()!r} belongs to a chat template or a tag"))
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") and c not in "\n\t\r" for c in text):
        faults.append(("debris", "it holds control, invisible or unassigned characters"))
    if address := _ADDRESS.search(text):
        faults.append(("address", f"{address.group()!r} belongs to an address"))
    if _LIST.search(text) or _STEP.search(text) or len(set(_steps(text))) > 1:
        faults.append(("list", "it is a list or goes by steps, not prose"))
    if heading := _heading(text):
        faults.append(("heading", f"{heading!r} is a heading"))
    if markup := _MARKUP.search(text):
        faults.append(("markup", f"{markup.group().strip()!r} is markup"))
    if _quoted(text):
        faults.append(("quoted", "it stands in quotation marks as a whole"))
    if chat := _CHAT.search(text):
        faults.append(("chat", f"{chat.group()!r} speaks to whoever asked"))
    if sign := foreign(text):
        faults.append(("foreign", f"{sign!r} is no sign of an English text"))
    return [*faults, *_monotony(text)]


def _steps(text: str) -> Iterator[str]:
    for step in _ORDINAL.finditer(text):
        yield (step.group(1) or step.group(2)).casefold()
