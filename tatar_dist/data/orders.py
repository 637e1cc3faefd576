"""Draw the order in which an epoch visits a data set: a permutation seeded by a key.

For a data set with images embedded in the manifest, row groups are shuffled, and rows within windows of a few groups,
because reading one row costs as much as reading its group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

MAX_ROWS = 1 << 24  # of a data set, whose order takes 64 MiB
WINDOW = 8  # row groups whose rows are mixed; a reader caches as many


def permutation(n: int, key: Sequence[object]) -> np.ndarray:
    """Draw a permutation of range(n), (n,) uint32: the same on every machine for keys with equal string forms."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=64).digest()
    order = np.arange(n, dtype=np.uint32)
    np.random.default_rng(np.frombuffer(digest, "<u8")).shuffle(order)
    return order


def block_permutation(sizes: np.ndarray, key: Sequence[object]) -> np.ndarray:
    """Draw a permutation of the rows of consecutive blocks that finishes one window of blocks before the next.

    Args:
        sizes: (blocks,) rows of each block.
        key: as for `permutation`.

    Returns:
        (sizes.sum(),) uint32. Blocks are shuffled, and the rows within each `WINDOW` consecutive shuffled blocks.
    """
    ends, order = np.cumsum(sizes), permutation(len(sizes), (*key, "blocks"))
    shuffled, at = np.empty(ends[-1], np.uint32), 0
    for w in range(0, len(order), WINDOW):
        rows = np.concatenate([np.arange(ends[b] - sizes[b], ends[b]) for b in order[w : w + WINDOW]])
        shuffled[at : at + len(rows)] = rows[permutation(len(rows), (*key, "window", w // WINDOW))]
        at += len(rows)
    return shuffled
