"""A reward term of the user's own: a function named by its dotted path in a preset.

    # my_rewards.py, importable where the run starts (PYTHONPATH, or an installed package)
    def brief(batch, answers, words=40):
        return (answers.think_words <= words).astype(float)

It is given the whole global batch (`rewards.batch.Batch` and `Answers`, N rows) and the preset's other keys as keyword
arguments, and returns N finite numbers. In a run `batch.rows` has tokens, their log-probabilities, the finish reason,
the manifest's meta and score_std (`batch_of_groups`); in `tatar-dist rewards` what the file has. An unparsed completion
gets 0 whatever the function says or, of a term that punishes, the value that lowers the reward most among the parsed
rows of its group (a group without one: of the batch), so that it is never the better one. A row of a task that the
preset does not list gets none. The function runs with the user's rights, so a preset that names one is code, to be
trusted like code.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tatar_dist.config.validate import validated
from tatar_dist.errors import UserError
from tatar_dist.rewards.batch import Answers, Batch
from tatar_dist.rewards.terms import Term


@dataclass(frozen=True, kw_only=True)
class CustomTerm(Term):
    """A user's function, its dotted path, and the constants it is called with."""

    path: str
    function: Callable[..., Any]
    constants: dict[str, Any]

    def values(self, batch: Batch, answers: Answers, index: np.ndarray) -> np.ndarray:
        """Return (len(index),) float64 of the rows `index`; for unparsed ones the worst, at best 0.

        Raises UserError if the function fails or returns anything but N numbers, finite where parsed.
        """
        try:
            values = np.asarray(self.function(batch, answers, **self.constants), np.float64)
        except Exception as e:  # whatever a user's code raises is theirs to read, in one line
            raise UserError(f"reward term {self.path} failed: {type(e).__name__}: {e}") from e
        if values.shape != (len(batch),):
            raise UserError(f"reward term {self.path} returned shape {values.shape}, expected ({len(batch)},)")
        wrong = np.flatnonzero(answers.parsed & ~np.isfinite(values))
        if len(wrong):
            value, row = values[wrong[0]], wrong[0] + 1
            raise UserError(f"reward term {self.path} returned {value} for row {row}: must be a finite number")
        parsed, group, sign = answers.parsed[index], batch.group[index], np.sign(self.weight)
        paid = np.where(parsed, sign * values[index], np.inf)
        worst = np.full(len(batch.group_ids), np.inf)
        np.minimum.at(worst, group, paid)
        worst = np.where(np.isinf(worst), paid.min(initial=0.0), np.minimum(worst, 0.0))
        return np.where(parsed, values[index], sign * worst[group])


def custom_term(body: dict[str, Any], where: str) -> CustomTerm:
    """Import a term's function, check its constants. Raises UserError, beginning with `where`."""
    shared = {key: body[key] for key in ("weight", "tasks") if key in body}
    constants = {key: value for key, value in body.items() if key not in ("weight", "tasks", "function")}
    path = str(body["function"])
    module, _, attribute = path.rpartition(".")
    if not module:
        raise UserError(f"{where}.function={path!r}: expected a dotted path such as my_rewards.brief")
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except Exception as e:  # importing runs the user's file, which may fail in any way
        reason = f"{type(e).__name__}: {e}"
        raise UserError(f"{where}.function={path}: {reason}; is its directory in PYTHONPATH?") from None
    if not callable(function):
        raise UserError(f"{where}.function={path}: module {module} has no function {attribute!r}")
    try:
        inspect.signature(function).bind(None, None, **constants)
    except TypeError as e:
        raise UserError(f"{where}: {path} cannot be called with (batch, answers, **constants): {e}") from None
    except ValueError:  # some compiled functions have no signature to look at
        pass
    return validated(CustomTerm, {**shared, "path": path, "function": function, "constants": constants}, where)
