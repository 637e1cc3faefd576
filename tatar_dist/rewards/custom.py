"""A reward term of the user's own: a function named by its dotted path in a preset.

    # my_rewards.py, importable where the run starts (PYTHONPATH, or an installed package)
    def brief(batch, answers, words=40):
        return (answers.think_words <= words).astype(float)

It is given the whole global batch (`rewards.batch.Batch` and `Answers`, N rows) and the preset's other keys as keyword
arguments, and returns N finite numbers. As with every term, an unparsed completion gets 0 whatever the function says,
and a row of a task that the preset does not list gets none. The function runs with the user's rights, so a preset that
names one is code, to be trusted like code.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tatar_dist.errors import UserError
from tatar_dist.rewards.batch import Answers, Batch


@dataclass(frozen=True)
class CustomTerm:
    """A user's term: its name, the function's dotted path, and the constants it is called with."""

    name: str
    path: str
    constants: dict[str, Any]

    def with_constant(self, key: str, value: Any) -> CustomTerm:
        return replace(self, constants={**self.constants, key: value})

    def values(self, batch: Batch, answers: Answers) -> np.ndarray:
        """(N,) float64, 0 where unparsed. Raises UserError when the function fails or returns anything else."""
        try:
            values = np.asarray(_function(self.name, self.path)(batch, answers, **self.constants), np.float64)
        except UserError:
            raise
        except Exception as e:  # whatever a user's code raises is theirs to read, in one line
            raise UserError(f"reward term {self.name} ({self.path}) failed: {type(e).__name__}: {e}") from e
        if values.shape != (len(batch),):
            raise UserError(
                f"reward term {self.name} ({self.path}) returned shape {values.shape}, expected ({len(batch)},)"
            )
        wrong = np.flatnonzero(answers.parsed & ~np.isfinite(values))
        if len(wrong):
            raise UserError(
                f"reward term {self.name} ({self.path}) returned {values[wrong[0]]} for row {wrong[0] + 1}: "
                "must be a finite number"
            )
        return np.where(answers.parsed, values, 0.0)


def custom_term(name: str, path: Any, constants: Mapping[str, Any], taken: tuple[str, ...]) -> CustomTerm:
    """A checked term: the function can be imported and takes these constants. Raises UserError otherwise."""
    if name in taken:
        raise UserError(f"terms.{name}: the name is taken, call a term of your own something else")
    if not str(name).isidentifier():  # it becomes a column and a part of metric names
        raise UserError(f"terms.{name}: a term's name may hold only letters, digits and _, and not start with a digit")
    function = _function(name, path)
    try:
        inspect.signature(function).bind(None, None, **constants)
    except TypeError as e:
        raise UserError(f"terms.{name}: {path} cannot be called with (batch, answers, **constants): {e}") from None
    except ValueError:  # some compiled functions have no signature to look at
        pass
    return CustomTerm(name, path, dict(constants))


def _function(name: str, path: Any) -> Callable[..., Any]:
    module, _, attribute = str(path).rpartition(".")
    if not isinstance(path, str) or not module:
        raise UserError(f"terms.{name}.function={path!r}: expected a dotted path such as my_rewards.brief")
    try:
        function = getattr(importlib.import_module(module), attribute, None)
    except Exception as e:  # importing runs the user's file, which may fail in any way
        where = f"{type(e).__name__}: {e}"
        raise UserError(f"terms.{name}.function={path}: {where}; is its directory in PYTHONPATH?") from None
    if not callable(function):
        raise UserError(f"terms.{name}.function={path}: module {module} has no function {attribute!r}")
    return function
