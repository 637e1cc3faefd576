"""Check the entries of a YAML file one by one, with one-line errors.

Functions take a mapping, a key and its place, and return a value of the required type or raise `UserError` naming file,
place and nearest name. YAML reads `no` as false, `010` as 8 and `2024-01-01` as a date: a name or text of another YAML
type is rejected, with the advice to quote it, and never converted back to text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tatar_dist.config.validate import near, shown
from tatar_dist.errors import UserError


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
    """Printable text, not empty, without leading or trailing blanks."""
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
