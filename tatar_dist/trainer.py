"""A training run: start, resume, checkpoints, faults, preemption. The loops over its steps are grpo.py and sft.py.

    with Run(config, "grpo") as run:
        data = …                                    # where the steps come from
        while (step := run.next_step(data)) is not None:
            with run.recovering():
                …                                   # one optimiser step with run.learners, and its metrics
                run.finish(step, metrics)

Learners are a unit: when one dies, all restart from the last checkpoint, in a smaller number if their node does not
come back. Engines and the reward actor, which only GRPO has, survive that, unless they live on the learners' GPUs.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NoReturn, Protocol

from tatar_dist.cluster.prometheus import Exporter
from tatar_dist.cluster.ray_cluster import Cluster
from tatar_dist.cluster.reward import RemoteScorer
from tatar_dist.cluster.selfcheck import verify
from tatar_dist.config.schema import Config
from tatar_dist.errors import Interrupted, LearnersFailed, StopRequested, UserError
from tatar_dist.faults.health import State
from tatar_dist.faults.interrupts import StopSignals
from tatar_dist.faults.stall import StallDetector, Stalled, processes_of
from tatar_dist.faults.waiting import Waits, first_line
from tatar_dist.learner.group import LearnerGroup
from tatar_dist.plan.plan import Stage, resolve
from tatar_dist.plan.proven import unproven
from tatar_dist.rollout.pool import RolloutPool
from tatar_dist.run.checkpoints import CheckpointRef, Checkpoints, latest
from tatar_dist.run.directory import RunDirectory
from tatar_dist.run.progress import Progress
from tatar_dist.sync import weight_push
from tatar_dist.sync.object_store import ObjectStorePush


class Data(Protocol):
    """Where the steps of a stage come from. `total`: how many there are.

    That of GRPO also has `peek(step)`, the prompts of a step that are drawn again when it comes.
    """

    @property
    def total(self) -> int: ...

    def state(self) -> dict[str, Any]:
        """Where in the data the next step begins, as JSON: part of a checkpoint."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go back to what `state` returned; called before the first step and after every restart."""


