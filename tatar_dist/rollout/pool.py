"""The pool of engines: hands out prompts as engines become free, and pushes weights to all of them.

In: prompts and a sampling. Out: groups sorted by sample id, whichever engine made them and whenever. Every wait has a
deadline, and the engine that missed it is named.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ray

from tatar_dist.config import Config
from tatar_dist.errors import RunError
from tatar_dist.records import Group, Prompt
from tatar_dist.rollout.engine import Sampling
from tatar_dist.waiting import wait_all


class EngineFailed(RunError):
    """An engine died or missed its deadline."""


class RolloutPool:
    """`engines` are Ray actor handles of `RolloutEngine`, all holding weight version `version`."""

    def __init__(self, config: Config, engines: Sequence[Any], version: int = 0) -> None:
        self.config, self.engines, self.version = config, list(engines), version
        self.timeout = config.rollout.call_timeout_s

    def _get(self, refs: Sequence[Any], doing: str, timeout: float | None = None) -> list[Any]:
        """Results of one call per engine, in engine order. The first that fails, or all that are late, are named."""
        return wait_all(refs, timeout or self.timeout, f"{doing}: engine", EngineFailed)

    def start(self, threads: int) -> list[Any]:
        """Begin to load the model on every engine; hand the result to `started`."""
        return [e.setup.remote(threads, self.version) for e in self.engines]

    def started(self, refs: list[Any]) -> list[dict[str, Any]]:
        """Wait until every engine is ready."""
        return self._get(refs, "starting engines", self.config.cluster.start_timeout_s)

    def chunks(self, prompts: Sequence[Prompt], n: int) -> list[list[Prompt]]:
        """Prompts by engine call: one in deterministic mode, else enough to fill an engine, at most its share."""
        if self.config.rollout.deterministic:
            size = 1
        else:
            share = -(-len(prompts) // len(self.engines))
            size = max(1, min(share, self.config.rollout.max_num_seqs // n))
        return [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_groups: Callable[[int], None] | None = None
    ) -> list[Group]:
        """All groups of `prompts`, sorted by sample id. `on_groups(n)` is told how many more are done.

        Raises:
            EngineFailed: an engine died or no engine finished anything before the deadline.
        """
        groups: list[Group] = []
        for part in self.stream(prompts, sampling):
            groups += part
            if on_groups:
                on_groups(len(part))
        return sorted(groups, key=lambda g: g.prompt.group_id)

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling, more: Callable[[], bool] = lambda: True
    ) -> Iterator[list[Group]]:
        """The groups of each engine call as it returns. Once `more()` is false nothing new is handed out.

        Raises like `generate`.
        """
        waiting = self.chunks(prompts, sampling.n)[::-1]
        running: dict[Any, int] = {}

        def dispatch(engine: int) -> None:
            if waiting and more():
                ref = self.engines[engine].generate.remote(waiting.pop(), sampling, self.version)
                running[ref] = engine

        for i in range(len(self.engines)):
            dispatch(i)
        while running:
            done, _ = ray.wait(list(running), num_returns=1, timeout=self.timeout)
            if not done:
                raise EngineFailed(f"generating: engine(s) {sorted(running.values())} late after {self.timeout:g} s")
            engine = running.pop(done[0])
            try:
                part: list[Group] = ray.get(done[0])
            except ray.exceptions.RayActorError as e:
                raise EngineFailed(f"generating: engine {engine} died: {str(e).splitlines()[0]}") from e
            yield part
            dispatch(engine)

    def push(self, buckets: Iterable[Any], version: int) -> dict[str, float]:
        """Load the buckets (object references) into every engine and advance to `version`.

        One bucket is in flight at a time; the next is being gathered meanwhile. Returns sync/seconds and sync/bytes.
        """
        start = time.perf_counter()
        self._get([e.start_update.remote(version) for e in self.engines], "starting a weight push")
        sent = 0
        for bucket in buckets:
            sent += sum(self._get([e.update.remote(bucket) for e in self.engines], "pushing weights"))
        self._get([e.finish_update.remote() for e in self.engines], "finishing a weight push")
        self.version = version
        return {"sync/seconds": time.perf_counter() - start, "sync/bytes": float(sent)}
