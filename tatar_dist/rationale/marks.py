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
MAX_CHARS = 10_000  # a longer answer is not read


def schema(task: Task) -> dict[str, Any]:
    """JSON schema of an answer, in the strict form that OpenAI's and vLLM's structured outputs accept."""
    mark = {"type": "integer", "enum": list(range(LOWEST, HIGHEST + 1))}
    return {
        "type": "object",
        "properties": {name: dict(mark) for name in MARKS[task]},
        "required": list(MARKS[task]),
        "additionalProperties": False,
    }


class _NotAnAnswer(ValueError):
    """The text is not a valid answer; the message gives the reason."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _NotAnAnswer("a key stands twice")
    return found


def _constant(name: str) -> Any:
    raise _NotAnAnswer(f"{name} is no mark")


def read_marks(text: str, task: Task) -> dict[str, int] | Reason:
    """Marks by name in the schema's order, or a Reason with code "judge-json". Does not raise on any string."""
    if len(text) > MAX_CHARS:
        return Reason("judge-json", f"longer than {MAX_CHARS} characters")
    try:
        found = json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
        if not isinstance(found, dict):
            raise _NotAnAnswer("not a JSON object")
        wanted = MARKS[task]
        if set(found) != set(wanted):
            raise _NotAnAnswer(f"its keys are {sorted(found)[:5]}, they must be {sorted(wanted)}"[:200])
        for name in wanted:
            value = found[name]
            if type(value) is not int or not LOWEST <= value <= HIGHEST:  # a boolean is an int to isinstance
                raise _NotAnAnswer(f"{name} is no whole number from {LOWEST} to {HIGHEST}")
    except _NotAnAnswer as e:
        return Reason("judge-json", str(e))
    except (ValueError, RecursionError) as e:  # ValueError: not JSON, or an integer of thousands of digits
        return Reason("judge-json", f"not one JSON object: {str(e)[:100]}")
    return {name: found[name] for name in wanted}


def low_marks(marks: dict[str, int], reject_at: int) -> list[Reason]:
    """One reason for each mark that is `reject_at` or less."""
    return [
        Reason(f"low-{name}", f"the judge gave {name} {value} of {HIGHEST}, {reject_at} or less rejects")
        for name, value in marks.items()
        if value <= reject_at
    ]
