"""Render prompts and parse answers; SFT, GRPO, evaluation and serving all use this module.

The wording comes from configs/prompts.yaml. `Prompts` makes chat messages, `answer_text` training targets, and `parse`
reads the score of a completion. The grammar of an answer (strict, the default):

    completion  = any text with exactly one <answer> and one </answer> tag, in this order, any ASCII case
    block       = <answer> blanks number blanks </answer>
    number      = [+-]?[0-9]+(\\.[0-9]+)?([eE][+-]?[0-9]+)?      ASCII digits, finite as a float64

A number outside 0-100 parses, keeps its raw value and is flagged `out_of_range`; rewards and metrics clamp it. Any
other text gives None, with a reason. `strict=False` also accepts a leading dot (`.5`), a trailing `%` or `/100`, code
fences around the number, and the last closed block if there are several. No value is infinite or guessed. Scanning is
linear in the text: tags are found one by one, and no pattern can backtrack over a choice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydantic.dataclasses

from tatar_dist.assets import locate
from tatar_dist.config.validate import STRICT_KEYS, Text, read_yaml, validated
from tatar_dist.errors import UserError
from tatar_dist.types import Task

SCORE_MIN, SCORE_MAX = 0.0, 100.0
MAX_CHARS = 1_000_000  # a longer completion is not parsed: a hard bound on the work per text

# re.ASCII matters under IGNORECASE: without it U+017F matches "s" and U+212A matches "k".
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE | re.ASCII)
_THINK_TAG = re.compile(r"<(/?)think>", re.IGNORECASE | re.ASCII)
_ANY_TAG = re.compile(r"</?(?:think|answer)>|<\|im_(?:start|end)\|>", re.IGNORECASE | re.ASCII)
_STRICT = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LENIENT = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_FENCE_OPEN = re.compile(r"```[A-Za-z]*")
DIRECT = "<answer>"  # start of an answer without a thought
_BLANKS = " \t\r\n\f\v"
_END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class Parsed:
    """Score of a completion. value: raw number, None if it does not parse (`reason` states why)."""

    value: float | None
    out_of_range: bool = False
    reason: str | None = None


def _body(text: str) -> str:
    """Strip blanks and end-of-turn tokens from the end of the text."""
    end = len(text)  # an index, not a shorter copy per token: thousands of end tokens would make that quadratic
    while True:
        while end and text[end - 1].isspace():
            end -= 1
        if not text.endswith(_END_OF_TURN, 0, end):
            return text[:end]
        end -= len(_END_OF_TURN)


def _answer_content(text: str, strict: bool) -> tuple[str | None, str | None]:
    """Return (content of the answer block, None) or (None, reason)."""
    opened: int | None = None
    content: str | None = None
    opens = closes = 0
    for tag in _ANSWER_TAG.finditer(text):
        if tag.group(1):
            closes += 1
            if opened is not None:
                content, opened = text[opened : tag.start()], None
        else:
            opens += 1
            opened = tag.end()
    if content is None:
        if not opens:
            return None, "no <answer>"
        return None, "<answer> is not closed" if opened is not None else "</answer> stands before <answer>"
    if strict and (opens != 1 or closes != 1):
        return None, f"{opens} <answer> and {closes} </answer> tags, expected one of each"
    return content, None


def _unwrapped(content: str) -> str:
    """Strip code fences and a trailing `%` or `/100` from the content (lenient only)."""
    content = content.strip(_BLANKS)
    if content.startswith("```"):
        content = _FENCE_OPEN.sub("", content, count=1)
    content = content.removesuffix("```").strip(_BLANKS + "`")
    if content.endswith("%"):
        return content[:-1].rstrip(_BLANKS)
    if content.endswith("100"):
        before = content[:-3].rstrip(_BLANKS)
        if before.endswith("/"):
            return before[:-1].rstrip(_BLANKS)
    return content


def parse(text: str, strict: bool = True) -> Parsed:
    """Read the score of a completion by the grammar in the module docstring.

    Never raises on any string. A trailing `<|im_end|>` makes no difference.
    """
    if len(text) > MAX_CHARS:
        return Parsed(None, reason=f"longer than {MAX_CHARS} characters")
    content, reason = _answer_content(_body(text), strict)
    if content is None:
        return Parsed(None, reason=reason)
    number = content.strip(_BLANKS) if strict else _unwrapped(content)
    if (_STRICT if strict else _LENIENT).fullmatch(number) is None:
        return Parsed(None, reason="the answer is not a bare number")
    value = float(number)
    if not math.isfinite(value):
        return Parsed(None, reason="the number is not finite")
    return Parsed(value, out_of_range=not SCORE_MIN <= value <= SCORE_MAX)


def clamped(value: float | None) -> float | None:
    """Clamp a parsed number to 0-100; None stays None."""
    return None if value is None else min(max(value, SCORE_MIN), SCORE_MAX)


def answer_start(text: str) -> tuple[int, str] | None:
    """Return (offset of the answer's number in `text`, number as written), None if unparsed."""
    if parse(text).value is None:
        return None
    tag = next(t for t in _ANSWER_TAG.finditer(text) if not t.group(1))  # strict: the only one
    number = _STRICT.search(text, tag.end())  # only blanks stand before it
    assert number is not None  # it has parsed
    return number.start(), number.group()


def think_text(text: str) -> str:
    """Return the text inside the <think> blocks, joined by a blank; "" if there is none.

    Every closed block counts, so that words cannot hide in a second one. A block that is never closed runs to the
    answer, or to the end: a completion cut off while thinking counts in full.
    """
    text = _body(text[:MAX_CHARS])
    parts: list[str] = []
    opened: int | None = None
    for tag in _THINK_TAG.finditer(text):
        if not tag.group(1):
            opened = tag.end() if opened is None else opened
        elif opened is not None:
            parts.append(text[opened : tag.start()])
            opened = None
    if opened is not None:
        answer = _ANSWER_TAG.search(text, opened)
        parts.append(text[opened : answer.start() if answer else len(text)])
    return " ".join(parts)


def think_words(text: str) -> int:
    """Count whitespace tokens inside <think>, as the length budgets do."""
    return len(think_text(text).split())


def answer_text(rationale: str | None, score: float) -> str:
    """Return the target `<think>…</think><answer>57.30</answer>`; think only with a rationale.

    Raises:
        UserError: a score that is not in 0-100, or a rationale that holds a tag of the format.
    """
    if not (math.isfinite(score) and SCORE_MIN <= score <= SCORE_MAX):
        raise UserError(f"score {score}: a training target must lie in 0-100")
    answer = f"{DIRECT}{abs(score):.2f}</answer>"  # abs: -0.0 would print a sign
    if rationale is None:
        return answer
    tag = _ANY_TAG.search(rationale)
    if tag is not None:
        raise UserError(f"a rationale holds {tag.group(0)!r}, which only the answer format may use: {rationale[:60]!r}")
    return f"<think>{rationale.strip()}</think>{answer}"


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT_KEYS)
class _TaskTexts:
    iqa: Text
    iaa: Text


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT_KEYS)
class _PromptFile:
    system: Text
    user: _TaskTexts


@dataclass(frozen=True)
class Prompts:
    """Wording of the system message and of each task's user message."""

    system: str
    user: dict[str, str]

    @staticmethod
    def load(path: str | Path) -> Prompts:
        """Read `configs/prompts.yaml`. Raises UserError for no file, a missing or an unknown key."""
        texts: _PromptFile = validated(_PromptFile, read_yaml(locate(path), "prompt file"), f"{path}")
        return Prompts(texts.system, asdict(texts.user))

    def to_yaml(self) -> str:
        """Return the texts as YAML that `load` and any YAML library can read, without comments."""
        import yaml

        return yaml.safe_dump({"system": self.system, "user": self.user}, allow_unicode=True, sort_keys=False)

    def messages(self, task: Task) -> list[dict[str, Any]]:
        """Return a prompt's chat messages; the image, `{"type": "image"}`, precedes the user text."""
        return [
            {"role": "system", "content": [{"type": "text", "text": self.system}]},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.user[task]}]},
        ]

    def render(self, task: Task, chat_template_fn: Callable[[list[dict[str, Any]]], str]) -> str:
        """Return the prompt that `chat_template_fn` (a processor's template) makes of the messages."""
        return chat_template_fn(self.messages(task))
