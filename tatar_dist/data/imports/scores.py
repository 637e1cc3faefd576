"""Check and convert annotation columns: raw scores, spreads, votes, splits, texts.

`judge` converts the columns of one file to `ImportRows` and notes for every row that cannot be used the reason.
A number is a decimal number: no underscores, no other digits, no NaN or infinity; in JSON and Excel neither text nor
true or false.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np

from tatar_dist.data.imports.annotations import MISSING, Bad, RawFile, json_type
from tatar_dist.data.imports.attributes import in_order, is_text
from tatar_dist.data.imports.rows import ImportRows
from tatar_dist.data.registry import Range
from tatar_dist.errors import UserError

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_NUMBER_CHARACTERS = frozenset("0123456789+-.eE \t")
MOST_VOTES = 1e9  # per value; larger counts are rejected, so that sums stay exact


def to_score(raw: np.ndarray, scale: Range, lower_is_better: bool = False) -> np.ndarray:
    """Map (n,) raw values inside the declared range to (n,) scores on 0-100, linearly, flipped if lower is better."""
    above = scale.high - raw if lower_is_better else raw - scale.low
    return np.clip(above * scale.points, 0.0, 100.0)  # clip: the product may miss 100 by a rounding


def judge(file: RawFile) -> ImportRows:
    """Check every used column and convert it; rows that fail are in `bad`, each with its first fault."""
    fmt = file.format
    image = _texts(file, fmt.image)
    for column, kind in fmt.columns.items():
        if kind == "integer" and column in file.columns:
            _check_integers(file, column)
    if fmt.image_pattern != "{}":
        image = [fmt.image_pattern.replace("{}", name) for name in image]
    votes = _votes(file) if fmt.votes else None
    vote_values = list(fmt.votes.values())
    if fmt.score is not None:
        raw = _numbers(file, fmt.score)
        label = f"{file.label(fmt.score)}: "
    else:
        assert votes is not None  # the registry requires score or votes
        raw = _mean(votes, np.array(vote_values))
        label = "the mean of the votes, "
        for i in np.flatnonzero(np.isnan(raw)):
            file.reject(i, "no votes", "all vote counts are 0")
    outside = ~((raw >= fmt.range.low) & (raw <= fmt.range.high)) & ~np.isnan(raw)
    for i in np.flatnonzero(outside):
        file.reject(i, "out of range", f"{label}{raw[i]:.10g} is outside {fmt.range}, the range of format {fmt.name}")
    raw = np.where(outside, np.nan, raw)
    if fmt.worker:
        for i in np.flatnonzero((raw != np.floor(raw)) & ~np.isnan(raw)):
            file.reject(i, "wrong type", f"{label}{raw[i]:g} is no whole rating")
    rows = ImportRows(
        files=[file],
        image=image,
        path=image,
        raw=raw,
        score=to_score(raw, fmt.range, fmt.lower_is_better),
        std=_spread(file, votes),
        worker=_texts(file, fmt.worker) if fmt.worker else [""] * file.rows,
        group=list(image),
        split=_splits(file) if fmt.split else [""] * file.rows,
        rationale=list(_texts(file, fmt.rationale)) if fmt.rationale else [None] * file.rows,
        attributes=list(_attributes(file)) if fmt.attributes else [None] * file.rows,
        meta=[{} for _ in image] if votes is None else [{"counts": c} for c in counts_by_value(vote_values, votes)],
        bad=file.bad,
    )
    file.columns.clear()  # the text of a large file would stay in memory until the manifest is written
    return rows


def counts_by_value(values: Iterable[float], counts: np.ndarray) -> list[dict[str, int]]:
    """Return the member `counts` of each row's meta object. counts: (n, k) int64, of k values."""
    names = [f"{value:g}" for value in values]
    return [dict(zip(names, row, strict=True)) for row in counts.tolist()]


def _texts(file: RawFile, column: str) -> list[str]:
    """Return stripped, non-empty text; "" where the row is bad."""
    texts = []
    for i, value in enumerate(file.columns[column]):
        text = value.strip() if type(value) is str else ""
        if type(value) is not str:
            file.reject(i, *_wrong(file.label(column), value, "text"))
        elif not text:
            file.reject(i, "empty value", f"{file.label(column)} is empty")
        elif not is_text(text):
            file.reject(i, "wrong type", f"{file.label(column)}: {short(text)} holds half a character")
        texts.append(text)
    return texts


_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)


def _check_integers(file: RawFile, column: str) -> None:
    values = file.columns[column]
    digits = "".join(values)
    if digits.isascii() and digits.isdigit() and all(values):  # a column without a fault is checked at once
        return
    for i, value in enumerate(values):
        if not _INTEGER.fullmatch(value.strip()):
            file.reject(i, "wrong type", f"{file.label(column)}: {short(value)} is no whole number")


