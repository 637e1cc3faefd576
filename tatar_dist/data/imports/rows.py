"""Rows of an import in columns, and the checks between rows: paths, image names, duplicates.

`scores.judge` returns the `ImportRows` of one file; `concatenate` joins those of all files, and the checks mark rows
as bad, each with its first fault.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, fields
from itertools import accumulate, chain
from typing import Any

import numpy as np

from tatar_dist.data.imports.annotations import Bad, RawFile
from tatar_dist.data.imports.folder import ImageFolder, path_fault
from tatar_dist.data.registry import Dataset


@dataclass
class ImportRows:
    """Rows of one or more files: a list or array per column, and the bad rows. Each rating is a row."""

    files: list[RawFile]
    at: list[str]  # FILE:LINE
    image: list[str]  # as the file names it
    path: list[str]  # of the image file, relative to --images
    raw: np.ndarray  # NaN where the row is bad
    score: np.ndarray
    std: np.ndarray  # in points; NaN where the file has none
    worker: list[str]
    group: list[str]  # what must not cross splits: the image, or its reference image
    split: list[str]
    rationale: list[str | None]
    attributes: list[dict[str, str] | None]
    meta: list[dict[str, Any]]
    bad: dict[int, Bad]

    def __len__(self) -> int:
        return len(self.image)

    def alive(self) -> np.ndarray:
        """Return (n,) bool: the rows that are not bad."""
        good = np.ones(len(self), dtype=bool)
        good[list(self.bad)] = False
        return good

    def reject(self, row: int, reason: str, text: str) -> None:
        """Mark a row as bad, unless it is already."""
        self.bad.setdefault(row, Bad(reason, text))


def concatenate(parts: list[ImportRows]) -> ImportRows:
    """Concatenate the rows of all files."""
    columns: dict[str, Any] = {}
    for name in (f.name for f in fields(ImportRows) if f.name != "bad"):
        values = [getattr(part, name) for part in parts]
        is_array = isinstance(values[0], np.ndarray)
        columns[name] = np.concatenate(values) if is_array else list(chain.from_iterable(values))
    starts = accumulate(map(len, parts), initial=0)
    bad = {start + i: reason for start, part in zip(starts, parts, strict=False) for i, reason in part.bad.items()}
    return ImportRows(**columns, bad=bad)


def check_paths(rows: ImportRows, folder: ImageFolder | None) -> None:
    """Mark names that cannot be paths and, with `folder`, images that do not exist as bad; fills rows.path."""
    for i, name in enumerate(rows.image):
        if fault := path_fault(name):
            rows.reject(i, "bad path", f"image {name!r} {fault}")
    if folder is not None:
        rows.path, missing = folder.find_all(rows.image)
        for i, reason in missing.items():
            rows.bad.setdefault(i, reason)


def read_names(rows: ImportRows, dataset: Dataset) -> None:
    """Parse reference and distortions from image names, if the set defines a pattern for them."""
    names = dataset.names
    if names is None:
        return
    pattern = re.compile(names.pattern, re.ASCII)
    for i, name in enumerate(rows.image):
        match = pattern.match(name)
        if match is None or not match["reference"]:
            rows.reject(i, "name pattern", f"image {name!r} is not named as {dataset.name} names its images")
            continue
        rows.group[i] = match["reference"]
        meta: dict[str, Any] = {"reference": match["reference"]}
        if names.distortions:
            family = names.distortions.get(match["type"] or "")
            level = int(match["level"]) if re.fullmatch("[0-9]{1,9}", match["level"] or "") else 0
            if family is None or not 1 <= level <= names.levels:
                unknown = f"distortion type {match['type']}" if family is None else f"level {match['level']}"
                rows.reject(i, "name pattern", f"image {name!r}: {dataset.name} has no {unknown}")
                continue
            meta["distortions"] = [{"family": family, "strength": round(level / names.levels, 10)}]
        rows.meta[i] = meta | rows.meta[i]


def check_duplicates(rows: ImportRows) -> None:
    """Mark repeated images (repeated per worker, for ratings) as bad: exact repeats, or rows that contradict.

    Of equal rows the first stays good; of contradicting ones none does, because nothing shows which is right.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for i in np.flatnonzero(rows.alive()).tolist():
        groups.setdefault((rows.worker[i], rows.path[i]), []).append(i)
    for (worker, path), same in groups.items():
        if len(same) == 1:
            continue
        image = f"image {path!r}" + (f" by worker {worker!r}" if worker else "")
        values = {(float(rows.score[i]), rows.split[i], rows.rationale[i], str(rows.attributes[i])) for i in same}
        if len(values) == 1:
            for i in same[1:]:
                rows.reject(i, "exact duplicate", f"{image} is already in {rows.at[same[0]]}")
            continue
        for i in same:
            other = same[1] if i == same[0] else same[0]
            here, there = f"{rows.raw[i]:.10g}", f"{rows.raw[other]:.10g}"
            differ = f"has score {here} here and {there} in" if here != there else "has other values here than in"
            rows.reject(i, "conflicting duplicate", f"{image} {differ} {rows.at[other]}")


def first_bad(rows: ImportRows, folder: ImageFolder | None, hint: bool = True) -> str:
    """Format the first bad row as a line, with the number of bad rows by kind."""
    first = min(rows.bad)
    line = f"{rows.at[first]}: {rows.bad[first].text}"
    reasons = Counter(b.reason for b in rows.bad.values())
    if len(rows.bad) > 1:
        kinds = ", ".join(f"{n:,} × {reason}" for reason, n in reasons.most_common())
        line += f" ({len(rows.bad):,} of {len(rows):,} rows are bad: {kinds})"
    if folder is not None and reasons["missing image"] == len(rows) and "; there is" not in line:
        return f"{line}; no image was found: does --images name the right directory?"
    return f"{line}; correct it, or leave such rows out with --drop-bad" if hint else line
