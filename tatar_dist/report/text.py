"""Clean and shorten texts of a model or a log for the page; the template escapes them."""

from __future__ import annotations

import re

TEASER_WORDS = 26
MOST_CHARS = 4000  # of one rationale

# What HTML forbids or a terminal obeys, except tab and newline.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_THINK = re.compile(r"<think>(.*?)(?:</think>|<answer>|$)", re.IGNORECASE | re.DOTALL)


def clean(text: str | None) -> str:
    """Remove control characters and truncate to MOST_CHARS."""
    text = _CONTROL.sub("", text or "").strip()
    return text if len(text) <= MOST_CHARS else text[:MOST_CHARS] + "…"


def rationale(completion: str | None) -> tuple[str, bool]:
    """Return (the think text, True), or (the whole completion, False) if it has none."""
    text = clean(completion)
    found = _THINK.search(text)
    inside = found.group(1).strip() if found else ""
    return (inside, True) if inside else (text, False)


def split_teaser(text: str) -> tuple[str, str]:
    """Split off the first words; the rest is "" if the text is hardly longer."""
    words = text.split()
    if len(words) <= TEASER_WORDS + 8:
        return " ".join(words), ""
    return " ".join(words[:TEASER_WORDS]), " ".join(words[TEASER_WORDS:])
