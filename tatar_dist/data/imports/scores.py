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

_NUMBER = re.compile(r"[+-]?((\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?|nan|inf(inity)?)", re.ASCII | re.IGNORECASE)
_NUMBER_CHARACTERS = frozenset("0123456789+-.eE \t")
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
MOST_VOTES = 1e9  # per value; larger counts are rejected, so that sums stay exact


def to_score(raw: np.ndarray, scale: Range, lower_is_better: bool = False) -> np.ndarray:
    """Map (n,) raw values inside the declared range to (n,) scores on 0-100, linearly, flipped if lower is better."""
    above = scale.high - raw if lower_is_better else raw - scale.low
    return np.clip(above * scale.points, 0.0, 100.0)  # clip: the product may miss 100 by a rounding


def judge(file: RawFile) -> ImportRows:
    """Check every used column and convert it; rows that fail are in `bad`, each with its first fault."""
    fmt, n = file.format, len(file)
    image = _texts(file, fmt.image)
    for column, kind in zip(fmt.columns, fmt.types or (), strict=False):
        if kind == "integer" and column in file.columns:
            _check_integers(file, column)
    image = [fmt.image_pattern.replace("{}", name) for name in image]
    meta: list[dict[str, Any]] = [{} for _ in image]
    std = np.full(n, np.nan)
    if fmt.votes:
        values = np.array([value for _, value in fmt.votes])
        votes = _votes(file)
        meta = [{"counts": counts} for counts in counts_by_value(values, votes)]
    if fmt.score is not None:
        raw = _numbers(file, fmt.score)
        label = f"{file.label(fmt.score)}: "
    else:  # the registry requires score or votes
        with np.errstate(invalid="ignore", divide="ignore"):
            raw = (votes @ values) / votes.sum(axis=1)
            variance = (votes * (values - raw[:, None]) ** 2).sum(axis=1) / votes.sum(axis=1)
        std = np.sqrt(variance) * fmt.range.points
        label = "the mean of the votes, "
        for i in np.flatnonzero(np.isnan(raw)):
            file.reject(i, "no votes", "all vote counts are 0")
    outside = (raw < fmt.range.low) | (raw > fmt.range.high)  # not for NaN, whose row is bad already
    for i in np.flatnonzero(outside):
        file.reject(i, "out of range", f"{label}{raw[i]:.10g} is outside {fmt.range}, the range of format {fmt.name}")
    raw = np.where(outside, np.nan, raw)
    if fmt.worker:
        for i in np.flatnonzero((raw != np.floor(raw)) & ~np.isnan(raw)):
            file.reject(i, "wrong type", f"{label}{raw[i]:g} is no whole rating")
    rows = ImportRows(
        files=[file],
        at=file.at,
        image=image,
        path=image,
        raw=raw,
        score=to_score(raw, fmt.range, fmt.lower_is_better),
        std=_deviations(file) if fmt.std else std,
        worker=_texts(file, fmt.worker) if fmt.worker else [""] * n,
        group=list(image),
        split=_splits(file) if fmt.split else [""] * n,
        rationale=list(_texts(file, fmt.rationale)) if fmt.rationale else [None] * n,
        attributes=list(_attributes(file, fmt.attributes)) if fmt.attributes else [None] * n,
        meta=meta,
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
            file.reject(i, "wrong type", f"{file.label(column)}: {_short(text)} holds half a character")
        texts.append(text)
    return texts


def _check_integers(file: RawFile, column: str) -> None:
    values = file.columns[column]
    digits = "".join(values)
    if digits.isascii() and digits.isdigit() and all(values):  # a column without a fault is checked at once
        return
    for i, value in enumerate(values):
        if not _INTEGER.fullmatch(value.strip()):
            file.reject(i, "wrong type", f"{file.label(column)}: {_short(value)} is no whole number")


def _wrong(label: str, value: Any, wanted: str) -> Bad:
    if value is MISSING:
        return Bad("missing key", f"{label} is missing")
    if value is None:
        return Bad("empty value", f"{label} is empty")
    if isinstance(value, Bad):  # an object with a repeated key
        return value
    shown = "" if isinstance(value, bool | list | dict) else f" ({_short(value)})"
    return Bad("wrong type", f"{label} is {json_type(value)}{shown}, must be {wanted}")


def _short(value: Any) -> str:
    """Format a value for messages: one line, at most 60 characters, quoted if it is text."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _numbers(file: RawFile, column: str) -> np.ndarray:
    """Return (n,) float64, NaN where the row is bad."""
    values, label = file.columns[column], file.label(column)
    written = file.kind in ("csv", "text")
    if written and _NUMBER_CHARACTERS.issuperset("".join(values)):  # a column without a fault is read at once
        with suppress(ValueError):
            numbers = np.array(list(map(float, values)))
            if np.isfinite(numbers).all():
                return numbers
    numbers = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        text = value.strip() if written else value
        if text == "":
            file.reject(i, "empty value", f"{label} is empty")
        elif written and not _NUMBER.fullmatch(text):
            file.reject(i, "wrong type", f"{label}: {_short(text)} is no number")
        elif not written and type(value) not in (int, float):
            file.reject(i, *_wrong(label, value, "a number"))
        else:
            with suppress(OverflowError):  # an integer of hundreds of digits
                numbers[i] = float(text)
            if not math.isfinite(numbers[i]):
                file.reject(i, "not finite", f"{label}: {_short(value)} is no finite number")
                numbers[i] = np.nan
    return numbers


def _votes(file: RawFile) -> np.ndarray:
    """Return (n, k) int64 votes for each of k values; 0 where the row is bad."""
    fmt = file.format
    names = [name for name, _ in fmt.votes]
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


def _deviations(file: RawFile) -> np.ndarray:
    """Return (n,) standard deviations in points, from their own column."""
    column, scale = file.format.std, file.format.std_range
    assert column is not None and scale is not None
    std = _numbers(file, column)
    for i in np.flatnonzero((std < 0) | (std > scale.high - scale.low)):
        file.reject(i, "out of range", f"column {column}: {std[i]:.10g} is no standard deviation on {scale}")
    return std * scale.points


def _splits(file: RawFile) -> list[str]:
    column, known = file.format.split, file.format.split_values
    assert column is not None and known is not None
    names = _texts(file, column)
    for i, name in enumerate(names):
        if name and name not in known:
            file.reject(i, "unknown split", f"column {column}: {_short(name)} is none of {', '.join(known)}")
    return [known.get(name, "") for name in names]


def _attributes(file: RawFile, column: str) -> list[dict[str, str]]:
    attributes: list[dict[str, str]] = [{} for _ in range(len(file))]
    for i, value in enumerate(file.columns[column]):
        if not isinstance(value, dict):
            file.reject(i, *_wrong(file.label(column), value, "an object"))
            continue
        try:
            attributes[i] = in_order(value.items())
        except UserError as e:
            file.reject(i, "attributes", f"{file.label(column)}: {e}")
    return attributes
