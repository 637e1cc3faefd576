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
from typing import Any

from tatar_dist.assets import locate, looked_in
from tatar_dist.errors import UserError
from tatar_dist.prompts.answer import section
from tatar_dist.types import EIGHT, TASKS

QUESTIONS = {  # name -> blanks that its user text may hold, all but those in _OPTIONAL must stand there
    "fast": ("score",),
    "slow": ("score", "attributes"),
    "judge.iqa": ("score", "rationale"),
    "judge.iaa": ("score", "rationale", "attributes"),
}
_OPTIONAL = {"judge.iaa": ("attributes",)}
_LISTS = ("quality_factors", "refusals", "chat", "number_phrases", "ratings")


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


def _phrases(node: Any, where: str) -> re.Pattern[str]:
    if not isinstance(node, list) or not node or not all(isinstance(w, str) and w.strip(" *") for w in node):
        raise UserError(f"{where}: must be a list of words or phrases, at least one")
    for phrase in node:
        try:
            phrase_pattern([phrase])
        except re.error as e:
            raise UserError(f"{where}: {phrase!r}: write alternatives as (this|that): {e}") from None
    return phrase_pattern(node)


def _user_text(text: Any, question: str, where: str) -> Template:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: must be a text")
    template = Template(text.strip())
    if not template.is_valid():
        raise UserError(f"{where}: a $ that starts no name; write $$ for the sign itself")
    allowed, found = QUESTIONS[question], template.get_identifiers()
    if unknown := [name for name in found if name not in allowed]:
        raise UserError(f"{where}: unknown ${unknown[0]}; this text may use ${', $'.join(allowed)}")
    needed = [name for name in allowed if name not in _OPTIONAL.get(question, ())]
    if missing := [name for name in needed if name not in found]:
        raise UserError(f"{where}: ${missing[0]} is missing, the text cannot be asked without it")
    return template


def load_wording(path: str | Path) -> Wording:
    """Read the YAML file. Raises UserError for a missing file, broken YAML, and a missing, unknown or wrong key."""
    import yaml

    file = locate(path)
    if not file.is_file():
        raise UserError(f"rationale.prompts={path}: no such file{looked_in(path)}")
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    top = section(loaded, ("fast", "slow", "judge", "checks"), f"{path}")
    judge = section(top["judge"], TASKS, f"{path}: judge")
    nodes = {"fast": top["fast"], "slow": top["slow"], **{f"judge.{task}": judge[task] for task in TASKS}}
    system, user = {}, {}
    for name, node in nodes.items():
        texts = section(node, ("system", "user"), f"{path}: {name}")
        if not isinstance(texts["system"], str) or not texts["system"].strip():
            raise UserError(f"{path}: {name}.system: must be a text")
        system[name] = texts["system"].strip()
        user[name] = _user_text(texts["user"], name, f"{path}: {name}.user")
    checks = section(top["checks"], (*_LISTS, "attributes"), f"{path}: checks")
    attributes = section(checks["attributes"], EIGHT, f"{path}: checks.attributes")
    lists = {name: _phrases(checks[name], f"{path}: checks.{name}") for name in _LISTS}
    touched = tuple(_phrases(attributes[name], f"{path}: checks.attributes.{name}") for name in EIGHT)
    return Wording(system, user, attributes=touched, **lists)
