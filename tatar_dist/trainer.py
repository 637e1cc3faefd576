"""The loop around the steps of a stage, the same for SFT and GRPO: start, resume, checkpoints, faults, preemption.

In: a stage that knows how to make one step. Out: a run directory whose `checkpoints/latest/model` is the trained model.
Learners are a unit: when one dies, all restart from the last checkpoint, in a smaller number if their node does not
come back. What a stage brings along (engines, the reward actor) looks after itself.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

from tatar_dist.cluster.prometheus import Exporter
from tatar_dist.cluster.ray_cluster import Cluster
from tatar_dist.config.schema import Config
from tatar_dist.errors import Interrupted, LearnersFailed, StopAsked, UserError
from tatar_dist.faults.health import State
from tatar_dist.faults.interrupts import Interrupts
from tatar_dist.faults.stall import StallDetector, Stalled, processes_of
from tatar_dist.faults.waiting import first_line
from tatar_dist.learner.group import LearnerGroup
from tatar_dist.plan.plan import Plan, Stage
from tatar_dist.run.checkpoints import Checkpoints, Found, latest
from tatar_dist.run.directory import RunDirectory
from tatar_dist.run.progress import Progress


class Steps(ABC):
    """What a stage does in its steps. `watch` is set before `start`, `learners` before `ready`, anew at a restart."""

    learners: LearnerGroup
    watch: StallDetector

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Where in the data the next step begins, as JSON: part of a checkpoint."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Go back to what `state` returned; called before the first step and after every restart."""

    def start(self, cluster: Cluster) -> None:  # noqa: B027  a stage may have learners only
        """Begin to start what the stage needs besides learners; called once."""

    def ready(self, step: int, changed: bool) -> None:  # noqa: B027
        """The learners hold the weights of `step`; `changed`: not those of model.path. Called after every start."""

    def pause(self) -> None:  # noqa: B027
        """The learners are gone and need a place again: nothing else may take it."""

    def hung(self) -> None:  # noqa: B027
        """Nothing moves any more: end whatever is at work besides the learners."""

    @abstractmethod
    def step(self, step: int, last: bool) -> dict[str, float]:
        """One optimiser step; its metrics. Raises StopAsked while nothing has been learned, LearnersFailed."""


