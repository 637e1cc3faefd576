"""The pool of engines: gives prompts to free engines, survives their deaths, pushes weights.

Every prompt's group is returned exactly once, whichever engine made it. An engine that dies, hangs, fails or returns
nonsense is killed and restarted with back-off, and its prompts go to others; it serves again once it has the current
weights (health.py). Every wait has a deadline, and the error names who missed it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray

from tatar_dist.config.schema import Config
from tatar_dist.errors import PushCutShort, RunError, UserError
from tatar_dist.faults.health import Health, State
from tatar_dist.faults.waiting import TICK_S, Waits, error_of, first_line
from tatar_dist.rollout.calls import Chunk, Queue, problem
from tatar_dist.rollout.engine import Sampling
from tatar_dist.sync.push import PushResult, Round
from tatar_dist.types import Group, Prompt

Load = Callable[[Mapping[int, Any], int], PushResult]  # loads weights, as a version, into engines {index: actor}
ANSWER_S = 10.0  # for an idle engine
ATTEMPTS = 3  # engines that may fail on one prompt before the prompt is blamed


class EngineFailed(RunError):
    """Too few engines are alive, or one prompt makes every engine fail."""


@dataclass(eq=False)
class Engine:
    """One engine: its health, actor and current call; `chunk` None: an answer will be discarded."""

    health: Health
    actor: Any = None
    version: int = -1
    call: Any = None
    chunk: Chunk | None = None
    since: float = 0.0


class RolloutPool:
    """`count` engines made by `make(index)`, Ray actor handles of `RolloutEngine`.

    Args:
        version: the weight version to sample from; at first that of `model.path`.
        log: logs events of the engines.
        max_engines: how many engines may start, by their order; None: all.
    """

    def __init__(
        self,
        config: Config,
        count: int,
        make: Callable[[int], Any],
        version: int = 0,
        log: Callable[..., None] = lambda event, **fields: None,
        waits: Waits | None = None,
        max_engines: Callable[[], int | None] = lambda: None,
    ) -> None:
        r = config.rollout
        self.config, self.make, self.version, self.log = config, make, version, log
        self.waits, self.max_engines = waits or Waits(), max_engines
        self.engines = [Engine(Health(i, r.engine_restarts, r.restart_backoff_s, log)) for i in range(count)]
        self.refresh_blocked = False
        self._refresh: Load | None = None
        self._threads = 1

    # -- start and restart -------------------------------------------------------------------------------------------

    def start(self, threads: int, refresh: Load | None = None) -> None:
        """Begin to load the model on every engine; then call `started`.

        Args:
            threads: CPU threads of an engine.
            refresh: pushes the current weights into an engine that starts late. None without training: those of
                `model.path` are current.
        """
        self._threads, self._refresh = threads, refresh
        for e in self.engines:
            self._launch(e, self.version)

    def started(self) -> None:
        """Wait until all engines are ready. A failure at a run's start is an error, not a fault."""
        starting = [e for e in self.engines if e.health.state is State.RESTARTING and e.health.restarts == 0]
        limit = self.config.cluster.start_timeout_s
        facts = self.waits.gather(
            [e.call for e in starting], limit, "starting (cluster.start_timeout_s): engine", EngineFailed
        )
        for e, process in zip(starting, facts, strict=True):
            e.call = None
            e.health.ready(**process)
            e.health.current()

    def _launch(self, e: Engine, version: int) -> None:
        """Start an engine. `version`: that of the files of model.path, -1 if they are outdated."""
        e.actor, e.version, e.since = self.make(e.health.index), version, time.monotonic()
        e.call, e.chunk = e.actor.setup.remote(self._threads, version), None

    def release(self, *states: State) -> None:
        """End the engines in `states`, as learners need their resources; they start again later."""
        for e in (e for e in self.engines if e.health.state in states):
            e.health.restarts = max(0, e.health.restarts - 1)  # the engine did not fail
            self._lose(e, "its resources are needed")

    def relaunch(self) -> None:
        """Start dead engines at once."""
        for e in self.engines[: self.max_engines()]:
            if e.health.state is State.DEAD:
                e.health.restarting()
                self._launch(e, -1)

    def relaunched(self) -> None:
        """Wait for engines that start: colocated ones need memory before learners do."""
        queue = Queue([])
        while any(e.health.state is State.RESTARTING for e in self.engines):
            for e in self._answers():
                list(self._take(e, queue, Sampling(1, 1.0, 1)))
            self._judge(queue)
            self.waits.check()

    def end_busy(self) -> None:
        """End the engines that are in a call: the cause of a stall, perhaps, or not worth a wait."""
        for e in self.engines:
            if e.call is not None:
                self._lose(e, "was in a call when the run stalled or stopped")

    @contextmanager
    def without_refresh(self) -> Iterator[None]:
        """Keep stale engines from getting current weights inside, because an update runs."""
        self.refresh_blocked = True
        try:
            yield
        finally:
            self.refresh_blocked = False

    def restart_due(self) -> None:
        """Restart engines that are due. Raises EngineFailed when too few are left."""
        now = time.monotonic()
        for e in self.engines[: self.max_engines()]:
            if e.health.due(now):
                e.health.restarting()
                self._launch(e, -1 if self._refresh else self.version)
        living = [e for e in self.engines if e.health.state is not State.GONE]
        if len(living) < self.config.rollout.min_engines:
            reasons = "; ".join(f"engine {e.health.index}: {e.health.reason}" for e in self.engines if e not in living)
            raise EngineFailed(
                f"{len(living)} of {len(self.engines)} engines are left, rollout.min_engines="
                f"{self.config.rollout.min_engines}; {reasons}"
            )

    def _lose(self, e: Engine, reason: str) -> Chunk | None:
        """Kill an engine. Returns its unfinished chunk."""
        with suppress(Exception):  # it may be dead
            ray.kill(e.actor)
        left, e.call, e.chunk, e.version = e.chunk, None, None, -1
        e.health.died(reason, time.monotonic())
        return left if left and not left.done else None

    # -- generation --------------------------------------------------------------------------------------------------

    def chunks(self, prompts: Sequence[Prompt], n: int) -> list[list[Prompt]]:
        """Split prompts into calls: single if deterministic, else by an engine's capacity or share."""
        if self.config.rollout.deterministic:
            size = 1
        else:
            share = -(-len(prompts) // len(self.engines))
            size = max(1, min(share, self.config.rollout.max_num_seqs // n))
        return [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Generate the groups of `prompts`, sorted by group id.

        Raises:
            EngineFailed: fewer engines than `rollout.min_engines` can be kept alive, or a prompt ends every engine.
        """
        groups = [g for part in self.stream(self.chunks(prompts, sampling.n), sampling) for g in part]
        return sorted(groups, key=lambda g: g.prompt.group_id)

    def stream(
        self, parts: Iterable[list[Prompt]], sampling: Sampling, more: Callable[[], bool] = lambda: True
    ) -> Iterator[list[Group]]:
        """Yield the groups of each engine call as it returns. Raises like `generate`.

        Args:
            parts: the prompts of each call, consumed one call ahead.
            more: once it returns False no further call is made.
        """
        queue = Queue(parts)
        try:
            while queue or self._working():
                if queue and not more():
                    queue.clear()
                    continue
                self.restart_due()
                if self.refresh_blocked and not any(
                    e.health.state in (State.HEALTHY, State.SUSPECT) for e in self.engines
                ):
                    raise EngineFailed("no engine is left that holds the current weights, and the learners are at work")
                self._hand_out(queue, sampling)
                for e in self._answers():
                    yield from self._take(e, queue, sampling)
                self._judge(queue)
                self.waits.check()
        finally:  # discard the answers of unfinished calls when they come
            for e in self.engines:
                e.chunk = None

    def _working(self) -> list[Engine]:
        return [e for e in self.engines if e.chunk is not None and not e.chunk.done]

    def _hand_out(self, queue: Queue, sampling: Sampling) -> None:
        """Give work to every idle engine; a stale one first gets the current weights."""
        stale = [e for e in self.engines if e.health.state is State.STALE and e.call is None]
        if queue and stale and self._refresh and not self.refresh_blocked:
            self._load(stale, self._refresh)
        for e in (e for e in self.engines if e.health.state is State.HEALTHY and e.call is None):
            chunk = queue.take() or self._hedged()
            if chunk is None:
                return
            e.call = e.actor.generate.remote(chunk.prompts, sampling, self.version)
            e.chunk, e.since = chunk, time.monotonic()

    def _hedged(self) -> Chunk | None:
        """Return, with `rollout.hedge`, an unfinished chunk that only a suspect engine works on."""
        if not self.config.rollout.hedge:
            return None
        for slow in (e for e in self._working() if e.health.state is State.SUSPECT):
            if sum(e.chunk is slow.chunk for e in self.engines) == 1:
                self.log("engine/hedged", engine=slow.health.index, prompts=len(slow.chunk.prompts))  # type: ignore[union-attr]
                return slow.chunk
        return None

    def _answers(self) -> list[Engine]:
        """Return the engines whose call has returned, after at most one tick."""
        calls = {e.call: e for e in self.engines if e.call is not None}
        if not calls:
            time.sleep(TICK_S)  # all are dead, no restart is due yet
            return []
        ray.wait(list(calls), num_returns=1, timeout=TICK_S)
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        return [calls[ref] for ref in done]

    def _take(self, e: Engine, queue: Queue, sampling: Sampling) -> Iterator[list[Group]]:
        """Process a returned call: a successful start, groups, or a failure."""
        starting, chunk = e.health.state is State.RESTARTING, e.chunk
        try:
            answer = ray.get(e.call)
            wrong = None if starting or chunk is None else problem(answer, chunk.prompts, sampling, self.version)
        except UserError as error:
            if not starting:
                raise
            wrong = first_line(error)  # its GPU is gone, say: others go on
        except ray.exceptions.RayError as error:  # died, or raised: out of memory, a lost node, a broken engine
            wrong = first_line(error)
        if wrong is not None:
            self._again(self._lose(e, wrong), queue, wrong)
            return
        self.waits.progress()
        e.call, e.chunk = None, None
        if starting:
            e.health.ready(**answer)
            if self._refresh is None:
                e.health.current()
            return
        e.health.answered(e.version == self.version)
        if chunk is not None and not chunk.done:
            chunk.done = True
            yield answer

    def _again(self, chunk: Chunk | None, queue: Queue, reason: str) -> None:
        """Requeue a chunk left undone; in single prompts after two failures: one may be the cause."""
        if chunk is None or any(e.chunk is chunk for e in self.engines):
            return
        chunk.failures += 1
        if chunk.failures >= ATTEMPTS and len(chunk.prompts) == 1:
            raise EngineFailed(f"{chunk.prompts[0].group_id}: {ATTEMPTS} engines failed on this prompt: {reason}")
        if chunk.failures >= ATTEMPTS - 1 and len(chunk.prompts) > 1:
            queue.put_back([Chunk([p], chunk.failures - 1) for p in chunk.prompts])
        else:
            queue.put_back([chunk])

    def _judge(self, queue: Queue) -> None:
        """Apply the deadlines: a late engine is suspect, then dead; loading has its own deadline."""
        r, now = self.config.rollout, time.monotonic()
        for e in (e for e in self.engines if e.call is not None):
            starting = e.health.state is State.RESTARTING
            limit = self.config.cluster.start_timeout_s if starting else r.call_timeout_s
            if now - e.since > limit:
                key = "cluster.start_timeout_s" if starting else "rollout.call_timeout_s"
                reason = f"{'not ready' if starting else 'no answer'} after {limit:g} s ({key})"
                self._again(self._lose(e, reason), queue, reason)
            elif starting:
                self.waits.progress()
            elif e.health.state is State.HEALTHY and now - e.since > r.suspect_after_s:
                e.health.late(r.suspect_after_s)

    # -- weights -----------------------------------------------------------------------------------------------------

    def push(self, push: Load, version: int) -> dict[str, float]:
        """Advance to `version`: load the weights by `push` into every engine that is ready.

        An engine that dies or is late is restarted; one that is suspect or starting misses the push and gets the
        weights before it serves again. Returns sync/seconds and sync/bytes.
        """
        start = time.perf_counter()
        self.version = version
        for e in self.engines:  # with a call whose answer will be discarded
            if e.call is not None and e.health.state is State.HEALTHY:
                e.health.missed_push()
        takers = self._at_hand()
        for e in (e for e in self.engines if e not in takers):
            e.version = -1  # unknown: after a restart of the learners, numbers are reused
        sent = self._load(takers, push)
        self.log("push/done", version=version, engines=[e.health.index for e in takers if e.version == version])
        return {"sync/seconds": time.perf_counter() - start, "sync/bytes": float(sent)}

    def prepare_update(self) -> None:
        """Put colocated engines to sleep before an update, or restart engines, which load meanwhile."""
        self.sleep() if self.config.cluster.placement == "colocated" else self.restart_due()

    def sleep(self) -> None:
        """Give colocated engines' memory to the learners; the next push wakes them."""
        self.release(State.RESTARTING)
        handles = {e.health.index: e.actor for e in self._at_hand()}
        asleep = Round(handles, self.version, self.config.rollout.push_timeout_s, self.waits, self.log)
        asleep.call("going to sleep", lambda _, actor: actor.sleep.remote())
        for index, reason in asleep.failed.items():
            self._lose(self.engines[index], reason)

    def _at_hand(self) -> list[Engine]:
        return [e for e in self.engines if e.health.state in (State.HEALTHY, State.STALE) and e.call is None]

    def _load(self, takers: list[Engine], push: Load) -> int:
        """Load the pool's weight version into `takers`; lose failed engines. Returns bytes sent."""
        try:
            result = push({e.health.index: e.actor for e in takers}, self.version)
        except BaseException as error:  # engines with partial weights take the next push, or must restart
            failed = {e.health.index: "weight push cut short" for e in takers}
            if isinstance(error, PushCutShort):
                failed = error.failed
            for e in takers:
                if e.health.index in failed:
                    self._lose(e, failed[e.health.index])
                elif e.health.state is State.HEALTHY:
                    e.health.missed_push()
            raise
        for e in takers:
            if e.health.index in result.failed:
                self._lose(e, result.failed[e.health.index])
            else:
                e.version = self.version
                e.health.current()
        return result.sent * (len(takers) - len(result.failed))

    def missing(self, nodes: Collection[str]) -> int:
        """Count the engines to start until `rollout.min_engines` live on `nodes` (Ray's node ids).

        Idle engines are pinged, because Ray reports a lost node later than the death of its learners; a silent one is
        ended, so that its place is free.
        """
        alive = (State.HEALTHY, State.SUSPECT, State.STALE)
        living = [e for e in self.engines if e.health.state in alive and e.health.facts["node"] in nodes]
        asked = {e.actor.__ray_ready__.remote(): e for e in living if e.call is None}
        answered = ray.wait([*asked], num_returns=len(asked), timeout=ANSWER_S)[0] if asked else []
        silent = [e for ref, e in asked.items() if ref not in answered or error_of(ref)]
        for e in silent:
            self._lose(e, f"no answer within {ANSWER_S:g} s")
        return max(0, min(self.config.rollout.min_engines, len(self.engines)) - len(living) + len(silent))
