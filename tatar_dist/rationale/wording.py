"""Load the prompts of teachers and judges and the word lists of the hard checks.

The source is configs/rationale_prompts.yaml, checked key by key. Word lists are compiled to patterns of whole words:
"line" is not found in "outline".
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from string import Template
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator
from pydantic.dataclasses import dataclass

from tatar_dist.assets import locate
from tatar_dist.config.validate import STRICT_KEYS, Text, near, read_yaml, validated
from tatar_dist.errors import UserError
from tatar_dist.types import EIGHT

QUESTIONS = {  # name -> blanks that its user text may hold; all but those in OPTIONAL must stand there
    "fast": ("score",),
    "slow": ("score", "attributes"),
    "judge.iqa": ("score", "rationale"),
    "judge.iaa": ("score", "rationale", "attributes"),
}
OPTIONAL = {"judge.iaa": ("attributes",)}


def plain(text: str) -> str:
    """Normalise a text for phrase search: NFKC, lower case, straight apostrophes, single blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'").split())


def phrase_pattern(phrases: Any) -> re.Pattern[str]:
    """Compile a list of phrases into one whole-word pattern for `plain` text. Raises ValueError if it is none.

    A trailing * matches any ending, (a|b) either, (a )? is optional.
    """
    if not (isinstance(phrases, list) and phrases and all(isinstance(p, str) and p.strip(" *") for p in phrases)):
        raise ValueError("must be a list of words and phrases")
    parts = []
    for phrase in sorted(phrases, key=len, reverse=True):
        escaped = re.escape(plain(phrase.removesuffix("*")))
        either = escaped.replace(r"\(", "(?:").replace(r"\|", "|").replace(r"\)\?", ")?").replace(r"\)", ")")
        parts.append(f"(?:{either})" + (r"\w*" if phrase.endswith("*") else ""))
        try:
            re.compile(parts[-1])
        except re.error as e:
            raise ValueError(f"{phrase!r}: write alternatives as (this|that): {e}") from None
    return re.compile(r"(?<!\w)(?:" + "|".join(parts) + r")(?!\w)")


def _all_eight(attributes: dict[str, re.Pattern[str]]) -> dict[str, re.Pattern[str]]:
    """Return the patterns in the method's order."""
    for name in attributes:
        if name not in EIGHT:
            raise ValueError(f"unknown key {name!r}{near(name, EIGHT)}")
    for name in EIGHT:
        if name not in attributes:
            raise ValueError(f"missing key {name!r}")
    return {name: attributes[name] for name in EIGHT}


Phrases = Annotated[re.Pattern[str], BeforeValidator(phrase_pattern)]


@dataclass(frozen=True, config=STRICT_KEYS)
class Texts:
    system: Text
    user: Text


@dataclass(frozen=True, config=STRICT_KEYS)
class _JudgeTexts:
    iqa: Texts
    iaa: Texts


@dataclass(frozen=True, config=STRICT_KEYS)
class Checks:
    """Patterns of the hard checks; those of the attributes by name, in the method's order."""

    quality_factors: Phrases
    attributes: Annotated[dict[str, Phrases], AfterValidator(_all_eight)]
    refusals: Phrases
    chat: Phrases
    number_phrases: Phrases
    ratings: Phrases


@dataclass(frozen=True, config=STRICT_KEYS)
class Wording:
    """The content of the file."""

    fast: Texts
    slow: Texts
    judge: _JudgeTexts
    checks: Checks

    @property
    def texts(self) -> dict[str, Texts]:
        """System and user text by name of the question."""
        return dict(zip(QUESTIONS, (self.fast, self.slow, self.judge.iqa, self.judge.iaa), strict=True))


def _check_blanks(text: str, question: str, where: str) -> None:
    template, allowed = Template(text), QUESTIONS[question]
    if not template.is_valid():
        raise UserError(f"{where}: a $ that starts no name; write $$ for the sign itself")
    names = set(template.get_identifiers())
    if unknown := sorted(names.difference(allowed)):
        raise UserError(f"{where}: unknown ${unknown[0]}; this text may use ${', $'.join(allowed)}")
    if missing := sorted(set(allowed).difference(names, OPTIONAL.get(question, ()))):
        raise UserError(f"{where}: ${missing[0]} is missing, the text cannot be asked without it")


def load_wording(path: str | Path) -> Wording:
    """Read the YAML file. Raises UserError for a missing file, broken YAML, and a missing, unknown or wrong key."""
    wording: Wording = validated(Wording, read_yaml(locate(path), "wording file"), f"{path}")
    for question, texts in wording.texts.items():
        _check_blanks(texts.user, question, f"{path}: {question}.user")
    return wording
