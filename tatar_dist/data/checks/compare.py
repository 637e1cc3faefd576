"""Compare rows over all manifests of `data validate`; log duplicates, conflicts and leaks.

Takes the arrays of `validation.ValidationRows`; logs problems that name sample ids and returns the rows' fates. Ids and
scores are read once more from the files, and kept only for rows that have something in common.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tatar_dist.data.checks.duplicates import Likeness, fates, groups, likenesses
from tatar_dist.data.checks.problem_log import Problem
from tatar_dist.data.checks.validation import Checked, ValidationRows, columns_of

NAMED = 3  # rows that a message names; the rest are counted

_Known = dict[int, tuple[str, float]]  # row among all -> its sample_id and score


def compare(checked: Sequence[Checked], rows: ValidationRows) -> np.ndarray:
    """Find duplicate ids, identical images, conflicting scores, leaks. Returns (rows,) uint8: see duplicates.fates."""
    _duplicate_ids(checked, rows)
    usable = ~rows.unusable
    pictures = likenesses(rows.picture, usable & rows.picture.any(axis=1), rows.pool, rows.pools)
    references = likenesses(rows.reference, usable & (rows.reference != 0), rows.pool, rows.pools, leaks_only=True)
    report = _Report(checked, rows, _look_up(checked, (r for like in (*pictures, *references) for r in like.rows)))
    for like in pictures:
        if like.leaks:
            report.leak("leak-image", "the same picture", like)
        report.repeats(like)
        report.conflict(like)
    for like in references:
        report.leak("leak-reference", "a picture of the same reference", like)
    return fates(rows.unusable, pictures, references, rows.pool, rows.pools)


def _look_up(checked: Sequence[Checked], wanted: Iterable[int]) -> _Known:
    chosen = np.unique(np.fromiter(wanted, np.int64))
    known: _Known = {}
    if not len(chosen):
        return known
    for start, columns in columns_of(checked, ("sample_id", "score")):
        names, scores = columns["sample_id"], columns["score"]
        low, high = np.searchsorted(chosen, [start, start + len(names)])
        known.update({r: (names[r - start], scores[r - start]) for r in chosen[low:high].tolist()})
    return known


def _duplicate_ids(checked: Sequence[Checked], rows: ValidationRows) -> None:
    """Mark later rows of a repeated id as unusable; ids need only be unique within their file."""
    for manifest in checked:
        span = slice(manifest.first, manifest.first + manifest.rows)
        found = [g + manifest.first for g in groups(rows.ident[span], rows.ident[span] != 0)]
        known = _look_up([manifest], (int(r) for g in found for r in g))
        seen: dict[str, int] = {}
        for row in (int(r) for g in found for r in g):  # hashes are equal: compare the ids
            name = known[row][0]
            if name in seen:
                said = f"column sample_id: {name!r} was used in row {seen[name] - manifest.first}"
                manifest.log.add(Problem(row - manifest.first, name, "duplicate-id", said))
                rows.unusable[row] = True
            seen.setdefault(name, row)


class _Report:
    """Write findings about rows to the log of the manifest that holds the row."""

    def __init__(self, checked: Sequence[Checked], rows: ValidationRows, known: _Known) -> None:
        self.checked, self.known = checked, known
        self._rows, self._firsts = rows, [m.first for m in checked]

    def _home(self, row: int) -> Checked:
        # a manifest without rows starts where the next one does: the last of equal starts is the one with rows
        return self.checked[int(np.searchsorted(self._firsts, row, side="right")) - 1]

    def _key(self, row: int) -> Any:
        return self._rows.pools[self._rows.pool[row]]

    def _add(self, row: int, code: str, message: str) -> None:
        home = self._home(row)
        home.log.add(Problem(row - home.first, self.known[row][0], code, message))

    def _names(self, some: Sequence[int], seen_from: int, scores: bool = False) -> str:
        home = self._home(seen_from)
        said = []
        for row in some[:NAMED]:
            there = self._home(row)
            said.append(f"{self.known[row][0]!r} (row {row - there.first}")
            said[-1] += f" of {there.path.name})" if there is not home else ")"
            said[-1] += f" {self.known[row][1]:g}" if scores else ""
        rest = len(some) - NAMED
        return ", ".join(said) + (f" and {rest:,} more" if rest > 0 else "")

    def leak(self, code: str, what: str, like: Likeness) -> None:
        """Add one problem for each row outside the protected split, naming rows inside."""
        inside = [r for r in like.rows if self._key(r)[2] == like.protected]
        for row in like.rows:
            split = self._key(row)[2]
            if split != like.protected:
                named = self._names(inside, row)
                self._add(row, code, f"split {split}, but {what} is in split {like.protected}: {named}")

    def repeats(self, like: Likeness) -> None:
        seen: dict[int, int] = {}
        for row in like.rows:
            before = seen.setdefault(int(self._rows.pool[row]), row)
            if before != row:
                self._add(row, "duplicate-image", f"the same bytes as {self._names([before], row)}")

    def conflict(self, like: Likeness) -> None:
        """Report identical images of one data set and task whose scores differ."""
        together = defaultdict(list)
        for row in like.rows:
            together[self._key(row)[:2]].append(row)
        for same in together.values():
            scores = [self.known[r][1] for r in same]
            if max(scores) - min(scores) > 1e-9:
                same.sort(key=lambda r: self.known[r][1])
                shown = [same[0], same[-1]] if len(same) > NAMED else same
                said = f"{len(same)} identical pictures, scores {min(scores):g} to {max(scores):g}: "
                self._add(min(same), "conflicting-scores", said + self._names(shown, min(same), scores=True))
