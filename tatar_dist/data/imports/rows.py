"""Gather all rows of an import in columns, and check paths, names and duplicates over them.

`AllRows` is built from the `ImportedScores` of all files: one list or array per column, and the reason for every bad
row. `first_bad` formats the error line of the first one.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from tatar_dist.data.imports.annotations import Bad
from tatar_dist.data.imports.folder import ImageFolder, path_fault
from tatar_dist.data.imports.scores import ImportedScores, to_score
from tatar_dist.data.registry import Dataset


@dataclass
class AllRows:
    """Rows of all files, one list or array per column; `bad` by row. Each rating is a row."""

    files: list[ImportedScores]
    given: list[str]
    path: list[str]
    raw: np.ndarray
    score: np.ndarray
    std: np.ndarray  # in points; NaN where the file has none
    counts: list[str]  # '"counts":{…}' or ""
    names: list[str]  # '"reference":…' and so on, or ""
    group: list[str]
    split: list[str]
    rationale: list[str | None]
    attributes: list[dict[str, str] | None]
    bad: dict[int, Bad] = field(default_factory=dict)

    def alive(self) -> np.ndarray:
        """Return (n,) bool: the rows that are not bad."""
        good = np.ones(len(self.given), dtype=bool)
        good[list(self.bad)] = False
        return good

    def where(self, row: int) -> str:
        """Return FILE:LINE of a row."""
        k = bisect_right(self._starts, row) - 1
        return self.files[k].where(row - self._starts[k])

    @cached_property
    def _starts(self) -> list[int]:
        """The first row of each file; a set may consist of hundreds of files (PIPAL's labels do)."""
        return list(accumulate(map(len, self.files), initial=0))[:-1]


def gather(files: list[ImportedScores]) -> AllRows:
    """Concatenate the rows of all files."""
    bad: dict[int, Bad] = {}
    start = 0
    for file in files:
        bad |= {start + i: reason for i, reason in file.bad.items()}
        start += len(file)
    nothing = [np.full(len(f), np.nan) for f in files]
    std = [f.std * f.format.range.points if f.std is not None else n for f, n in zip(files, nothing, strict=True)]
    given = chain(f.image for f in files)
    return AllRows(
        files=files,
        given=given,
        path=given,
        raw=np.concatenate([f.raw for f in files]),
        score=np.concatenate([to_score(f.raw, f.format.range, f.format.lower_is_better) for f in files]),
        std=np.concatenate(std),
        counts=chain(_vote_counts(f) for f in files),
        names=[""] * len(given),
        group=given,
        split=chain(f.split or [""] * len(f) for f in files),
        rationale=chain(f.rationale or [None] * len(f) for f in files),
        attributes=chain(f.attributes or [None] * len(f) for f in files),
        bad=bad,
    )


def chain(lists: Iterable[list[Any]]) -> list[Any]:
    """Concatenate lists."""
    return [value for each in lists for value in each]


def counts_format(values: Iterable[float]) -> str:
    """Return the `%` format, with one count per value, of the member `counts` of the meta object."""
    return '"counts":{' + ",".join(f'"{v:g}":%d' for v in values) + "}"


def _vote_counts(file: ImportedScores) -> list[str]:
    if file.votes is None:
        return [""] * len(file)
    shape = counts_format(value for _, value in file.format.votes)
    return [shape % tuple(row) for row in file.votes.tolist()]


def check_paths(rows: AllRows, folder: ImageFolder | None) -> None:
    """Mark names that cannot be paths and, with `folder`, images that do not exist as bad; fills rows.path."""
    faults = {name: fault for name in set(rows.given) if (fault := path_fault(name))}
    if faults:
        for i, name in enumerate(rows.given):
            if name in faults:
                rows.bad.setdefault(i, Bad("bad path", f"image {name!r} {faults[name]}"))
    if folder is not None:
        rows.path, missing = folder.find_all(rows.given)
        for i, reason in missing.items():
            rows.bad.setdefault(i, reason)


_LEVEL = re.compile(r"\d{1,9}", re.ASCII)


def read_names(rows: AllRows, dataset: Dataset) -> None:
    """Parse reference and distortions from image names, if the set defines a pattern for them."""
    if dataset.names is None:
        return
    told = dataset.names
    match = re.compile(told.pattern, re.ASCII).match
    rows.group, rows.names = list(rows.given), list(rows.names)
    for i, name in enumerate(rows.given):
        found = match(name)
        if found is None or not found["reference"]:
            text = f"image {name!r} is not named as {dataset.name} names its images"
            rows.bad.setdefault(i, Bad("name pattern", text))
            continue
        rows.group[i] = reference = found["reference"]
        said = f'"reference":{json.dumps(reference)}'
        if told.distortions:
            family = told.distortions.get(found["type"] or "")
            level = int(found["level"]) if _LEVEL.fullmatch(found["level"] or "") else 0
            if family is None or not 1 <= level <= told.levels:
                lacks = f"distortion type {found['type']}" if family is None else f"level {found['level']}"
                text = f"image {name!r}: {dataset.name} has no {lacks}"
                rows.bad.setdefault(i, Bad("name pattern", text))
                continue
            strength = level / told.levels
            said += f',"distortions":[{{"family":{json.dumps(family)},"strength":{strength:.10g}}}]'
        rows.names[i] = said


def check_duplicates(rows: AllRows) -> None:
    """Mark repeated images (repeated per worker, for ratings) as bad: exact repeats, or rows that contradict.

    Of equal rows the first stays good; of contradicting ones none does, because nothing shows which is right.
    """
    workers: list[str] = chain(f.worker or [""] * len(f) for f in rows.files)
    keep = np.flatnonzero(rows.alive()).tolist()
    if len({(workers[i], rows.path[i]) for i in keep}) == len(keep):
        return
    groups: dict[tuple[str, str], list[int]] = {}
    for i in keep:
        groups.setdefault((workers[i], rows.path[i]), []).append(i)
    for (worker, path), (first, *others) in groups.items():
        image = f"image {path!r}" + (f" by worker {worker!r}" if worker else "")
        told = {
            (float(rows.score[i]), rows.split[i], rows.rationale[i], str(rows.attributes[i])) for i in (first, *others)
        }
        same = len(told) == 1
        for i in others if same else (first, *others):
            if same:
                rows.bad[i] = Bad("exact duplicate", f"{image} is already in {rows.where(first)}")
                continue
            other = others[0] if i == first else first
            here, there = f"{rows.raw[i]:.10g}", f"{rows.raw[other]:.10g}"
            differ = f"has score {here} here and {there} in" if here != there else "has other values here than in"
            rows.bad[i] = Bad("conflicting duplicate", f"{image} {differ} {rows.where(other)}")


def first_bad(rows: AllRows, folder: ImageFolder | None, hint: bool = True) -> str:
    """Format the first bad row as a line, with the number of bad rows by kind."""
    first = min(rows.bad)
    line = f"{rows.where(first)}: {rows.bad[first].text}"
    reasons = Counter(b.reason for b in rows.bad.values())
    if len(rows.bad) > 1:
        kinds = ", ".join(f"{n:,} × {reason}" for reason, n in reasons.most_common())
        line += f" ({len(rows.bad):,} of {len(rows.given):,} rows are bad: {kinds})"
    strange = not any("; there is" in b.text for b in rows.bad.values())
    if folder is not None and strange and reasons["missing image"] == len(rows.given):
        return f"{line}; no image was found: does --images name the right directory?"
    return f"{line}; correct it, or leave such rows out with --drop-bad" if hint else line
