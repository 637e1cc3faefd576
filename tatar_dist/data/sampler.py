"""Which samples make the next batch: task-balanced, rankable, without repeats, resumable to the position.

In: manifests and a seed. Out: batches of (manifest index, row). Every data set is a pool, walked in a permutation
keyed by (seed, pool, epoch): an epoch shows each sample once. In a GRPO batch the images of a task that is ranked (IAA
by default) come from one data set, since ranking across data sets is meaningless; the data set with the largest part
still owed takes the turn, so that over time each gets images in proportion to its size.
A batch that cannot rank is refused here, at construction, and never becomes a silent zero reward.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tatar_dist.data.manifest import Manifest
from tatar_dist.errors import UserError
from tatar_dist.records import TASKS, Sample, Task

Ref = tuple[int, int]  # (manifest index, row)


@dataclass
class _Pool:
    """One data set of one task. `served` counts rows handed out, which decides whose turn it is."""

    dataset: str
    task: Task
    rows: list[Ref]  # in manifest order
    key: int
    epoch: int = 0
    position: int = 0
    served: int = 0
    order: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    order_epoch: int = -1


def epoch_order(seed: int, key: int, epoch: int, n: int) -> np.ndarray:
    """(n,) permutation of an epoch, a function of its arguments alone.

    No row of the last third of one epoch comes in the first third of the next, so that a batch across the boundary
    holds no row twice and yet every epoch shows every row. Head rows that would clash trade places with rows of the
    middle; tails are left as drawn, so an epoch depends on its predecessor's draw only.
    """

    def draw(e: int) -> np.ndarray:
        return np.random.default_rng([seed, key, e]).permutation(n)

    order, third = draw(epoch), n // 3
    if epoch == 0 or third == 0:
        return order
    recent = np.isin(order, draw(epoch - 1)[n - third :])
    head = np.flatnonzero(recent[:third])
    # The middle holds n - 2 thirds >= a third of the rows, so it has a free row for every clash in the head.
    middle = third + np.flatnonzero(~recent[third : n - third])[: len(head)]
    order[head], order[middle] = order[middle], order[head]
    return order


class PromptSampler:
    """Draws batches from several manifests.

    Args:
        manifests: any number; a data set may be spread over several.
        seed: keys every permutation.
        iqa_fraction: share of IQA rows in a batch (rounded to a whole number, half to even, like `config.check`). A
            task with no data leaves its share to the other only if its share is 0 % or 100 %; otherwise it is an error.
        min_rank_pool: images of a ranked task that a batch must hold, all of one data set.
        ranked: the tasks whose reward compares images (`Preset.ranked_tasks`); the others mix their data sets.
        supervised: the rows are training targets (SFT): nothing is ranked.

    Raises:
        UserError: a task without data, a ranked data set with fewer images than `min_rank_pool` or with all scores
            equal, one data set name used for two tasks, the same (data set, sample_id) twice; supervised, a manifest
            without any rationale.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        seed: int,
        iqa_fraction: float = 0.5,
        min_rank_pool: int = 2,
        supervised: bool = False,
        ranked: Sequence[Task] = ("iaa",),
    ):
        self.manifests = list(manifests)
        self.seed = seed
        self.iqa_fraction = iqa_fraction
        self.min_rank_pool = min_rank_pool
        self.supervised = supervised
        self.ranked = () if supervised else tuple(ranked)
        self._excluded: set[tuple[str, str]] = set()
        self._live: dict[str, tuple[int, bool]] = {}  # data set -> usable rows, and whether their scores differ
        self._pools = self._build()
        for task, share in (("iqa", iqa_fraction), ("iaa", 1 - iqa_fraction)):
            if share > 0 and not self._of(task):
                where = ", ".join(str(m.path) for m in self.manifests) or "no manifest given"
                raise UserError(
                    f"no {task} samples ({where}), yet data.iqa_fraction={iqa_fraction} asks for some: "
                    f"add a manifest to data.train or set data.iqa_fraction={0.0 if task == 'iqa' else 1.0}"
                )
        if supervised:
            check_rationales(self.manifests)
        for task, share in (("iqa", iqa_fraction), ("iaa", 1 - iqa_fraction)):
            for pool in self._of(task) if task in self.ranked and share > 0 else ():
                self._check_rankable(pool)

    def _build(self) -> list[_Pool]:
        pools: dict[str, _Pool] = {}
        seen: dict[tuple[str, str], Ref] = {}
        for m, manifest in enumerate(self.manifests):
            for row, (name, task) in enumerate(zip(manifest.datasets, manifest.tasks, strict=True)):
                pool = pools.setdefault(name, _Pool(name, task, [], key=0))  # type: ignore[arg-type]
                if pool.task != task:
                    raise UserError(f"{manifest.path}: row {row}, column task: data set {name!r} holds both tasks")
                same = (name, manifest.sample_ids[row])
                if same in seen:
                    first = self.manifests[seen[same][0]].path
                    raise UserError(
                        f"{manifest.path}: row {row}, column sample_id: {same[1]!r} of data set {name!r} "
                        f"was given already by {first}, row {seen[same][1]}"
                    )
                seen[same] = (m, row)
                pool.rows.append((m, row))
        ordered = sorted(pools.values(), key=lambda p: (p.task, p.dataset))
        for key, pool in enumerate(ordered):
            pool.key = key
        return ordered

    def _usable(self, pool: _Pool) -> tuple[int, bool]:
        """Rows that are not excluded, and whether their scores differ."""
        if pool.dataset not in self._live:
            live = [r for r in pool.rows if (pool.dataset, self.sample_id(r)) not in self._excluded]
            self._live[pool.dataset] = len(live), len({float(self.manifests[m].scores[r]) for m, r in live}) > 1
        return self._live[pool.dataset]

    def _check_rankable(self, pool: _Pool) -> None:
        count, differ = self._usable(pool)
        if count < self.min_rank_pool:
            raise UserError(
                f"{pool.task.upper()} data set {pool.dataset!r} has {count} usable image(s), "
                f"ranking needs data.min_rank_pool={self.min_rank_pool}"
            )
        if not differ:
            raise UserError(
                f"{pool.task.upper()} data set {pool.dataset!r}: all scores are equal, nothing can be ranked"
            )

    def _of(self, task: str) -> list[_Pool]:
        return [p for p in self._pools if p.task == task]

    def sample_id(self, ref: Ref) -> str:
        return self.manifests[ref[0]].sample_ids[ref[1]]

    def get(self, ref: Ref) -> Sample:
        """The whole sample, image included."""
        return self.manifests[ref[0]].get(ref[1])

    def _next_row(self, pool: _Pool, taken: set[Ref]) -> Ref:
        """The pool's next row that is neither excluded nor in the batch already; starts a new epoch at the end."""
        for _ in range(2 * len(pool.rows)):
            if pool.order_epoch != pool.epoch:
                pool.order = epoch_order(self.seed, pool.key, pool.epoch, len(pool.rows))
                pool.order_epoch = pool.epoch
            ref = pool.rows[int(pool.order[pool.position])]
            pool.position += 1
            if pool.position == len(pool.rows):
                pool.position, pool.epoch = 0, pool.epoch + 1
            if ref not in taken and (pool.dataset, self.sample_id(ref)) not in self._excluded:
                taken.add(ref)
                pool.served += 1
                return ref
        raise UserError(
            f"data set {pool.dataset!r}: fewer usable samples than one batch needs "
            f"({len(pool.rows)} rows, {len(self._excluded)} sample(s) quarantined over all data sets)"
        )

    def _owed(self, pools: list[_Pool], upcoming: int) -> _Pool:
        """The pool furthest behind its share, by size, once `upcoming` more rows are drawn."""
        total = sum(len(p.rows) for p in pools)
        served = sum(p.served for p in pools) + upcoming
        return max(pools, key=lambda p: (served * len(p.rows) / total - p.served, -p.key))

    def counts(self, n: int) -> tuple[int, int]:
        """How many IQA and IAA rows a batch of n holds."""
        n_iqa = round(n * self.iqa_fraction)
        return n_iqa, n - n_iqa

    def next_batch(self, n: int) -> list[Ref]:
        """The next n rows, no row twice, IQA first; a ranked part (of one data set) has `min_rank_pool` rows or more.

        Raises UserError when n leaves too few rows of a ranked task, or exclusions leave too few samples.
        """
        taken: set[Ref] = set()
        batch = []
        for task, count in zip(TASKS, self.counts(n), strict=True):
            if task in self.ranked and 0 < count < self.min_rank_pool:
                raise UserError(
                    f"a batch of {n} holds {count} {task.upper()} image(s), ranking needs {self.min_rank_pool}"
                )
            if task in self.ranked and count:
                batch += self._rankable_part(task, count, taken)
                continue
            for _ in range(count):
                batch.append(self._next_row(self._owed(self._of(task), 1), taken))
        return batch

    def _rankable_part(self, task: Task, n: int, taken: set[Ref]) -> list[Ref]:
        """n rows of the data set whose turn it is; the next one owed when it has not n usable rows."""
        pools = self._of(task)
        able = [p for p in pools if self._usable(p)[0] >= n and self._usable(p)[1]]
        if not able:
            largest = max(self._usable(p)[0] for p in pools)
            raise UserError(
                f"a batch needs {n} images of one {task.upper()} data set, with scores that differ; the largest has "
                f"{largest} usable ({len(self._excluded)} sample(s) quarantined): lower grpo.prompts_per_step"
            )
        pool = self._owed(able, n)
        return [self._next_row(pool, taken) for _ in range(n)]

    def steps_per_epoch(self, n: int) -> int:
        """Batches of n after which the larger task, at its share of a batch, has been seen once (at least 1)."""
        steps = [
            -(-sum(len(p.rows) for p in self._of(task)) // count)
            for task, count in zip(TASKS, self.counts(n), strict=True)
            if count
        ]
        return max(steps, default=1)

    def exclude(self, dataset: str, sample_id: str) -> None:
        """Never hand this sample out again (it was quarantined). Unknown ids are remembered and do no harm."""
        self._excluded.add((dataset, sample_id))
        self._live.clear()

    def replace(self, ref: Ref, batch: Sequence[Ref]) -> Ref:
        """Exclude `ref` for good and draw another row of its data set that is not in `batch`."""
        dataset = self.manifests[ref[0]].datasets[ref[1]]
        self.exclude(dataset, self.sample_id(ref))
        pool = next(p for p in self._pools if p.dataset == dataset)
        return self._next_row(pool, set(batch))

    def another(self, dataset: str, avoid: Collection[tuple[str, str]]) -> Ref | None:
        """The next row of a data set whose (data set, sample id) is not in `avoid`; None when there is none."""
        pool = next(p for p in self._pools if p.dataset == dataset)
        taken = {ref for ref in pool.rows if (dataset, self.sample_id(ref)) in avoid}
        excluded = {ref for ref in pool.rows if (dataset, self.sample_id(ref)) in self._excluded}
        return self._next_row(pool, taken) if len(taken | excluded) < len(pool.rows) else None

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON-able position of every pool."""
        pools = {
            p.dataset: {"epoch": p.epoch, "position": p.position, "served": p.served, "size": len(p.rows)}
            for p in self._pools
        }
        return {"seed": self.seed, "pools": pools, "excluded": [list(e) for e in sorted(self._excluded)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises UserError when seed or data sets are not the same."""
        if state["seed"] != self.seed:
            raise UserError(f"checkpoint's sampler has seed {state['seed']}, this run has {self.seed}")
        sizes = {name: p["size"] for name, p in state["pools"].items()}
        mine = {p.dataset: len(p.rows) for p in self._pools}
        if sizes != mine:
            raise UserError(f"checkpoint's sampler walked data sets {sizes}, this run has {mine}")
        for pool in self._pools:
            saved = state["pools"][pool.dataset]
            pool.epoch, pool.position, pool.served = saved["epoch"], saved["position"], saved["served"]
            pool.order_epoch = -1
        self._excluded = {(dataset, sample_id) for dataset, sample_id in state["excluded"]}
        self._live.clear()


def check_rationales(manifests: Iterable[Manifest]) -> None:
    """Raise UserError for a manifest none of whose rows can be a supervised target."""
    for manifest in manifests:
        if not manifest.has_rationales():
            raise UserError(f"{manifest.path}: column rationale: no row has one, and SFT learns from them")


def sft_sampler(manifests: Iterable[Manifest], seed: int, iqa_fraction: float) -> PromptSampler:
    """A sampler for supervised batches: same walk, no ranking rules, IAA data sets mixed within a batch."""
    return PromptSampler(list(manifests), seed, iqa_fraction, supervised=True)
