"""Sample task-balanced, rankable training batches without repeats, resumable to the sample.

A batch is a list of (manifest index, row). Each data set is visited in an order drawn from (seed, data set, epoch),
so that an epoch shows each sample once (pool_cursor.py). In a GRPO batch the images of a ranked task (IAA by default)
come from one data set, since ranking across data sets is meaningless. The data set furthest behind its share is next,
so that over time each gives images in proportion to its size. A batch that cannot be ranked raises `UserError` (at
construction, if possible) instead of a silent zero reward.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import pyarrow.compute as pc

from tatar_dist.data.manifest import Manifest
from tatar_dist.data.pool_cursor import PoolCursor, Ref
from tatar_dist.data.pools import Pool
from tatar_dist.data.schema import IdCheck
from tatar_dist.errors import UserError
from tatar_dist.types import TASKS, Sample, Task

ORDER = "permutation"  # the name of the order of pool_cursor.py in states of the sampler


class PromptSampler:
    """Draw batches from several manifests.

    Args:
        manifests: any number; a data set may be spread over several.
        seed: seeds every permutation.
        iqa_fraction: share of IQA rows in a batch (rounded to a whole number, half to even, as in `config.rules`).
            A task without data must have a share of 0, that is `iqa_fraction` 0 or 1.
        min_rank_pool: least number of images of a ranked task in a batch, all of one data set.
        ranked: the tasks whose reward compares images (`Preset.ranked_tasks`); the others mix their data sets.
        supervised: the rows are training targets (SFT): nothing is ranked.

    Raises:
        UserError: a task without data, a ranked data set with fewer images than `min_rank_pool` or with all scores
            equal, one data set name used for two tasks, the same (data set, sample_id) twice.
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
        self._cursors = self._build()
        for task, share in (("iqa", iqa_fraction), ("iaa", 1 - iqa_fraction)):
            if share > 0 and not self._of(task):
                where = ", ".join(str(m.path) for m in self.manifests) or "no manifest given"
                raise UserError(
                    f"no {task} samples ({where}), yet data.iqa_fraction={iqa_fraction} asks for some: "
                    f"add a manifest to data.train or set data.iqa_fraction={0.0 if task == 'iqa' else 1.0}"
                )
        for cursor in self._cursors:
            if cursor.task in self.ranked and (iqa_fraction if cursor.task == "iqa" else 1 - iqa_fraction) > 0:
                self._check_rankable(cursor)

    def _build(self) -> list[PoolCursor]:
        parts: dict[str, list[tuple[int, Manifest, Pool]]] = {}
        for m, manifest in enumerate(self.manifests):
            for pool in manifest.pools:
                others = parts.setdefault(pool.dataset, [])
                if others and others[0][2].task != pool.task:
                    row = pool.runs[0, 0]
                    raise UserError(f"{manifest.path}: row {row}, column task: {pool.dataset!r} has rows of both tasks")
                others.append((m, manifest, pool))
        for name, pools in parts.items():
            if len({m for m, *_ in pools}) > 1:
                _check_ids(name, pools)
        ordered = sorted(parts.items(), key=lambda item: (item[1][0][2].task, item[0]))
        return [PoolCursor(name, pools[0][2].task, pools, self.seed, key) for key, (name, pools) in enumerate(ordered)]  # type: ignore[arg-type]

    def _check_rankable(self, cursor: PoolCursor) -> None:
        if cursor.usable < self.min_rank_pool:
            raise UserError(
                f"{cursor.task.upper()} data set {cursor.dataset!r} has {cursor.usable} usable image(s), "
                f"ranking needs data.min_rank_pool={self.min_rank_pool}"
            )
        if not cursor.scores_differ:
            raise UserError(
                f"{cursor.task.upper()} data set {cursor.dataset!r}: all scores are equal, nothing can be ranked"
            )

    def _of(self, task: str) -> list[PoolCursor]:
        return [c for c in self._cursors if c.task == task]

    def _cursor_of(self, ref: Ref) -> PoolCursor:
        return next(c for c in self._cursors if ref in c)

    def sample_id(self, ref: Ref) -> str:
        return self.manifests[ref[0]].sample_id(ref[1])

    def get(self, ref: Ref) -> Sample:
        """Return the whole sample, encoded image included. Raises like `Manifest.get`."""
        return self.manifests[ref[0]].get(ref[1])

    def _owed(self, cursors: list[PoolCursor], upcoming: int) -> PoolCursor:
        """Return the data set furthest behind its share (by size) after `upcoming` more draws."""
        total = sum(c.rows for c in cursors)
        served = sum(c.served for c in cursors) + upcoming
        return max(cursors, key=lambda c: (served * c.rows / total - c.served, -c.key))

    def counts(self, n: int) -> tuple[int, int]:
        """Return the numbers of IQA and IAA rows in a batch of n."""
        n_iqa = round(n * self.iqa_fraction)
        return n_iqa, n - n_iqa

    def next_batch(self, n: int) -> list[Ref]:
        """Draw n distinct rows, IQA first; ranked parts: `min_rank_pool` or more of one data set.

        Raises UserError when n leaves too few rows of a ranked task, or exclusions leave too few samples.
        """
        batch: list[Ref] = []
        taken: set[Ref] = set()
        for task, count in zip(TASKS, self.counts(n), strict=True):
            if task in self.ranked and 0 < count < self.min_rank_pool:
                raise UserError(
                    f"a batch of {n} holds {count} {task.upper()} image(s), ranking needs {self.min_rank_pool}"
                )
            ranked = self._rankable(task, count) if task in self.ranked and count else None
            for _ in range(count):
                ref = (ranked or self._owed(self._of(task), 1)).next(taken)
                taken.add(ref)
                batch.append(ref)
        return batch

    def _rankable(self, task: Task, n: int) -> PoolCursor:
        """Choose the data set of n ranked rows: with n usable rows, and furthest behind its share."""
        cursors = self._of(task)
        able = [c for c in cursors if c.usable >= n and c.scores_differ]
        if not able:
            lost = sum(len(c.excluded) for c in cursors)
            raise UserError(
                f"a batch needs {n} images of one {task.upper()} data set, with scores that differ; the largest has "
                f"{max(c.usable for c in cursors)} usable ({lost} sample(s) quarantined): lower "
                "grpo.prompts_per_step"
            )
        return self._owed(able, n)

    def steps_per_epoch(self, n: int) -> int:
        """Return how many batches of n show each task in full, at its share of a batch (at least 1)."""
        steps = [
            -(-sum(c.rows for c in self._of(task)) // count)
            for task, count in zip(TASKS, self.counts(n), strict=True)
            if count
        ]
        return max(steps, default=1)

    def exclude(self, ref: Ref) -> None:
        """Never draw this row again (it was quarantined)."""
        self._cursor_of(ref).exclude(ref)

    def replace(self, ref: Ref, batch: Sequence[Ref]) -> Ref:
        """Exclude `ref` permanently and draw another row of its data set that is not in `batch`."""
        cursor = self._cursor_of(ref)
        cursor.exclude(ref)
        return cursor.next(set(batch))

    def another(self, dataset: str, avoid: Collection[tuple[str, str]]) -> Ref | None:
        """Draw a data set's next row whose (data set, sample id) is not in `avoid`, or return None."""
        cursor = next(c for c in self._cursors if c.dataset == dataset)
        avoided: list[Ref] = []
        drawn = None
        while drawn is None and len(avoided) < cursor.usable:
            ref = cursor.next(avoided)
            if (dataset, self.sample_id(ref)) in avoid:
                avoided.append(ref)
            else:
                drawn = ref
        cursor.put_back(avoided)
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """Return the position in every data set as a JSON-serialisable dict."""
        return {
            "seed": self.seed,
            "order": ORDER,
            "manifests": [m.fingerprint for m in self.manifests],
            "pools": {c.dataset: c.state_dict() for c in self._cursors},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises UserError if seed, manifests (by content, not path) or the order of an epoch already begun differ.
        """
        try:
            seed, manifests, pools = state["seed"], state["manifests"], state["pools"]
        except KeyError as e:
            raise UserError(f"the checkpoint's sampler state has no {e}: it is from another version") from None
        if seed != self.seed:
            raise UserError(f"the checkpoint's sampler has seed {seed}, this run has {self.seed}")
        if len(manifests) != len(self.manifests):
            raise UserError(
                f"the checkpoint was made with {len(manifests)} manifests, data.train names {len(self.manifests)}"
            )
        for k, (then, manifest) in enumerate(zip(manifests, self.manifests, strict=True)):
            if then != manifest.fingerprint:
                raise UserError(
                    f"{manifest.path}: manifest {k + 1} of data.train is not what the checkpoint was made with: give "
                    "the same files in the same order, or train into another directory"
                )
        for cursor in self._cursors if state.get("order") != ORDER else ():
            before = pools[cursor.dataset]
            if not cursor.keeps_old_order() and (before["epoch"] or before["position"]):
                raise UserError(
                    f"the checkpoint's sampler walked data set {cursor.dataset!r} in the order of another version: "
                    "train into another directory, from the start or from this checkpoint's weights (model.path)"
                )
        for cursor in self._cursors:
            cursor.load_state_dict(pools[cursor.dataset])


def _check_ids(dataset: str, parts: Sequence[tuple[int, Manifest, Pool]]) -> None:
    """Raise UserError for a sample of a data set in two manifests (or a manifest given twice)."""
    ids = IdCheck()

    def of(manifest: Manifest, pool: Pool) -> Iterator[list[str]]:
        for _, table in manifest.tables(["sample_id", "dataset", "split"]):
            matches = pc.and_(pc.equal(table["dataset"], dataset), pc.equal(table["split"], pool.split))
            yield table.filter(matches)["sample_id"].to_pylist()

    for _, manifest, pool in parts:
        for names in of(manifest, pool):
            ids.add(names)
    for name, _, _ in ids.repeats(names for _, m, p in parts for names in of(m, p)):
        holders = [m.path for _, m, p in parts if any(name in names for names in of(m, p))]
        given = f"{name!r} of data set {dataset!r} was given already by {holders[0]}"
        raise UserError(f"{holders[-1]}: column sample_id: {given}")


def check_rationales(manifests: Iterable[Manifest], tasks: Sequence[Task]) -> None:
    """Raise UserError for a manifest with rows of `tasks` and no rationale, a target of SFT."""
    for manifest in manifests:
        if not any(pool.task in tasks for pool in manifest.pools):
            continue
        texts = (text for _, table in manifest.tables(["rationale"]) for text in table.column(0).to_pylist())
        if not any(text and text.strip() for text in texts):
            raise UserError(
                f"{manifest.path}: column rationale: no row has one, and SFT learns from them: tatar-dist rationale "
                "build asks a teacher, rationale template needs none; import texts of your own (rationale: COLUMN); or "
                "set sft.thought_dropout, which lets answers do without"
            )
