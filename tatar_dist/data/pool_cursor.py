"""Visit one data set epoch after epoch in a keyed order, resumable from a state dict.

An epoch's order is a permutation seeded by (seed, data set, epoch). For a data set with images embedded in the
manifest, row groups are shuffled, and rows within windows of a few groups, because reading one row costs as much as
reading its group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from tatar_dist.data.manifest import WINDOW, Manifest
from tatar_dist.data.pools import Pool
from tatar_dist.errors import UserError
from tatar_dist.types import Task

Ref = tuple[int, int]  # (manifest index, row)
MAX_ROWS = 1 << 24  # of a data set, whose order takes 64 MiB
OLD_EXACT = 65_536  # largest shuffle for which older versions drew the same order


class PoolCursor:
    """Cursor over a data set of one task, across its manifests.

    Attributes: `rows`; `served`, rows drawn so far, which decides the next data set; `excluded`, never drawn again.
    `parts`: (manifest index, manifest, pool) of each. Raises UserError for more than `MAX_ROWS` rows.
    """

    def __init__(self, dataset: str, task: Task, parts: Sequence[tuple[int, Manifest, Pool]], seed: int, key: int):
        self.dataset, self.task, self.key = dataset, task, key
        self._seed = seed
        self._parts = list(parts)
        self._ends = np.cumsum([pool.rows for _, _, pool in parts])
        self.rows = int(self._ends[-1])
        if self.rows > MAX_ROWS:
            raise UserError(f"data set {dataset!r} has {self.rows} rows, more than {MAX_ROWS}: give its parts names")
        # With embedded images a row group is too large to read for one row: visit group by group.
        embedded = any(manifest.embedded for _, manifest, _ in parts)
        self._blocks = np.concatenate([_block_sizes(m, p) for _, m, p in parts]) if embedded else None
        self.epoch = self.position = self.served = 0
        self.put_off: list[Ref] = []
        self.excluded: set[Ref] = set()
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, its permutation)

    def __contains__(self, ref: object) -> bool:
        assert isinstance(ref, tuple)
        return any(m == ref[0] and ref[1] in pool for m, _, pool in self._parts)

    @property
    def usable(self) -> int:
        return self.rows - len(self.excluded)

    def keeps_old_order(self) -> bool:
        """Return whether a state older than `sampler.ORDER` has this order: large shuffles differed."""
        if self._blocks is None:
            return self.rows <= OLD_EXACT
        return len(self._blocks) <= OLD_EXACT and WINDOW * int(self._blocks.max()) <= OLD_EXACT

    @property
    def scores_differ(self) -> bool:
        """Return whether any two rows have different scores."""
        return min(p.score_min for *_, p in self._parts) != max(p.score_max for *_, p in self._parts)

    def _advance(self) -> Ref:
        """Return the row at the position and move on; the order of an epoch is drawn when it begins."""
        if self._order is None or self._order[0] != self.epoch:
            key = (self._seed, self.dataset, self.epoch)
            order = permutation(self.rows, key) if self._blocks is None else block_permutation(self._blocks, key)
            self._order = self.epoch, order
        index = int(self._order[1][self.position])  # of all parts together
        part = int(np.searchsorted(self._ends, index, side="right"))
        m, _, pool = self._parts[part]
        self.position += 1
        if self.position == self.rows:
            self.position, self.epoch = 0, self.epoch + 1
        return m, pool.row(index - int(self._ends[part] - pool.rows))

    def next(self, taken: Collection[Ref]) -> Ref:
        """Draw the next row that is neither excluded nor in `taken`.

        A row in `taken` (the batch spans the end of an epoch) is put off and comes first in a later batch, so that
        every epoch still shows every row. Raises UserError when all usable rows are taken.
        """
        for k, ref in enumerate(self.put_off):
            if ref not in taken:
                self.served += 1
                return self.put_off.pop(k)
        for _ in range(2 * self.rows):  # an epoch may end on the way
            ref = self._advance()
            if ref in self.excluded:
                continue
            if ref in taken or ref in self.put_off:
                self.put_off.append(ref)
                continue
            self.served += 1
            return ref
        raise UserError(
            f"data set {self.dataset!r}: fewer usable samples than one batch needs "
            f"({self.rows} rows, {len(self.excluded)} of them quarantined)"
        )

    def exclude(self, ref: Ref) -> None:
        """Never draw this row again."""
        self.excluded.add(ref)
        self.put_off = [r for r in self.put_off if r != ref]

    def put_back(self, refs: Sequence[Ref]) -> None:
        """Put back rows that were drawn but not used; they are drawn first next time."""
        self.put_off = [*refs, *self.put_off]
        self.served -= len(refs)

    def state_dict(self) -> dict[str, Any]:
        """Return the position as a JSON-serialisable dict."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "served": self.served,
            "size": self.rows,
            "put_off": [list(r) for r in self.put_off],
            "excluded": [list(r) for r in sorted(self.excluded)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict` taken over the same manifests in the same order."""
        self.epoch, self.position, self.served = state["epoch"], state["position"], state["served"]
        self.put_off = [(m, row) for m, row in state["put_off"]]
        self.excluded = {(m, row) for m, row in state["excluded"]}


def _block_sizes(manifest: Manifest, pool: Pool) -> np.ndarray:
    """Return (blocks,) the pool's rows in each row group that holds any, in file order."""
    sizes = np.diff(pool.rows_before(manifest.starts))
    return sizes[sizes > 0]


def permutation(n: int, key: Sequence[object]) -> np.ndarray:
    """Draw a permutation of range(n), (n,) uint32, seeded by the strings of the parts of `key`."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=64).digest()
    order = np.arange(n, dtype=np.uint32)
    np.random.default_rng(np.frombuffer(digest, "<u8")).shuffle(order)
    return order


def block_permutation(sizes: np.ndarray, key: Sequence[object]) -> np.ndarray:
    """Permute the rows of consecutive blocks, finishing one window of blocks before the next.

    sizes: (blocks,) rows of each block. Returns (sizes.sum(),) uint32: blocks are shuffled, and the rows within each
    `WINDOW` consecutive shuffled blocks.
    """
    ends, order = np.cumsum(sizes), permutation(len(sizes), (*key, "blocks"))
    shuffled, at = np.empty(ends[-1], np.uint32), 0
    for w in range(0, len(order), WINDOW):
        rows = np.concatenate([np.arange(ends[b] - sizes[b], ends[b]) for b in order[w : w + WINDOW]])
        shuffled[at : at + len(rows)] = rows[permutation(len(rows), (*key, "window", w // WINDOW))]
        at += len(rows)
    return shuffled
