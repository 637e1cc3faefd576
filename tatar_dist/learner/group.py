"""All ZeRO-3 ranks, addressed as one: every call goes to all of them, the first error of any is the call's error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from tatar_dist.config import Config
from tatar_dist.errors import RunError, UserError
from tatar_dist.plan import Split
from tatar_dist.records import LearnerRow, StepReport
from tatar_dist.waiting import wait_all


class LearnersFailed(RunError):
    """A learner died or missed its deadline."""


class LearnerGroup:
    """All ZeRO-3 ranks, addressed as one. Learners are a unit: an error of one is the error of the step."""

    def __init__(self, config: Config, actors: list[Any], threads: int, local: bool) -> None:
        self.config, self.actors, self.threads, self.local = config, actors, threads, local

    def _all(self, method: str, *args: Any) -> list[Any]:
        return self.wait([getattr(a, method).remote(*args) for a in self.actors])

    def wait(self, refs: list[Any], timeout: float | None = None) -> list[Any]:
        """All results; the first error of any rank is raised at once, because its peers would wait for it."""
        return wait_all(refs, timeout or self.config.rollout.call_timeout_s, "learner rank", LearnersFailed)

    def setup(self, stage: str, split: Split, total_steps: int) -> None:
        """Load the model on all ranks; every wait is bounded by `cluster.start_timeout_s`."""
        limit = self.config.cluster.start_timeout_s
        (master,) = self.wait([self.actors[0].address.remote(self.local)], limit)
        arguments = (master, stage, split.micro_batch, split.accumulation, total_steps, self.threads)
        self.wait([a.setup.remote(*arguments) for a in self.actors], limit)

    def sft_step(self, shards: list[list[LearnerRow]], step: int, global_tokens: int) -> StepReport:
        pairs = zip(self.actors, shards, strict=True)
        return self.wait([a.sft_step.remote(rows, step, global_tokens) for a, rows in pairs])[0]

    def sft_loss(self, shards: list[list[LearnerRow]]) -> dict[str, float]:
        return self.wait([a.sft_loss.remote(r) for a, r in zip(self.actors, shards, strict=True)])[0]

    def grpo_step(self, shards: list[list[LearnerRow]], step: int) -> StepReport:
        return self.wait([a.grpo_step.remote(rows, step) for a, rows in zip(self.actors, shards, strict=True)])[0]

    def weight_buckets(self, bucket_bytes: int) -> Iterator[Any]:
        """References to the buckets of rank 0, streamed while the ranks gather together."""
        others = [a.weight_buckets.options(num_returns="streaming").remote(bucket_bytes) for a in self.actors[1:]]
        lead = (
            self.actors[0]
            .weight_buckets.options(num_returns="streaming", _generator_backpressure_num_objects=2)
            .remote(bucket_bytes)
        )
        yield from self._stream(lead)
        for stream in others:
            for _ in self._stream(stream):
                pass

    def _stream(self, stream: Any) -> Iterator[Any]:
        """The references of a streaming call, each within the deadline."""
        timeout = self.config.rollout.call_timeout_s
        while True:
            ready, _ = ray.wait([stream], timeout=timeout, fetch_local=False)
            if not ready:
                raise LearnersFailed(f"gathering weights: nothing for {timeout:g} s")
            try:
                yield next(stream)
            except StopIteration:
                return

    def save(self, directory: Path, export: bool = True) -> None:
        """Every rank writes its part of a checkpoint. Raises UserError when they wrote where we cannot see it."""
        self._all("save", str(directory), export)
        parts = ["deepspeed", "model"] if export else ["deepspeed"]
        if missing := [p for p in parts if not (directory / p).is_dir()]:
            raise UserError(
                f"{directory}: the learners wrote {' and '.join(missing)} somewhere else: output must lie on a file "
                "system that all nodes share"
            )

    def load(self, directory: Path) -> None:
        self._all("load", str(directory))
