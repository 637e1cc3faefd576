"""Texts of a model or a log, made fit for a page. In: whatever they wrote. Out: text, which the template escapes."""

from __future__ import annotations

import re

TEASER_WORDS = 26
MOST_CHARS = 4000  # of one rationale

# What HTML forbids or a terminal obeys, except tab and newline.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_THINK = re.compile(r"<think>(.*?)(?:</think>|<answer>|$)", re.IGNORECASE | re.DOTALL)


def clean(text: str | None) -> str:
    """Text without control characters, at most MOST_CHARS long."""
    text = _CONTROL.sub("", text or "").strip()
    return text if len(text) <= MOST_CHARS else text[:MOST_CHARS] + "…"


def rationale(completion: str | None) -> tuple[str, bool]:
    """(the think text, True), or (the whole completion, False) when it has none."""
    text = clean(completion)
    found = _THINK.search(text)
    inside = found.group(1).strip() if found else ""
    return (inside, True) if inside else (text, False)


def split_teaser(text: str) -> tuple[str, str]:
    """The first words, and the rest ("" when it is hardly longer)."""
    words = text.split()
    if len(words) <= TEASER_WORDS + 8:
        return " ".join(words), ""
    return " ".join(words[:TEASER_WORDS]), " ".join(words[TEASER_WORDS:])
