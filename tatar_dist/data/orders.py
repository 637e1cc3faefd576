"""Orders: in which sequence an epoch walks a pool, as a function of a key, without a list of the rows.

In: a number of rows and a key. Out: any stretch of a permutation of them. `KeyedPermutation` is a Feistel network, so
ten million rows cost no memory and no start-up. `BlockOrder` is for rows that are expensive to reach one by one
(pictures embedded in row groups): it shuffles the groups, and the rows within windows of a few groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

ROUNDS = 8  # of which blake2b makes all keys at once (64 bytes at most)
EXACT = 65_536  # up to so many rows (512 KiB) every permutation is equally likely
WINDOW = 8  # row groups whose rows are mixed; a reader keeps so many open


def _round_keys(key: Sequence[object]) -> np.ndarray:
    """(ROUNDS,) uint64 from anything that prints alike on every machine."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8 * ROUNDS)
    return np.frombuffer(digest.digest(), "<u8")


def _mixed(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """A keyed hash of each element: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = x + key
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class KeyedPermutation:
    """A permutation of range(n), n >= 1: `p.take(a, b)` is the (b - a,) int64 images of positions a ... b - 1.

    Up to `EXACT` rows it is drawn outright (a small Feistel network would favour some permutations). Beyond, it is a
    Feistel network on the smallest power of two that holds n; an image outside range(n) is sent through again until it
    lies inside ("cycle walking", Black and Rogaway 2002), which keeps it a permutation and takes under two rounds on
    average.
    """

    def __init__(self, n: int, key: Sequence[object]) -> None:
        self.n = n
        self._keys = _round_keys(key)
        self._drawn = np.random.default_rng(self._keys).permutation(n) if n <= EXACT else None
        bits = max(2, (n - 1).bit_length())
        self._right = np.uint64(bits // 2)
        self._left_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._right_mask = np.uint64((1 << (bits // 2)) - 1)

    def _walk(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._right, x & self._right_mask
        for i in range(0, ROUNDS, 2):  # unequal halves keep their places and are masked in turn
            left = (left ^ _mixed(right, self._keys[i])) & self._left_mask
            right = (right ^ _mixed(left, self._keys[i + 1])) & self._right_mask
        return (left << self._right) | right

    def take(self, start: int, stop: int) -> np.ndarray:
        if self._drawn is not None:
            return self._drawn[start:stop]
        with np.errstate(over="ignore"):
            x = self._walk(np.arange(start, stop, dtype=np.uint64))
            while (outside := np.flatnonzero(x >= self.n)).size:
                x[outside] = self._walk(x[outside])
        return x.astype(np.int64)


class BlockOrder:
    """A permutation of the rows of consecutive blocks: `take(a, b)` like `KeyedPermutation`.

    Args:
        sizes: (blocks,) rows of each block; row r of the pool lies in the block that its number falls into.
        key: of the permutation.

    Any `WINDOW` consecutive shuffled blocks are gone through before the next ones are touched.
    """

    def __init__(self, sizes: np.ndarray, key: Sequence[object]) -> None:
        self.n = int(sizes.sum())
        self._key = tuple(key)
        self._first = np.cumsum(sizes) - sizes
        self._order = KeyedPermutation(len(sizes), (*key, "blocks")).take(0, len(sizes))
        self._sizes = sizes[self._order]
        self._ends = np.cumsum(self._sizes)[WINDOW - 1 :: WINDOW]
        if not len(self._ends) or self._ends[-1] != self.n:
            self._ends = np.append(self._ends, self.n)

    def _window(self, w: int) -> np.ndarray:
        """All rows of window w, in order."""
        blocks = range(w * WINDOW, min((w + 1) * WINDOW, len(self._order)))
        rows = np.concatenate([self._first[self._order[b]] + np.arange(self._sizes[b]) for b in blocks])
        return rows[KeyedPermutation(len(rows), (*self._key, "window", w)).take(0, len(rows))]

    def take(self, start: int, stop: int) -> np.ndarray:
        parts = []
        while start < stop:
            w = int(np.searchsorted(self._ends, start, side="right"))
            begin = int(self._ends[w - 1]) if w else 0
            end = min(stop, int(self._ends[w]))
            parts.append(self._window(w)[start - begin : end - begin])
            start = end
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
