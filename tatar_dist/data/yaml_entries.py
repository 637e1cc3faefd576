"""Read a YAML file and its entries, one by one, with one-line errors.

Functions take a mapping, a key and its place, and return a value of the required type or raise `UserError` naming file,
place and nearest name. YAML reads `no` as false, `010` as 8 and `2024-01-01` as a date: a name or text of another YAML
type is rejected, with the advice to quote it, and never converted back to text.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tatar_dist.assets import looked_in
from tatar_dist.errors import UserError

_SHORT = reprlib.Repr()  # a value may hold itself, or a thousand copies of itself
_SHORT.maxstring = _SHORT.maxother = 60


KNOWN = 30  # names that a message lists


def _cut(name: str, most: int = 40) -> str:
    """Shorten a name from a file for a message."""
    return name if len(name) <= most else name[: most - 1] + "…"


def shown(value: Any) -> str:
    """Format a value for messages: one line of bounded length."""
    return _SHORT.repr(value)


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that rejects repeated keys (the second would win silently) and integers beyond 64 bits."""

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
    """Read the file's mapping; `what` names it in messages. Raises UserError: cannot be read, not UTF-8, not YAML."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as e:
        where = looked_in(path) if isinstance(e, FileNotFoundError) else ""
        raise UserError(f"{path}: cannot read the {what}: {e.strerror or e}{where}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the {what} is not UTF-8") from None
    except Exception as e:  # a value that its tag does not fit raises whatever PyYAML's constructors meet first
        raise UserError(f"{path}: not YAML: {' '.join(str(e).split()) or type(e).__name__}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a {what} must be a mapping of keys to values")
    return tree


def near(name: Any, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known name, or the known names."""
    known = list(known)
    found = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5) if isinstance(name, str | int) else []
    if found:
        return f", did you mean {_cut(found[0])}?"
    names = [_cut(k) for k in known]
    return f" (known: {', '.join(names[:KNOWN])}{', …' if len(names) > KNOWN else ''})"


def only_keys(entry: Any, known: Sequence[str], where: str) -> None:
    """Raise UserError unless `entry` is a mapping with keys of `known`."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be a mapping with keys among {', '.join(known)}")
    for key in entry:
        if key not in known:
            raise UserError(f"{where}: unknown key {shown(key)}{near(key, known)}")


def need(entry: Mapping[str, Any], key: str, where: str) -> Any:
    """Return the key's value. Raises UserError if it is missing or null."""
    if entry.get(key) is None:
        raise UserError(f"{where}: key {key} is missing")
    return entry[key]


def mapping(entry: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return a mapping whose keys are names; empty if the key is absent."""
    value = entry.get(key, {})
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key} must be a mapping, is {shown(value)}")
    for each in value:
        name(each, f"{where}: {key}: key")
    return value


def names(value: Any, where: str) -> tuple[str, ...]:
    """Return a list of names without repeats, as a tuple."""
    if not isinstance(value, list):
        raise UserError(f"{where} must be a list of names, is {shown(value)}")
    found = tuple(name(v, where) for v in value)
    if len(set(found)) < len(found):
        raise UserError(f"{where} must be names, none of them twice")
    return found


def text(value: Any, where: str) -> str:
    """Text that is not empty."""
    if not isinstance(value, str):
        raise UserError(f"{where} must be text, is {shown(value)} for YAML; put it in quotes")
    if not value.strip():
        raise UserError(f"{where} is empty")
    return value


def name(value: Any, where: str) -> str:
    """Text of one line without blanks at its ends."""
    if text(value, where) != value.strip() or not value.isprintable():
        raise UserError(f"{where}: {shown(value)} is no name: it has blanks at an end or does not print")
    return value


def flag(value: Any, where: str) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{where} must be true or false, is {shown(value)}")
    return value


def choice(value: Any, allowed: Sequence[str], where: str) -> str:
    """One of `allowed`."""
    if value not in allowed:
        raise UserError(f"{where} is {shown(value)}, must be one of {', '.join(map(repr, allowed))}")
    return value


def number(value: Any, where: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where} must be a number, is {shown(value)}")
    return float(value)


def whole(value: Any, least: int, where: str) -> int:
    """A whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{where} must be a whole number from {least} on, is {shown(value)}")
    return value