@dataclass
class Training:
    """One run of a stage, from its start or the newest checkpoint to `total` steps.

    Call `run`. Raises Interrupted after a clean stop, UserError for bad input, RunError when it cannot go on.
    """

    config: Config
    stage: Stage
    plan: Plan
    steps: Steps
    total: int
    directory: RunDirectory
    stop: Interrupts
    exporter: Exporter | None = None
    _id: str = field(default_factory=lambda: secrets.token_hex(8))  # stands in the checkpoints of this process
    _at: int = 0  # the step that learners were restored at
    _up: bool = False  # learners were up once
    _failures: int = 0

    def run(self) -> None:
        c = self.config
        self.checkpoints = Checkpoints(self.directory.path.absolute(), c.checkpoint, self.directory.events)
        found = self.checkpoints.resume(self._same()) if c.checkpoint.resume else None
        first = found[1]["step"] if found else 0
        self.directory.rewind(first)
        if first >= self.total:
            return
        self._initial = self.steps.state()
        run, first_s = self.directory.path, c.cluster.start_timeout_s
        self.watch = StallDetector(run, c.watch, first_s, self.directory.events, lambda: processes_of(run))
        with (
            self.directory.running(self.stage, self.total, first, self.plan.learners, self.plan.engines),
            Cluster(c, self._log, overlap=self.stage == "grpo" and c.grpo.staleness > 0) as cluster,
            Progress(self.stage, self.total, first) as self.progress,
            self.watch,
        ):
            self.exporter = Exporter(run.name) if c.watch.prometheus else None
            try:
                self._until_done(cluster, found)
            finally:
                cluster.end_learners()
                self.checkpoints.abandon()  # its thread must not use a Ray that is shut down

    def _log(self, event: str, **fields: Any) -> None:
        """What happens to the actors: into the event log; it is progress, and engine states are metrics."""
        self.directory.events.log(event, **fields)
        self.watch.progress()
        subject, _, what = event.partition("/")
        if self.exporter and subject == "engine" and what in set(State):
            self.exporter.engine(fields["engine"], what)

    def _same(self) -> dict[str, Any]:
        m = self.config.model
        adapters = {f"model.{k}": getattr(m, k) for k in ("lora_rank", "lora_alpha", "lora_targets") if m.lora_rank}
        return {"stage": self.stage, "model.path": m.path, **adapters}

    def _until_done(self, cluster: Cluster, found: Found | None) -> None:
        while True:
            try:
                first = self._bring_up(cluster, found)
                return self._loop(cluster, first)
            except (LearnersFailed, Stalled) as e:
                if isinstance(e, Stalled):
                    if e.action != "restart":
                        raise
                    self.steps.hung()
                if not self._up:  # they never came up: more likely a mistake than a fault
                    raise
                self._failures += 1
                self._log("learners/failed", reason=first_line(e), failures=self._failures)
                if self._failures > self.config.cluster.learner_restarts:
                    raise
                with suppress(LearnersFailed, UserError):
                    self.checkpoints.poll()  # the one under way counts if all of it was written before
                self.steps.pause()
                cluster.end_learners()
                self.checkpoints.abandon()
                found = self._newest()

    def _newest(self) -> Found | None:
        """The checkpoint to restart from: with `checkpoint.resume=false` only one of this run."""
        found = self.checkpoints.resume(self._same())
        return found if found and (self.config.checkpoint.resume or found[1].get("by") == self._id) else None

    def _bring_up(self, cluster: Cluster, found: Found | None) -> int:
        """Learners (and, the first time, everything else) with the weights of the checkpoint; returns its step."""
        steps, restart = self.steps, self._up
        first = found[1]["step"] if found else 0
        self.directory.events.step = first
        self.directory.rewind(first)
        steps.restore(found[1] if found else self._initial)
        steps.watch = self.watch
        self.watch.starting()
        try:
            if restart:
                self._log("learners/restarting", from_step=first)
            learners = cluster.learners(self.plan.learners, again=restart, check=self.stop.leave_if_asked)
            if not restart:
                steps.start(cluster)
            world = len(learners.actors)
            facts = learners.setup(self.stage, self.total)
            each = {k + "s": [f[k] for f in facts] for k in ("pid", "host", "node")}
            self._log("learners/ready", world_size=world, **each)
            if found:
                learners.load(found[0], found[1]["learners"])
            steps.learners, self._up = learners, True
            steps.ready(first, changed=bool(found) or restart)
            learners.check = self.watch.raise_if_asked  # and no longer: a step that has begun to learn is finished
        except StopAsked:
            raise Interrupted(
                f"stopped while starting; the same command starts at step {first}", self.stop.status
            ) from None
        if found or restart:
            self._log("learners/restored", from_step=first, world_size=world)
        self._at = first
        self.progress.ready(first)
        return first

    def _loop(self, cluster: Cluster, first: int) -> None:
        for step in range(first, self.total):
            before, start, last = self.steps.state(), time.perf_counter(), step + 1 == self.total
            metrics = None
            try:
                metrics = self.steps.step(step, last)
            except StopAsked:
                pass  # not here: the traceback keeps a weight stream that was cut short alive, and rank 0 in it
            if metrics is None:
                self._stop(step, before)
            seconds, self._failures = time.perf_counter() - start, 0
            self.directory.log(step, metrics)
            self.directory.events.log("step/done", seconds=round(seconds, 3))
            self.watch.step(seconds)
            if self.exporter:
                self.exporter.step(metrics)
            self.progress.update(step + 1, metrics)
            cluster.note_nodes()
            self.checkpoints.poll()
            every = self.config.checkpoint.every
            if last or (every and (step + 1) % every == 0):
                self._save(step + 1, self.steps.state(), metrics)
            if last:
                self.checkpoints.finish()
            elif self.stop.requested:
                self._stop(step + 1, self.steps.state())

    def _save(self, step: int, state: dict[str, Any], metrics: dict[str, float]) -> None:
        self.directory.begin("checkpoint", step)
        whole = {"same": self._same(), "by": self._id, **state}
        self.checkpoints.save(step, whole, self.steps.learners, metrics)
        self.watch.progress()

    def _stop(self, step: int, state: dict[str, Any]) -> NoReturn:
        """Leave a checkpoint of `step` and end. Raises Interrupted, UserError when it cannot be written."""
        self.directory.events.log("signal", name=self.stop.name)
        with suppress(UserError):
            self.checkpoints.finish()
        newest = latest(self.directory.path)
        saved = newest is not None and newest[1].get("by") == self._id and newest[1]["step"] == step
        if step != self._at and not saved:
            self._save(step, state, {})
            self.checkpoints.finish()
        raise Interrupted(
            f"stopped after step {step} of {self.total}; the same command continues there", self.stop.status
        )
