"""Log (near-)duplicates, conflicts, leaks over all manifests of `data validate`; clean them.

Arrays run over the rows of all manifests. Ids and scores are read once more from the files, and kept only for rows that
have something in common. `clean` writes new manifests without the rows that cannot be used, leak (on the side not held
out), or repeat an image of their pool; image files are not moved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from tatar_dist.data.checks.near import near_duplicates
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
)
from tatar_dist.data.manifest import open_parquet
from tatar_dist.data.schema import SCHEMA
from tatar_dist.data.writing import manifest_writer
from tatar_dist.errors import UserError
from tatar_dist.run.files import probe, writing
from tatar_dist.types import SPLITS

FATES = {"kept": KEEP, "unusable": UNUSABLE, "leaked": LEAKED, "duplicate": DUPLICATE}
NAMED = 3  # rows that a message names; the rest are counted


def compare(checked: list[Checked], rows: ValidationRows, tick: Callable[[], None] | None) -> Validation:
    """Log duplicate ids and images, conflicting scores, leaks, near-duplicates; return all.

    Rows that share a picture or a reference leak if they lie in several splits: those outside the last one of SPLITS
    are LEAKED. The later ones of identical images in a pool are DUPLICATE. Near-duplicates across splits are a warning
    and change no fate. tick: called while they are sought; None: they are not.
    """
    _mark_duplicate_ids(checked, rows)
    fate = np.where(rows.unusable, UNUSABLE, KEEP).astype(np.uint8)
    split = np.array([SPLITS.index(s) if s in SPLITS else -1 for *_, s in rows.pools], np.int64)[rows.pool]
    pictures = _groups(rows.picture, ~rows.unusable & rows.picture.any(axis=1))
    references = _groups(rows.reference, ~rows.unusable & (rows.reference != 0))
    leaks = [
        (code, what, group)
        for code, what, groups in (
            ("leak-image", "the same picture", pictures),
            ("leak-reference", "a picture of the same reference", references),
        )
        for group in groups
        if split[group].min() < split[group].max()
    ]
    alike, pairs, looked_at = near_duplicates(rows, split, tick) if tick else ([], 0, None)
    log = _RowLog(checked, [*pictures, *(group for *_, group in leaks), *(np.array(pair[:2]) for pair in alike)])
    for code, what, group in leaks:
        protected = split[group].max()
        inside = group[split[group] == protected]
        for row in group[split[group] != protected]:
            fate[row] = LEAKED
            where = f"{SPLITS[protected]}: {log.names(inside, row)}"
            log.add(row, code, f"split {SPLITS[split[row]]}, but {what} is in split {where}")
    for row, held, likeness in alike:
        where = f"{SPLITS[split[held]]}: {log.names([held], row)}, correlation {likeness:.2f}"
        log.add(row, "near-duplicate", f"split {SPLITS[split[row]]}, but nearly the same picture is in split {where}")
    for group in pictures:
        for pool in np.unique(rows.pool[group]):
            same = group[rows.pool[group] == pool]
            for row in same[1:]:
                log.add(row, "duplicate-image", f"the same bytes as {log.names(same[:1], row)}")
            fate[same[fate[same] == KEEP][1:]] = DUPLICATE
        by_subject = defaultdict(list)
        for row in group.tolist():
            by_subject[rows.pools[rows.pool[row]][:2]].append(row)
        for same in by_subject.values():
            lowest, highest = min(same, key=log.score), max(same, key=log.score)
            if log.score(highest) - log.score(lowest) > 1e-9:
                scores = f"scores {log.score(lowest):g} to {log.score(highest):g}"
                names = log.names([lowest, highest], same[0])
                log.add(same[0], "conflicting-scores", f"{len(same)} identical pictures, {scores}: {names}")
    return Validation(checked, fate, _compared(rows, split, looked_at), alike, pairs)


def _compared(rows: ValidationRows, split: np.ndarray, looked_at: int | None) -> str:
    """Say what of these rows was compared between splits, and what not; "" for one split."""
    if len(np.unique(split)) < 2:
        return ""
    known, total = int((rows.reference != 0).sum()), len(split)
    references = f"references of {known:,} of {total:,} rows" if known else "references, which are unknown"
    looks = "looks (--no-near-duplicates)" if looked_at is None else f"the looks of {looked_at:,} of {total:,} pictures"
    parts = {"file bytes": True, references: known > 0, looks: looked_at is not None}
    done, left = (", ".join(part for part, was in parts.items() if was == wanted) for wanted in (True, False))
    return f"Compared between splits: {done}." + (f" Not compared: {left}." if left else "")


def _groups(keys: np.ndarray, present: np.ndarray) -> list[np.ndarray]:
    """Group rows by keys that occur at least twice; rows ascend, groups are sorted by first row.

    keys: (n,) or (n, 2) uint64/int64. present: (n,) bool, the rows to consider.
    """
    rows = np.flatnonzero(present)
    keys = np.atleast_2d(keys[rows].T)
    order = np.lexsort(keys)  # stable, so rows stay ascending within equal keys
    rows, keys = rows[order], keys[:, order]
    starts = np.flatnonzero(np.r_[True, (keys[:, 1:] != keys[:, :-1]).any(axis=0)])
    ends = np.r_[starts[1:], len(rows)]
    several = ends - starts > 1
    groups = [rows[start:end] for start, end in zip(starts[several], ends[several], strict=True)]
    return sorted(groups, key=lambda group: int(group[0]))


def _mark_duplicate_ids(checked: Sequence[Checked], rows: ValidationRows) -> None:
    """Mark later rows of a repeated id as unusable; ids need only be unique within their file."""
    for manifest in checked:
        ids = (columns["sample_id"] for _, columns in columns_of([manifest], ["sample_id"]))
        for name, row, first in manifest.ids.repeats(ids):
            message = f"column sample_id: {name!r} was used in row {first}"
            manifest.log.add(Problem(row, name, "duplicate-id", message))
            rows.unusable[manifest.first + row] = True


class _RowLog:
    """Log problems of the rows in `groups`, reading their ids and scores from the manifests."""

    def __init__(self, checked: Sequence[Checked], groups: Sequence[np.ndarray]) -> None:
        self._checked = checked
        self._known: dict[int, tuple[str, float]] = {}
        if not groups:
            return
        wanted = np.unique(np.concatenate(groups))
        for start, columns in columns_of(checked, ("sample_id", "score")):
            names, scores = columns["sample_id"], columns["score"]
            low, high = np.searchsorted(wanted, [start, start + len(names)])
            self._known |= {int(r): (names[r - start], scores[r - start]) for r in wanted[low:high]}

    def _home(self, row: int) -> Checked:
        return next(m for m in self._checked if m.first <= row < m.first + m.rows)

    def score(self, row: int) -> float:
        return self._known[row][1]

    def add(self, row: int, code: str, message: str) -> None:
        home = self._home(row)
        home.log.add(Problem(int(row) - home.first, self._known[row][0], code, message))

    def names(self, some: Sequence[int] | np.ndarray, seen_from: int) -> str:
        """Name up to NAMED rows by id, row and, unless it is the file of `seen_from`, file."""
        names = []
        for row in some[:NAMED]:
            home = self._home(row)
            file = "" if home is self._home(seen_from) else f" of {home.path.name}"
            names.append(f"{self._known[row][0]!r} (row {row - home.first}{file})")
        rest = len(some) - NAMED
        return ", ".join(names) + (f" and {rest:,} more" if rest > 0 else "")


def clean_paths(paths: Sequence[Path], out: Path) -> list[Path]:
    """Return the targets: `out` for one manifest, files of the same names in it for several.

    Raises UserError for a target that cannot be written, or would overwrite a manifest that is read.
    """
    with writing(out):
        is_directory = out.is_dir()
    if len(paths) > 1 and not is_directory and out.suffix == ".parquet":
        raise UserError(f"--clean {out}: several manifests are given; name a directory for their clean copies")
    targets = [out / path.name for path in paths] if is_directory or len(paths) > 1 else [out]
    sources = {path.resolve() for path in paths}
    for path, target in zip(paths, targets, strict=True):
        if target.resolve() in sources:
            raise UserError(f"--clean {target}: would overwrite the input {path}; name another place")
    if len(set(targets)) < len(targets):
        raise UserError(f"--clean {out}: two manifests have the same file name; clean them one at a time")
    for target in targets:
        probe(target)
    return targets


def clean(validation: Validation, out: Path) -> dict[str, dict[str, int]]:
    """Write the clean manifests. Returns row counts by file: kept, unusable, leaked, duplicate.

    Raises UserError if a manifest has no row left, before any is written, or if one cannot be written.
    """
    targets = clean_paths([m.path for m in validation.manifests], out)
    fates = [validation.fate_of(m) for m in validation.manifests]
    for manifest, fate, target in zip(validation.manifests, fates, targets, strict=True):
        if not (fate == KEEP).any():
            raise UserError(f"{manifest.path}: no row is left to write to {target}")
    counts = {}
    for manifest, fate, target in zip(validation.manifests, fates, targets, strict=True):
        file, *_ = open_parquet(manifest.path)
        start = 0
        with file, writing(target), manifest_writer(target, image_root=manifest.root) as writer:
            for table in batches(file, SCHEMA.names):
                writer.write(table.filter(pa.array(fate[start : start + len(table)] == KEEP)))
                start += len(table)
        counts[str(target)] = {name: int(np.sum(fate == value)) for name, value in FATES.items()}
    return counts
