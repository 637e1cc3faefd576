"""Load the prompts of teachers and judges and the word lists of the hard checks.

The source is configs/rationale_prompts.yaml, checked key by key. `Wording` holds system and user text of each question,
whose blanks `ask` fills in, and the word lists as compiled patterns of whole words: "line" is not found in "outline".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Annotated, Any

from annotated_types import MinLen
from pydantic import AfterValidator, Strict

from tatar_dist.assets import locate, looked_in
from tatar_dist.config.validate import STRICT_KEYS, Text, near, read_yaml, validated
from tatar_dist.errors import UserError
from tatar_dist.types import EIGHT

QUESTIONS = {  # name -> blanks that its user text may hold, all but those in _OPTIONAL must stand there
    "fast": ("score",),
    "slow": ("score", "attributes"),
    "judge.iqa": ("score", "rationale"),
    "judge.iaa": ("score", "rationale", "attributes"),
}
_OPTIONAL = {"judge.iaa": ("attributes",)}


@dataclass(frozen=True)
class Wording:
    """`system` and `user` texts by question ("fast", "slow", "judge.iqa", "judge.iaa"), and patterns of the checks."""

    system: dict[str, str]
    user: dict[str, Template]
    quality_factors: re.Pattern[str]
    attributes: tuple[re.Pattern[str], ...]
    refusals: re.Pattern[str]
    chat: re.Pattern[str]
    number_phrases: re.Pattern[str]
    ratings: re.Pattern[str]

    def ask(self, question: str, blanks: Mapping[str, str]) -> tuple[str, str]:
        """(system text, user text) with the blanks filled in. Blanks that the text does not use are ignored."""
        return self.system[question], self.user[question].substitute(blanks)


def plain(text: str) -> str:
    """Normalise a text for phrase search: lower case, straight apostrophes, single blanks."""
    return " ".join(text.casefold().replace("\u2019", "'").split())


def phrase_pattern(phrases: list[str]) -> re.Pattern[str]:
    """Compile phrases into one whole-word pattern for `plain` text.

    A trailing * matches any ending, (a|b) either, (a )? is optional. Raises re.error for brackets that do not match.
    """
    parts = []
    for phrase in sorted(phrases, key=len, reverse=True):
        escaped = re.escape(plain(phrase.removesuffix("*")))
        either = escaped.replace(r"\(", "(?:").replace(r"\|", "|").replace(r"\)\?", ")?").replace(r"\)", ")")
        parts.append(f"(?:{either})" + (r"\w*" if phrase.endswith("*") else ""))
    return re.compile(r"(?<!\w)(?:" + "|".join(parts) + r")(?!\w)")


def _compiled(phrases: list[str]) -> re.Pattern[str]:
    for phrase in phrases:
        if not phrase.strip(" *"):
            raise ValueError(f"{phrase!r} is no word or phrase")
        try:
            phrase_pattern([phrase])
        except re.error as e:
            raise ValueError(f"{phrase!r}: write alternatives as (this|that): {e}") from None
    return phrase_pattern(phrases)


def _all_eight(attributes: dict[str, re.Pattern[str]]) -> dict[str, re.Pattern[str]]:
    for name in attributes:
        if name not in EIGHT:
            raise ValueError(f"unknown key {name!r}{near(name, EIGHT)}")
    for name in EIGHT:
        if name not in attributes:
            raise ValueError(f"missing key {name!r}")
    return attributes


# read as a list of phrases, kept as their pattern
Phrases = Annotated[list[Annotated[str, Strict()]], MinLen(1), AfterValidator(_compiled)]


@dataclass(frozen=True)
class _Texts:
    __pydantic_config__ = STRICT_KEYS

    system: Text
    user: Text


@dataclass(frozen=True)
class _Judge:
    __pydantic_config__ = STRICT_KEYS

    iqa: _Texts
    iaa: _Texts


@dataclass(frozen=True)
class _Checks:
    __pydantic_config__ = STRICT_KEYS

    quality_factors: Phrases
    attributes: Annotated[dict[str, Phrases], AfterValidator(_all_eight)]
    refusals: Phrases
    chat: Phrases
    number_phrases: Phrases
    ratings: Phrases


@dataclass(frozen=True)
class _WordingFile:
    __pydantic_config__ = STRICT_KEYS

    fast: _Texts
    slow: _Texts
    judge: _Judge
    checks: _Checks


def _user_text(text: str, question: str, where: str) -> Template:
    template = Template(text)
    if not template.is_valid():
        raise UserError(f"{where}: a $ that starts no name; write $$ for the sign itself")
    allowed, names = QUESTIONS[question], template.get_identifiers()
    if unknown := [name for name in names if name not in allowed]:
        raise UserError(f"{where}: unknown ${unknown[0]}; this text may use ${', $'.join(allowed)}")
    needed = [name for name in allowed if name not in _OPTIONAL.get(question, ())]
    if missing := [name for name in needed if name not in names]:
        raise UserError(f"{where}: ${missing[0]} is missing, the text cannot be asked without it")
    return template


def load_wording(path: str | Path) -> Wording:
    """Read the YAML file. Raises UserError for a missing file, broken YAML, and a missing, unknown or wrong key."""
    file = locate(path)
    if not file.is_file():
        raise UserError(f"rationale.prompts={path}: no such file{looked_in(path)}")
    content: _WordingFile = validated(_WordingFile, read_yaml(file, "wording file"), f"{path}")
    judge = content.judge
    texts = {"fast": content.fast, "slow": content.slow, "judge.iqa": judge.iqa, "judge.iaa": judge.iaa}
    system = {name: text.system for name, text in texts.items()}
    user = {name: _user_text(text.user, name, f"{path}: {name}.user") for name, text in texts.items()}
    checks: Any = vars(content.checks)
    attributes = tuple(checks["attributes"][name] for name in EIGHT)
    return Wording(system, user, **{**checks, "attributes": attributes})
