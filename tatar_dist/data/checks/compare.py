"""Compare rows over all manifests of `data validate`; log duplicates, conflicts and leaks; write clean manifests.

Arrays run over the rows of all manifests (`validation.ValidationRows`). `compare` logs problems that name sample ids
and returns the fate of each row in a clean manifest. Ids and scores are read once more from the files, and kept only
for rows that have something in common. `clean` writes new manifests without the rows that cannot be used, leak (on the
side not held out), or repeat an image of their pool; image files are not moved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tatar_dist.data.checks.rows import Key
from tatar_dist.data.checks.validation import (
    DUPLICATE,
    KEEP,
    LEAKED,
    UNUSABLE,
    Checked,
    Problem,
    Validation,
    ValidationRows,
    batches,
    columns_of,
    open_source,
)
from tatar_dist.data.schema import SCHEMA
from tatar_dist.data.writing import ManifestWriter
from tatar_dist.errors import UserError
from tatar_dist.run.files import probe, writing
from tatar_dist.types import SPLITS

WHY = {"unusable": UNUSABLE, "leaked": LEAKED, "duplicate": DUPLICATE}
NAMED = 3  # rows that a message names; the rest are counted

_Known = dict[int, tuple[str, float]]  # row among all -> its sample_id and score


def compare(checked: Sequence[Checked], rows: ValidationRows) -> np.ndarray:
    """Find duplicate ids, identical images, conflicting scores, leaks. Returns (rows,) uint8: see `fates`."""
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


@dataclass(frozen=True)
class Likeness:
    """Rows, ascending, that share an image or a reference.

    leaks: whether they lie in two splits or more; then the rows outside the `protected` split, the last of SPLITS, are
        those that leak.
    """

    rows: tuple[int, ...]
    leaks: bool
    protected: str


def groups(keys: np.ndarray, present: np.ndarray) -> list[np.ndarray]:
    """Group rows by equal keys that occur twice or more; rows ascend within a group, groups are sorted by first row.

    keys: (n,) or (n, 2) uint64/int64. present: (n,) bool, the rows to consider.
    """
    rows = np.flatnonzero(present)
    if not len(rows):
        return []
    found = keys[rows].reshape(len(rows), -1)
    order = np.lexsort(found.T)  # stable, so rows stay ascending within equal keys
    rows, found = rows[order], found[order]
    starts = np.flatnonzero(np.r_[True, (found[1:] != found[:-1]).any(axis=1)])
    ends = np.r_[starts[1:], len(rows)]
    several = np.flatnonzero(ends - starts > 1)
    return sorted((rows[starts[k] : ends[k]] for k in several), key=lambda g: int(g[0]))


def likenesses(
    keys: np.ndarray, present: np.ndarray, pool: np.ndarray, pools: Sequence[Key], leaks_only: bool = False
) -> list[Likeness]:
    """Group rows by equal keys and mark the groups that leak. pool: (n,) int32, the row's index in `pools`.

    Rows of a split that is not in SPLITS must not be `present`: which side of a leak is held out is unknown for them.
    leaks_only: omit groups without a leak, which for references are the normal case and as large as the data set.
    """
    found = []
    for group in groups(keys, present):
        splits = {pools[p][2] for p in np.unique(pool[group])}
        if leaks_only and len(splits) == 1:
            continue
        protected = max(splits, key=SPLITS.index)
        found.append(Likeness(tuple(group.tolist()), len(splits) > 1, protected))
    return found


def fates(
    unusable: np.ndarray,
    same_picture: Sequence[Likeness],
    same_reference: Sequence[Likeness],
    pool: np.ndarray,
    pools: Sequence[Key],
) -> np.ndarray:
    """Return (n,) uint8: KEEP, UNUSABLE, LEAKED (all but the protected split), DUPLICATE (later ones in a pool)."""
    fate = np.where(unusable, UNUSABLE, KEEP).astype(np.uint8)
    for like in (*same_picture, *same_reference):
        if like.leaks:
            for row in like.rows:
                if fate[row] == KEEP and pools[pool[row]][2] != like.protected:
                    fate[row] = LEAKED
    for like in same_picture:
        seen: set[int] = set()
        for row in like.rows:
            if fate[row] == KEEP:
                if int(pool[row]) in seen:
                    fate[row] = DUPLICATE
                seen.add(int(pool[row]))
    return fate


def clean_paths(paths: Sequence[Path], out: Path) -> list[Path]:
    """Return the target of each manifest: `out` itself for one, a file of the same name in directory `out` for several.

    Raises UserError for an unsuitable target, one that cannot be written, or one that would overwrite a manifest being
    read.
    """
    with writing(out):
        is_directory = out.is_dir()
    if len(paths) == 1 and not is_directory:
        found = [out]
    elif out.suffix == ".parquet":
        raise UserError(f"--clean {out}: several manifests are given, name a directory for their clean copies")
    else:
        found = [out / p.name for p in paths]
    for path, target in zip(paths, found, strict=True):
        if target.resolve() in [p.resolve() for p in paths]:
            raise UserError(f"--clean {target}: would overwrite {path}, which it is made from; name another place")
    if len(set(found)) < len(found):
        raise UserError(f"--clean {out}: two manifests have the same file name; clean them one at a time")
    for target in found:
        probe(target)
    return found


def clean(found: Validation, out: Path) -> dict[str, dict[str, int]]:
    """Write the clean manifests. Returns row counts by file: kept, unusable, leaked, duplicate.

    Raises UserError if a manifest has no row left, before any is written, or if one cannot be written.
    """
    counts = {}
    targets = clean_paths([m.path for m in found.manifests], out)
    for manifest, target in zip(found.manifests, targets, strict=True):
        if not (found.fate_of(manifest) == KEEP).any():
            raise UserError(f"{manifest.path}: no row is left to write to {target}")
    for manifest, target in zip(found.manifests, targets, strict=True):
        fate = found.fate_of(manifest)
        keep = fate == KEEP
        file, _ = open_source(manifest.path)
        start = 0
        with file, writing(target), ManifestWriter(target, image_root=manifest.root) as writer:
            for table in batches(file, SCHEMA.names):
                writer.write(table.filter(pa.array(keep[start : start + len(table)])))
                start += len(table)
        counts[str(target)] = {"kept": int(keep.sum())} | {k: int(np.sum(fate == v)) for k, v in WHY.items()}
    return counts
