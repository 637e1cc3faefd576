"""Judge's marks: JSON schema, strict parser, and the marks that reject.

`read_marks` takes the judge's text and returns two whole numbers from 1 to 5, or a `Reason` why it cannot be parsed. It
accepts exactly one JSON object with exactly the schema's keys: no prose around it, no code fence, no repeated key, no
NaN, no mark that is a boolean, a fraction or a string. Nothing is guessed.
"""

from __future__ import annotations

import json
from typing import Any

from tatar_dist.rationale.checks import Reason
from tatar_dist.types import Task

MARKS: dict[Task, tuple[str, str]] = {
    "iqa": ("visual_fidelity", "score_consistency"),
    "iaa": ("groundedness", "cohesion"),
}
LOWEST, HIGHEST = 1, 5


def schema(task: Task) -> dict[str, Any]:
    """JSON schema of an answer, in the strict form that OpenAI's and vLLM's structured outputs accept."""
    mark = {"type": "integer", "enum": list(range(LOWEST, HIGHEST + 1))}
    return {
        "type": "object",
        "properties": {name: dict(mark) for name in MARKS[task]},
        "required": list(MARKS[task]),
        "additionalProperties": False,
    }


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def read_marks(text: str, task: Task) -> dict[str, int] | Reason:
    """Marks by name in the schema's order, or a Reason with code "judge-json". Does not raise on any string."""
    try:
        answer = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as e:  # ValueError: not JSON, or an integer of thousands of digits
        return Reason("judge-json", f"not one JSON object: {str(e)[:100]}")
    if not isinstance(answer, dict) or set(answer) != set(MARKS[task]):
        return Reason("judge-json", f"not an object with the keys {' and '.join(MARKS[task])}")
    for name in MARKS[task]:
        if type(answer[name]) is not int or not LOWEST <= answer[name] <= HIGHEST:  # isinstance takes a boolean, too
            return Reason("judge-json", f"{name} is no whole number from {LOWEST} to {HIGHEST}")
    return {name: answer[name] for name in MARKS[task]}


def low_marks(marks: dict[str, int], reject_at: int) -> list[Reason]:
    """One reason for each mark that is `reject_at` or less."""
    return [
        Reason(f"low-{name}", f"the judge gave {name} {value} of {HIGHEST}, {reject_at} or less rejects")
        for name, value in marks.items()
        if value <= reject_at
    ]
