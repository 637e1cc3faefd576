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
from tatar_dist.config.validate import STRICT_KEYS, Text, read_yaml, validated
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
    """Compile a list of phrases into a whole-word pattern for `plain` text, or raise ValueError.

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
    unknown, missing = sorted(set(attributes).difference(EIGHT)), sorted(set(EIGHT).difference(attributes))
    if unknown or missing:
        raise ValueError(f"must hold the eight attributes: unknown are {unknown}, missing are {missing}")
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
        """Return system and user text by name of the question."""
        return dict(zip(QUESTIONS, (self.fast, self.slow, self.judge.iqa, self.judge.iaa), strict=True))


def _check_blanks(text: str, question: str, where: str) -> None:
    """Raise UserError if a user text cannot be filled in or lacks what must be asked about."""
    template, allowed = Template(text), QUESTIONS[question]
    names = set(template.get_identifiers())
    unknown, missing = names.difference(allowed), set(allowed).difference(names, OPTIONAL.get(question, ()))
    if unknown or missing or not template.is_valid():
        raise UserError(
            f"{where}: its blanks must be ${', $'.join(allowed)}, and $$ is the sign itself: unknown are "
            f"{sorted(unknown)}, missing are {sorted(missing)}"
        )


def load_wording(path: str | Path) -> Wording:
    """Read the YAML. Raises UserError: no file, broken YAML, a missing, unknown or wrong key."""
    wording: Wording = validated(Wording, read_yaml(locate(path), "wording file"), f"{path}")
    for question, texts in wording.texts.items():
        _check_blanks(texts.user, question, f"{path}: {question}.user")
    return wording