class Run:
    """One run of a stage, from its start or its newest checkpoint to the last step. A context manager.

    Attributes:
        directory: the run directory; open from the start.
        learners: all ranks, with the weights of the step that `next_step` returned.
        engines, scorer: the pool of engines and the reward actor, with GRPO.

    Raises:
        Interrupted: after a clean stop. UserError: bad input. RunError: it cannot go on.
    """

    directory: RunDirectory
    waits: Waits
    learners: LearnerGroup
    engines: RolloutPool
    scorer: RemoteScorer

    def __init__(self, config: Config, stage: Stage) -> None:
        self.config, self.stage, self.plan = config, stage, resolve(config, stage)
        self.colocated = config.cluster.placement == "colocated"
        self._id = secrets.token_hex(8)  # stands in the checkpoints of this process
        self._opened = False
        self._up = False  # learners are, and hold the weights of the next step
        self._was_up = False  # they were once
        self._stopping = False  # a signal cut the step short
        self._failures = 0  # of the learners, without a finished step between them

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            self.directory = stack.enter_context(RunDirectory(self.config))
            self._stop_signals = stack.enter_context(StopSignals(self.config.checkpoint.grace_seconds))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def next_step(self, data: Data) -> int | None:
        """The step to make, with everything up that it needs; None after the last.

        The first call starts Ray and the actors, at the newest checkpoint if there is one; after a fault it starts
        the learners again. A signal that came meanwhile leaves a checkpoint and ends the run.
        """
        if not self._opened and not self._open(data):
            return None
        if self._stopping:
            with self.recovering():
                self._stop(self._step, self._before)
        while not self._up:
            with self.recovering():
                self._bring_up()
        if self._step == self._total:
            return None
        self._before, self._began = data.state(), time.perf_counter()
        return self._step

    @contextmanager
    def recovering(self) -> Iterator[None]:
        """Around a step: a failure of the learners or a stall lets `next_step` start them again.

        The learners are only ended here: the traceback of the active exception still references the interrupted weight
        stream, which keeps rank 0 alive. A signal, too, is answered by `next_step`.
        """
        try:
            yield
        except StopRequested:
            self._stopping = True
        except (LearnersFailed, Stalled) as e:
            self._recover(e)

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        """Log a finished step, save when due, end the run after a signal."""
        seconds, self._failures = time.perf_counter() - self._began, 0
        last = step + 1 == self._total
        self.directory.log(step, metrics)
        self.directory.events.log("step/done", seconds=round(seconds, 3))
        self._watch.step(seconds)
        if self._exporter:
            self._exporter.step(metrics)
        self._progress.update(step + 1, metrics)
        self._cluster.log_node_changes()
        self._checkpoints.poll()
        every = self.config.checkpoint.every
        if last or (every and (step + 1) % every == 0):
            self._save(step + 1, self._data.state(), metrics)
        self._step = step + 1
        if last:
            self._checkpoints.finish()
        elif self._stop_signals.requested:
            self._stop(step + 1, self._data.state())

    def push_weights(self, version: int) -> dict[str, float]:
        """Give the learners' weights to the engines, as `version`; sync/seconds and sync/bytes."""
        return self.engines.push(partial(self._push.push, self.learners), version)

    # -- start and restart -------------------------------------------------------------------------------------------

    def _open(self, data: Data) -> bool:
        """Find the checkpoint to start from, start Ray; false when nothing is left to do."""
        c, run = self.config, self.directory.path
        self._opened, self._data, self._total = True, data, data.total
        self._checkpoints = Checkpoints(run.absolute(), c.checkpoint, self.directory.events)
        self._found = self._checkpoints.resume(self._identity()) if c.checkpoint.resume else None
        self._step = self._at = self._found[1]["step"] if self._found else 0
        self.directory.rewind(self._step)
        if self._step >= self._total:
            return False
        self._initial = data.state()
        events = self.directory.events
        self._watch = StallDetector(run, c.watch, c.cluster.start_timeout_s, events, lambda: processes_of(run))
        self.waits = Waits(self._stop_signals, self._watch)
        self._exporter: Exporter | None = None
        overlap = self.stage == "grpo" and c.grpo.staleness > 0
        enter = self._stack.enter_context
        enter(self.directory.running(self.stage, self._total, self._step, self.plan.learners, self.plan.engines))
        self._cluster = enter(Cluster(c, self._log, overlap, self.waits))
        self._progress = enter(Progress(self.stage, self._total, self._step))
        enter(self._watch)
        self._stack.callback(self._checkpoints.abandon)  # its thread must not use a Ray that is shut down
        self._stack.callback(self._cluster.end_learners)
        self._exporter = Exporter(run.name) if c.watch.prometheus else None
        return True

    def _bring_up(self) -> None:
        """Learners (and, the first time, everything else) with the weights of the checkpoint to start from."""
        found, restart = self._found, self._was_up
        self._step = first = found[1]["step"] if found else 0
        self.directory.events.step = first
        self.directory.rewind(first)
        self._data.load_state(found[1] if found else self._initial)
        self._watch.starting()
        if restart:
            self._log("learners/restarting", from_step=first)
        try:
            with self.waits.interruptible(stalls=False):
                self._start(found, restart)
            if self.stage == "grpo":
                with self.waits.interruptible():
                    self._update_engines(first, changed=bool(found) or restart)
        except StopRequested:
            raise Interrupted(
                f"stopped while starting; the same command starts at step {first}", self._stop_signals.status
            ) from None
        if found or restart:
            self._log("learners/restored", from_step=first, world_size=len(self.learners.actors))
        self._at, self._up = first, True
        self._progress.ready(first)

    def _start(self, found: CheckpointRef | None, restart: bool) -> None:
        learners = self._cluster.learners(self.plan.learners, again=restart)
        if self.stage == "grpo" and not restart:
            self._start_engines()
        facts = learners.setup(self.stage, self._total)
        each = {k + "s": [f[k] for f in facts] for k in ("pid", "host", "node")}
        self._log("learners/ready", world_size=len(learners.actors), **each)
        if found:
            learners.load(found[0], found[1]["learners"])
        self.learners, self._was_up = learners, True

    def _start_engines(self) -> None:
        count = self.plan.engines
        self.engines, self.scorer = self._cluster.engines(count), self._cluster.scorer()
        self._push = weight_push(self.config, self.waits, self._log)
        anytime = ObjectStorePush(self.config, self.waits, self._log)  # for engines that start late
        refresh = lambda engines, version: anytime.push(self.learners, engines, version)  # noqa: E731
        self.engines.start(self._cluster.threads(count), refresh)
        if self.colocated:  # one after the other: both measure how much of the GPU is free
            self.engines.started()
            self.engines.sleep()

    def _update_engines(self, step: int, changed: bool) -> None:
        """Engines with the learners' weights; `changed`: those are not the files of model.path."""
        self.engines.started()
        # with a lag a step's own comparison of probabilities contains what was learned since: compare here, before that
        check = unproven(self.config) or self.config.grpo.staleness
        if changed or check or self.colocated:
            self.push_weights(step)
        if check:
            verify(self.engines, self.learners, self._data.peek(step), self.config)

    # -- faults and stops --------------------------------------------------------------------------------------------

    def _recover(self, e: LearnersFailed | Stalled) -> None:
        """End the learners; the next start is at the last checkpoint. Raises `e` when it is not worth another try."""
        if not self._was_up:  # they never came up: more likely a mistake than a fault
            raise e
        if isinstance(e, Stalled):
            if e.action != "restart":
                raise e
            if self.stage == "grpo":  # whatever is at work besides the learners may be why nothing moves
                self.engines.end_busy()
                self.scorer.end()
        self._failures += 1
        self._log("learners/failed", reason=first_line(e), failures=self._failures)
        if self._failures > self.config.cluster.learner_restarts:
            raise e
        with suppress(LearnersFailed, UserError):
            self._checkpoints.poll()  # the one under way counts if all of it was written before
        if self.stage == "grpo":  # nothing else may take the learners' places
            self.engines.end_all() if self.colocated else self.engines.end_starts()
        self._cluster.end_learners()
        self._checkpoints.abandon()
        self._found = self._newest()
        self._up = False

    def _newest(self) -> CheckpointRef | None:
        """The checkpoint to restart from: with `checkpoint.resume=false` only one of this run."""
        found = self._checkpoints.resume(self._identity())
        return found if found and (self.config.checkpoint.resume or found[1].get("by") == self._id) else None

    def _identity(self) -> dict[str, Any]:
        m = self.config.model
        adapters = {f"model.{k}": getattr(m, k) for k in ("lora_rank", "lora_alpha", "lora_targets") if m.lora_rank}
        return {"stage": self.stage, "model.path": m.path, **adapters}

    def _log(self, event: str, **fields: Any) -> None:
        """What happens to the actors: into the event log; it is progress, and engine states are metrics."""
        self.directory.events.log(event, **fields)
        self._watch.progress()
        subject, _, what = event.partition("/")
        if self._exporter and subject == "engine" and what in set(State):
            self._exporter.engine(fields["engine"], what)

    def _save(self, step: int, state: dict[str, Any], metrics: dict[str, float]) -> None:
        self.directory.begin("checkpoint", step)
        whole = {"same": self._identity(), "by": self._id, **state}
        self._checkpoints.save(step, whole, self.learners, metrics)
        self._watch.progress()

    def _stop(self, step: int, state: dict[str, Any]) -> NoReturn:
        """Leave a checkpoint of `step` and end. Raises Interrupted, UserError when it cannot be written."""
        self.directory.events.log("signal", name=self._stop_signals.name)
        with suppress(UserError):
            self._checkpoints.finish()
        newest = latest(self.directory.path)
        saved = newest is not None and newest[1].get("by") == self._id and newest[1]["step"] == step
        if step != self._at and not saved:
            self._save(step, state, {})
            self._checkpoints.finish()
        raise Interrupted(
            f"stopped after step {step} of {self._total}; the same command continues there", self._stop_signals.status
        )
