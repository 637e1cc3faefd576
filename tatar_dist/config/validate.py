"""Read YAML files and validate them against pydantic types; each fault is one line.

The config, reward presets, the registry of data sets, prompt files and cost files are read here, so that all of them
name the file, the key path, what is wrong, the value and the nearest valid key in the same words.
"""

from __future__ import annotations

import difflib
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import yaml
from annotated_types import Ge, Gt
from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from tatar_dist.assets import looked_in
from tatar_dist.errors import UserError

STRICT_KEYS = ConfigDict(extra="forbid", coerce_numbers_to_str=True)  # of every section of the config


def _no_bool(value: Any) -> Any:
    """Refuse `true`, which pydantic reads as 1; quoted numbers and 8e9, text in YAML, pass."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, is {value}")
    return value


Int = Annotated[int, BeforeValidator(_no_bool)]
Float = Annotated[float, BeforeValidator(_no_bool)]
AtLeastZero = Annotated[Int, Ge(0)]
AtLeastOne = Annotated[Int, Ge(1)]
NotNegative = Annotated[Float, Ge(0)]  # NaN is refused by a range, too
AboveZero = Annotated[Float, Gt(0)]
Finite = Annotated[Float, Field(allow_inf_nan=False)]
Text = Annotated[str, StringConstraints(strict=True, strip_whitespace=True, min_length=1)]


@dataclass(frozen=True)
class Why:
    """Note on an annotated type, ending messages on its values: why it has limits, or a remedy."""

    text: str


_SHORT = reprlib.Repr()  # a value may hold itself, or a thousand copies of itself
_SHORT.maxstring = _SHORT.maxother = 60
_PATHS = reprlib.Repr()
_PATHS.maxstring = 300  # keys may be of any length, and hold line ends
_LISTED = 30  # names that a message lists


def shown(value: Any) -> str:
    """Format a value for messages: one line of bounded length."""
    return _SHORT.repr(value)


def near(name: Any, known: Iterable[str]) -> str:
    """Return the end of a message on an unknown name: the nearest known name or the known ones."""
    names = [str(k) if len(str(k)) <= 40 else f"{str(k)[:39]}…" for k in known]
    close = difflib.get_close_matches(str(name)[:60], names, n=1, cutoff=0.5) if isinstance(name, str | int) else []
    if close:
        return f"; did you mean {close[0]!r}?"
    return f" (known: {', '.join(names[:_LISTED])}{', …' if len(names) > _LISTED else ''})"


class _Loader(yaml.SafeLoader):
    """Safe YAML loader; rejects repeated keys (else the last wins) and integers beyond 64 bits."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) >= 1 << 63:
            raise yaml.MarkedYAMLError(problem="the number is too large", problem_mark=node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read a file's mapping; `what` names it. Raises UserError: unreadable, not UTF-8, not YAML."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as e:
        where = looked_in(path) if isinstance(e, FileNotFoundError) else ""
        raise UserError(f"{path}: cannot read the {what}: {e.strerror or e}{where}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the {what} is not UTF-8") from None
    except Exception as e:  # a value that its tag does not fit raises whatever PyYAML's constructors meet first
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split()) or type(e).__name__}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a {what} must be a mapping of keys to values")
    return tree


def validated(schema: Any, tree: Any, where: str) -> Any:
    """Return `tree` as a `schema`. Raises UserError: `where` and the `fault` of the first error."""
    try:
        return TypeAdapter(schema).validate_python(tree)
    except ValidationError as e:
        raise UserError(f"{where}: {fault(first(e), schema)}") from None


def first(errors: ValidationError) -> Mapping[str, Any]:
    """Return the error to report: an unknown key explains a missing one, so it comes first."""
    return min(errors.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")


def fault(error: Mapping[str, Any], schema: Any) -> str:
    """Return one line on pydantic's `error`: key path below `schema`, value, problem, its `Why`."""
    kind, ctx, loc = error["type"], error.get("ctx", {}), error["loc"]
    path = _PATHS.repr(".".join(str(part) for part in loc if part != "[key]"))[1:-1]
    if kind == "unexpected_keyword_argument":
        section, _ = at(schema, loc[:-1])
        return f"unknown key {shown(path)}{near(loc[-1], typing.get_type_hints(section))}"
    if kind == "missing":
        return f"missing key {path!r}"
    if kind == "value_error":  # of a validator of ours
        return f"{path}: {ctx['error']}"
    if kind == "greater_than_equal" and ctx["ge"] == 0:
        problem = "must not be negative"
    elif kind == "literal_error":
        problem = "must be one of " + ctx["expected"].replace(" or ", ", ").replace("'", "")
    elif kind in _PROBLEMS:
        problem = _PROBLEMS[kind].format(**ctx)
    else:
        problem = error["msg"].replace("Input should", "must").split(", unable")[0]
    given = (
        path if loc[-1:] == ("[key]",) else f"{path}={shown(error['input'])}"
    )  # [key]: the last key of the path is wrong
    _, why = at(schema, loc)
    return f"{given}: {problem}" + (f"; {why}" if why else "")


_PROBLEMS = {  # pydantic's type of an error -> our words
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be above {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "dataclass_type": "must be a mapping of keys to values",
    "dict_type": "must be a mapping of keys to values",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "string_type": "must be text; put it in quotes",
    "string_too_short": "must be a text that is not empty",
    "too_short": "must hold at least {min_length} values",
    "too_long": "must hold at most {max_length} values",
}


def at(schema: Any, loc: Sequence[int | str], why: str = "") -> tuple[Any, str]:
    """Return the type at `loc` below `schema` or None, and the innermost `Why` on the way or ""."""
    while typing.get_origin(schema) in (Annotated, Union, types.UnionType):
        why = next((note.text for note in getattr(schema, "__metadata__", ()) if isinstance(note, Why)), why)
        schema = next(part for part in typing.get_args(schema) if part is not type(None))
    if not loc:
        return schema, why
    if is_dataclass(schema):
        return at(typing.get_type_hints(schema, include_extras=True).get(str(loc[0])), loc[1:], why)
    inner = typing.get_args(schema)  # of a mapping its values, of a list its items
    return at(inner[-1 if len(inner) == 2 and inner[1] is not ... else 0], loc[1:], why) if inner else (None, why)
