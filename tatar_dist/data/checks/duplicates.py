"""Find rows that share an image or reference, and split leaks: pure functions on arrays.

Arrays run over the rows of all manifests: a 16-byte hash of the encoded image, an 8-byte hash of its reference, and its
pool. Results are groups of rows, and which rows a clean manifest would drop. The caller computes the hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tatar_dist.data.checks.rows import Key
from tatar_dist.types import SPLITS

KEEP, UNUSABLE, LEAKED, DUPLICATE = range(4)  # a row's fate in a clean manifest


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