def _wrong(label: str, value: Any, wanted: str) -> Bad:
    if value is MISSING:
        return Bad("missing key", f"{label} is missing")
    if value is None:
        return Bad("empty value", f"{label} is empty")
    if isinstance(value, bool | int | float | str | list | dict):
        shown = f" ({short(value)})" if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
        return Bad("wrong type", f"{label} is {json_type(value)}{shown}, must be {wanted}")
    return Bad("wrong type", f"{label} is a {type(value).__name__} ({value}), must be {wanted}")


def short(value: Any) -> str:
    """Format a value for messages: one line, at most 60 characters, quoted if it is text."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "an integer of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "…"


def _numbers(file: RawFile, column: str) -> np.ndarray:
    """Return (n,) float64, NaN where the row is bad."""
    values = file.columns[column]
    written = file.kind in ("csv", "text")
    if written and _NUMBER_CHARACTERS.issuperset("".join(values)):  # a column without a fault is read at once
        with suppress(ValueError):
            numbers = np.array(list(map(float, values)))
            if np.isfinite(numbers).all():
                return numbers
    numbers = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        number = _number(file.label(column), value, written)
        if isinstance(number, Bad):
            file.reject(i, *number)
        else:
            numbers[i] = number
    return numbers


def _number(label: str, value: Any, written: bool) -> float | Bad:
    if written:
        text = value.strip()
        if not text:
            return Bad("empty value", f"{label} is empty")
        if not _NUMBER.fullmatch(text):
            special = text.lstrip("+-").casefold() in ("nan", "inf", "infinity", "na", "n/a", "null", "none")
            return Bad("not finite" if special else "wrong type", f"{label}: {short(text)} is no number")
        value = float(text)
    elif type(value) not in (int, float):
        return _wrong(label, value, "a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return Bad("not finite", f"{label}: {short(value)} is no finite number")
    return number


def _votes(file: RawFile) -> np.ndarray:
    fmt = file.format
    names = list(fmt.votes)
    counts = np.stack([_numbers(file, name) for name in names], axis=1)
    if fmt.votes_total:
        counts = counts * _numbers(file, fmt.votes_total)[:, None]  # shares of the total
    slack = 0.01 if fmt.votes_total else 0.0
    rounded = np.round(counts)
    with np.errstate(invalid="ignore"):
        wrong = ~((rounded >= 0) & (rounded <= MOST_VOTES) & (np.abs(counts - rounded) <= slack)) & ~np.isnan(counts)
    share = f" of {fmt.votes_total}" if fmt.votes_total else ""
    for i, k in zip(*np.nonzero(wrong), strict=True):
        file.reject(i, "wrong type", f"column {names[k]}{share} is {counts[i, k]:.10g}, which is no count of votes")
    usable = ~(wrong | np.isnan(counts)).any(axis=1)
    return np.where(usable[:, None], rounded, 0.0).astype(np.int64)


def _mean(votes: np.ndarray, values: np.ndarray) -> np.ndarray:
    total = votes.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (votes @ values) / total


def _spread(file: RawFile, votes: np.ndarray | None) -> np.ndarray:
    """Return (n,) standard deviations in points: from their own column, else from the votes.

    They are NaN without either, and for votes beside a score column, whose scale may differ from theirs.
    """
    fmt = file.format
    if fmt.std is not None:
        std, scale = _numbers(file, fmt.std.column), fmt.std.range
        most = scale.high - scale.low
        for i in np.flatnonzero(~((std >= 0) & (std <= most)) & ~np.isnan(std)):
            text = f"column {fmt.std.column}: {std[i]:.10g} is no standard deviation on {scale}"
            file.reject(i, "out of range", text)
        return std * scale.points
    if votes is None or fmt.score is not None:
        return np.full(file.rows, np.nan)
    values = np.array(list(fmt.votes.values()))
    mean = _mean(votes, values)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = (votes * (values[None, :] - mean[:, None]) ** 2).sum(axis=1) / votes.sum(axis=1)
    return np.sqrt(variance) * fmt.range.points


def _splits(file: RawFile) -> list[str]:
    split = file.format.split
    assert split is not None
    names = _texts(file, split.column)
    for i, name in enumerate(names):
        if name and name not in split.values:
            known = ", ".join(split.values)
            file.reject(i, "unknown split", f"column {split.column}: {short(name)} is none of {known}")
    return [split.values.get(name, "") for name in names]


def _attributes(file: RawFile) -> list[dict[str, str]]:
    column = file.format.attributes
    assert column is not None
    attributes: list[dict[str, str]] = [{} for _ in range(file.rows)]
    for i, value in enumerate(file.columns[column]):
        if not isinstance(value, dict):
            file.reject(i, *_wrong(file.label(column), value, "an object"))
            continue
        try:
            attributes[i] = in_order(value)
        except UserError as e:
            file.reject(i, "attributes", f"{file.label(column)}: {e}")
    return attributes
