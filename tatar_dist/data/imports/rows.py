"""Rows of an import: converted and checked columns of annotation files; checks between rows.

`judge` converts the columns of one file to rows and notes for every row that cannot be used the reason; `check_paths`,
`read_names` and `check_duplicates` mark further rows as bad, each with its first fault. A number is a decimal number:
no underscores, no other digits, no NaN or infinity; in JSON and Excel neither text nor true or false.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from tatar_dist.data.imports.annotations import MISSING, Bad, RawFile, json_type
from tatar_dist.data.imports.attributes import in_order, is_text
from tatar_dist.data.imports.folder import ImageFolder, path_fault
from tatar_dist.data.registry import Dataset, Range
from tatar_dist.errors import UserError

_NUMBER = re.compile(r"[+-]?((\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?|nan|inf(inity)?)", re.ASCII | re.IGNORECASE)
_NUMBER_CHARACTERS = frozenset("0123456789+-.eE \t")
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
SHARES_OFF = 0.03  # five shares of two decimals may sum to 1.025
VOTES_OFF = 20.0  # points of 100: KonIQ's standardised scores differ from the votes' means by a few
MOST_VOTES = 1e9  # per value; larger counts are rejected, so that sums stay exact


@dataclass(slots=True)
class Row:
    """A row of an annotation file: an image with its score, or one rating of it."""

    at: str  # FILE:LINE
    image: str  # as the file names it
    path: str  # of the image file, relative to --images
    raw: float  # NaN if the row is bad
    score: float
    std: float  # in points; NaN where the file has none
    worker: str
    group: str  # what must not cross splits: the image, or its reference image
    split: str
    rationale: str | None
    attributes: dict[str, str] | None
    meta: dict[str, Any]
    bad: Bad | None

    def reject(self, reason: str, text: str) -> None:
        """Mark the row as bad, unless it is already."""
        self.bad = self.bad or Bad(reason, text)


def to_score(raw: np.ndarray, scale: Range, lower_is_better: bool = False) -> np.ndarray:
    """Map (n,) raw values in range linearly to (n,) scores 0-100, flipped if lower is better."""
    above = scale.high - raw if lower_is_better else raw - scale.low
    return np.clip(above * scale.points, 0.0, 100.0)  # clip: the product may miss 100 by a rounding


def judge(file: RawFile) -> list[Row]:
    """Check and convert all used columns; each row that fails has its first fault in `bad`."""
    fmt, n = file.format, len(file)
    image = _texts(file, fmt.image)
    for column, kind in fmt.columns.items():
        if kind == "integer" and column in file.columns:
            _check_integers(file, column)
    image = [fmt.image_pattern.replace("{}", name) for name in image]
    meta: list[dict[str, Any]] = [{} for _ in image]
    std = np.full(n, np.nan)
    if fmt.votes:
        values = np.array(list(fmt.votes.values()))
        votes = _votes(file)
        names = [f"{value:g}" for value in values]
        meta = [{"counts": dict(zip(names, counts, strict=True))} for counts in votes.tolist()]
    if fmt.score is not None:
        raw = _numbers(file, fmt.score)
        if fmt.votes:
            _check_agreement(file, raw, votes, values)
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
    columns: dict[str, Sequence[Any]] = {
        "at": file.at,
        "image": image,
        "path": image,
        "raw": raw.tolist(),
        "score": to_score(raw, fmt.range, fmt.lower_is_better).tolist(),
        "std": (_deviations(file) if fmt.std else std).tolist(),
        "worker": _texts(file, fmt.worker) if fmt.worker else [""] * n,
        "group": image,
        "split": _splits(file) if fmt.split else [""] * n,
        "rationale": _texts(file, fmt.rationale) if fmt.rationale else [None] * n,
        "attributes": _attributes(file, fmt.attributes) if fmt.attributes else [None] * n,
        "meta": meta,
    }
    columns["bad"] = [file.bad.get(i) for i in range(n)]
    file.columns.clear()  # the text of a large file would stay in memory until the manifest is written
    return [Row(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


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
    names = list(fmt.votes)
    counts = np.stack([_numbers(file, name) for name in names], axis=1)
    if fmt.votes_total:
        sums = counts.sum(axis=1)
        for i in np.flatnonzero(np.abs(sums - 1) > SHARES_OFF):
            file.reject(
                i,
                "no shares",
                f"columns {names[0]} to {names[-1]} sum to {sums[i]:.6g}; format {fmt.name} takes shares of "
                f"{fmt.votes_total}, which sum to 1: are they counts, of another format of the set?",
            )
            counts[i] = np.nan
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


def _check_agreement(file: RawFile, raw: np.ndarray, votes: np.ndarray, values: np.ndarray) -> None:
    """Raise UserError if the scores are at odds with the votes' means, both mapped to 0 to 100.

    Published scores may be standardised by rater, which moves a mean by some points, so a file's median counts.
    """
    fmt, low, high = file.format, values.min(), values.max()
    with np.errstate(invalid="ignore", divide="ignore"):
        means = 100 * ((votes @ values) / votes.sum(axis=1) - low) / (high - low)
    apart = np.abs(to_score(raw, fmt.range, fmt.lower_is_better) - means)
    if np.isfinite(apart).any() and np.nanmedian(apart) > VOTES_OFF:
        i = int(np.nanargmax(apart))
        raise UserError(
            f"{file.at[i]}: {file.label(str(fmt.score))} is {raw[i]:.6g} of {fmt.range}, the votes' mean is "
            f"{means[i]:.3g} of 100; half of the rows differ by {np.nanmedian(apart):.3g} points or more: another "
            f"format than {fmt.name}, or another range, is meant"
        )


def _deviations(file: RawFile) -> np.ndarray:
    """Return (n,) standard deviations in points, from their own column."""
    assert file.format.std is not None
    column, scale = file.format.std.column, file.format.std.range
    std = _numbers(file, column)
    for i in np.flatnonzero((std < 0) | (std > scale.high - scale.low)):
        file.reject(i, "out of range", f"column {column}: {std[i]:.10g} is no standard deviation on {scale}")
    return std * scale.points


def _splits(file: RawFile) -> list[str]:
    assert file.format.split is not None
    column, known = file.format.split.column, file.format.split.values
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


def check_paths(rows: Sequence[Row], folder: ImageFolder | None) -> None:
    """Mark impossible paths and, with `folder`, images that do not exist as bad; fill `path`."""
    for row in rows:
        if fault := path_fault(row.image):
            row.reject("bad path", f"image {row.image!r} {fault}")
        if folder is not None:
            path = folder.find(row.image)
            if isinstance(path, Bad):
                row.reject(*path)
            else:
                row.path = path


def read_names(rows: Sequence[Row], dataset: Dataset) -> None:
    """Parse reference and distortions from image names, if the set defines a pattern for them."""
    names = dataset.names
    if names is None:
        return
    pattern = re.compile(names.pattern, re.ASCII)
    for row in rows:
        match = pattern.match(row.image)
        if match is None or not match["reference"]:
            row.reject("name pattern", f"image {row.image!r} is not named as {dataset.name} names its images")
            continue
        row.group = match["reference"]
        meta: dict[str, Any] = {"reference": match["reference"]}
        if names.distortions:
            family = names.distortions.get(match["type"] or "")
            level = int(match["level"]) if re.fullmatch("[0-9]{1,9}", match["level"] or "") else 0
            if family is None or not 1 <= level <= names.levels:
                unknown = f"distortion type {match['type']}" if family is None else f"level {match['level']}"
                row.reject("name pattern", f"image {row.image!r}: {dataset.name} has no {unknown}")
                continue
            meta["distortions"] = [{"family": family, "strength": round(level / names.levels, 10)}]
        row.meta = meta | row.meta


def check_duplicates(rows: Sequence[Row]) -> None:
    """Mark repeated images (for ratings: per worker) as bad: exact repeats and contradictions.

    Of equal rows the first stays good; of contradicting ones none does, because nothing shows which is right.
    """
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if not row.bad:
            groups[row.worker, row.path].append(row)
    for (worker, path), same in groups.items():
        if len(same) == 1:
            continue
        image = f"image {path!r}" + (f" by worker {worker!r}" if worker else "")
        if len({(row.score, row.split, row.rationale, str(row.attributes)) for row in same}) == 1:
            for row in same[1:]:
                row.reject("exact duplicate", f"{image} is already in {same[0].at}")
            continue
        for row in same:
            other = same[1] if row is same[0] else same[0]
            here, there = f"{row.raw:.10g}", f"{other.raw:.10g}"
            differ = f"has score {here} here and {there} in" if here != there else "has other values here than in"
            row.reject("conflicting duplicate", f"{image} {differ} {other.at}")


def first_bad(rows: Sequence[Row], folder: ImageFolder | None) -> str:
    """Format the first bad row as a line, with the number of bad rows by kind."""
    bad = [(row.at, row.bad) for row in rows if row.bad]
    line = f"{bad[0][0]}: {bad[0][1].text}"
    reasons = Counter(fault.reason for _, fault in bad)
    if len(bad) > 1:
        kinds = ", ".join(f"{n:,} × {reason}" for reason, n in reasons.most_common())
        line += f" ({len(bad):,} of {len(rows):,} rows are bad: {kinds})"
    if folder is not None and reasons["missing image"] == len(rows) and "; there is" not in line:
        return f"{line}; no image was found: does --images name the right directory?"
    if len(bad) == len(rows):
        return f"{line}; none of the {len(rows):,} rows can be used"
    return f"{line}; correct it, or leave such rows out with --drop-bad"
