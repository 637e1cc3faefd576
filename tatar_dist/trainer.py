"""A training run: start, resume, checkpoints, faults, preemption; loops in grpo.py, sft.py.

Learners are a unit: when one dies, all restart from the last checkpoint, in a smaller number if their node does not
come back. Engines and the reward actor, which only GRPO has, survive that, unless they live on the learners' GPUs.
"""

from __future__ import annotations

import json
import math
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn, Protocol

from tatar_dist.cluster import selfcheck
from tatar_dist.cluster.prometheus import Exporter
from tatar_dist.cluster.ray_cluster import Cluster
from tatar_dist.cluster.reward import RemoteScorer
from tatar_dist.config.schema import Config, OptimConfig
from tatar_dist.errors import Interrupted, LearnersFailed, RunError, StopRequested, UserError
from tatar_dist.faults.health import LIVING, State
from tatar_dist.faults.interrupts import StopSignals
from tatar_dist.faults.stall import StallDetector, Stalled, processes_of
from tatar_dist.faults.waiting import Waits, first_line
from tatar_dist.learner.group import LearnerGroup
from tatar_dist.plan.memory import check_fit
from tatar_dist.plan.plan import Stage, resolve
from tatar_dist.plan.proven import unproven
from tatar_dist.rewards.metrics import ShareWatch
from tatar_dist.rewards.presets import load_preset
from tatar_dist.rollout.pool import RolloutPool
from tatar_dist.run.checkpoints import CheckpointRef, Checkpoints, latest
from tatar_dist.run.directory import PROMPTS, RunDirectory
from tatar_dist.run.identity import identity
from tatar_dist.run.progress import Progress
from tatar_dist.sync.checked import OBJECT_STORE, CheckedPush


class Data(Protocol):
    """Source of a stage's steps. `total`: how many there are.

    That of GRPO also has `peek(step)`, which returns the prompts of a step without advancing the sampler.
    """

    @property
    def total(self) -> int: ...

    def state(self) -> dict[str, Any]:
        """Return the position of the next step in the data, as JSON, for a checkpoint."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned; called before the first step and after every restart."""


class Run:
    """A run of a stage, from its start or newest checkpoint to the last step. A context manager.

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
        self._id = secrets.token_hex(8)  # identifies the checkpoints of this process
        self._opened = False
        self._up = False  # the learners are up and hold the weights of the next step
        self._was_up = False  # the learners were up once
        self._stopping = False  # a signal cut the step short
        self._shares = ShareWatch(config.grpo.advantage)
        self._skipped = 0  # steps in a row whose gradient was not finite
        self._failures = 0  # failures of the learners since the last finished step

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
        """Return the next step, with all processes up that it needs; None after the last step.

        The first call starts Ray and the actors, at the newest checkpoint if there is one; after a fault it starts
        the learners again. After a stop signal it writes a checkpoint and ends the run.
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
        """Wrap a step: after a failure of the learners or a stall, `next_step` restarts them.

        The learners are only ended here: the traceback of the active exception still references the interrupted weight
        stream, which keeps rank 0 alive. A stop signal, too, is handled by `next_step`.
        """
        try:
            yield
        except StopRequested:
            self._stopping = True
        except (RunError, UserError) as e:
            try:
                self._recover(e)
            except (RunError, UserError):
                with suppress(Exception):
                    self._checkpoints.finish(strict=False)  # a good one that is being written stays
                raise

    def finish(self, step: int, metrics: dict[str, float]) -> None:
        """Log a finished step, save when due, end the run after a signal."""
        seconds, self._failures = time.perf_counter() - self._began, 0
        last = step + 1 == self._total
        self.directory.log(step, metrics)
        self._check_finite(step, metrics)
        self.directory.events.log("step/done", seconds=round(seconds, 3))
        self._watch.step(seconds)
        for task, line in self._shares.add(metrics).items():
            self._log("share/low", task=task, reason=line)
            print(f"tatar-dist: {line}", file=sys.stderr)
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

    def _check_finite(self, step: int, metrics: dict[str, float]) -> None:
        """Stop the run, or count a skipped step, if the step's loss or gradient norm is not finite.

        Raises:
            RunError: `optim.on_nonfinite=stop`, or more than `optim.max_skipped` steps in a row.
        """
        optim: OptimConfig = getattr(self.config, self.stage).optim
        bad = [f"{k}={metrics[k]}" for k in ("loss/total", "optim/grad_norm") if not math.isfinite(metrics[k])]
        if not bad:
            self._skipped = 0
            return
        reason = ", ".join(bad)
        if optim.on_nonfinite == "skip" and not math.isfinite(metrics["optim/grad_norm"]):
            self._skipped += 1
            self._log("step/skipped", reason=reason, in_a_row=self._skipped)
            if self._skipped <= optim.max_skipped:
                return
        skipped = f", after {optim.max_skipped} skipped steps" if self._skipped > 1 else ""
        self._checkpoints.finish(strict=False)
        newest = latest(self.directory.path)
        raise RunError(
            f"step {step}: {reason}{skipped}: the run stops; "
            + (f"the last checkpoint is {newest[0].name}" if newest else "there is no checkpoint yet")
            + f". Lower {self.stage}.optim.lr or clip_norm, check model.path and the data for values that are not "
            f"finite, or set {self.stage}.optim.on_nonfinite=skip"
        )

    def push_weights(self, version: int) -> dict[str, float]:
        """Push the learners' weights as `version`. Returns sync/seconds and sync/bytes."""
        return self.engines.push(partial(self._push.push, self.learners), version)

    # -- start and restart -------------------------------------------------------------------------------------------

    def _open(self, data: Data) -> bool:
        """Find the checkpoint to start from and start Ray. Returns False when all steps are done."""
        c, run = self.config, self.directory.path
        self._opened, self._data, self._total = True, data, data.total
        preset = load_preset(c.reward.preset, c.reward.weights, c.reward.params)
        same = identity(c, self.stage, self.directory.records[PROMPTS], asdict(preset))
        self._identity = json.loads(json.dumps(same))
        self._checkpoints = Checkpoints(run.absolute(), c.checkpoint, self.directory.events)
        self._checkpoint = self._checkpoints.resume(self._identity) if c.checkpoint.resume else None
        self._step = self._at = self._checkpoint[1]["step"] if self._checkpoint else 0
        if self._step >= self._total:
            return False
        self._initial = data.state()
        events = self.directory.events
        self._watch = StallDetector(run, c.watch, c.cluster.start_timeout_s, events, lambda: processes_of(run))
        self.waits = Waits(self._stop_signals, self._watch)
        self._exporter: Exporter | None = None
        overlap = self.stage == "grpo" and c.grpo.staleness > 0
        enter = self._stack.enter_context
        p = self.plan
        enter(self.directory.running(self.stage, self._total, self._step, p.learners, p.engines, p.push))
        self._cluster = enter(Cluster(c, self._log, overlap, self.waits))
        check_fit(c, self.plan, self._cluster.smallest_gpu(), self._cluster.smallest_node())
        self._progress = enter(Progress(self.stage, self._total, self._step))
        enter(self._watch)
        self._stack.callback(self._checkpoints.abandon)  # its thread must not use Ray after the shutdown
        self._stack.callback(self._cluster.end_learners)
        self._exporter = Exporter(run.name) if c.watch.prometheus else None
        return True

    def _bring_up(self) -> None:
        """Start the learners (at first also all else) with the weights of the last checkpoint."""
        checkpoint, restart = self._checkpoint, self._was_up
        self._step = first = checkpoint[1]["step"] if checkpoint else 0
        self.directory.events.step = first
        self._data.load_state(checkpoint[1] if checkpoint else self._initial)
        self._watch.starting()
        if restart:
            self._log("learners/restarting", from_step=first)
        try:
            with self.waits.interruptible(stalls=False):
                self._start(checkpoint, restart)
            if self.stage == "grpo":
                with self.waits.interruptible():
                    self._update_engines(first, changed=bool(checkpoint) or restart)
        except StopRequested:
            raise Interrupted(
                f"stopped while starting; the same command starts at step {first}", self._stop_signals.status
            ) from None
        if checkpoint or restart:
            self._log("learners/restored", from_step=first, world_size=len(self.learners.actors))
        self.directory.record()  # nothing can refuse the run any more
        self.directory.rewind(first)
        self._at, self._up = first, True
        self._progress.ready(first)

    def _start(self, checkpoint: CheckpointRef | None, restart: bool) -> None:
        learners = self._cluster.learners(self.plan.learners, again=restart)
        if self.stage == "grpo" and not restart:
            self._start_engines()
        elif self.stage == "grpo":
            self.engines.relaunch()  # they load beside the learners, whose places are taken
            if self.colocated:
                self.engines.relaunched()
                self.engines.sleep()
        facts = learners.setup(self.stage, self._total)
        each = {k + "s": [f[k] for f in facts] for k in ("pid", "host", "node", "gpu")}
        self._log("learners/ready", world_size=len(learners.actors), **each)
        if checkpoint:
            learners.load(checkpoint[0], checkpoint[1]["learners"])
        self.learners, self._was_up = learners, True

    def _start_engines(self) -> None:
        count = self.plan.engines
        self.engines, self.scorer = self._cluster.engines(count), self._cluster.scorer()
        self._push = CheckedPush(self.config, self.plan.push, self.waits, self._log)
        refresh = lambda engines, version: self._push.spare.push(self.learners, engines, version)  # noqa: E731
        self.engines.start(self._cluster.threads(count), refresh)
        if self.colocated:  # not at once: learners and engines measure how much GPU memory is free
            self.engines.started()
            self.engines.sleep()

    def _update_engines(self, step: int, changed: bool) -> None:
        """Push the learners' weights if `changed`: they differ from the files of model.path."""
        self.engines.started()
        c, actors = self.config, (self.engines, self.learners)
        armed = any(f.startswith("controller.push_check:") for f in c.failpoints)
        unsure = self._push.name != OBJECT_STORE or armed or unproven(c)
        if unsure and c.rollout.push_check_s:
            begin = partial(self.directory.begin, "push_check", step)
            selfcheck.check(self._push, *actors, self._data.peek(step), step, begin)
        else:
            # with a lag the comparison in a step also contains the policy's change since sampling: compare before it
            compare = unsure or c.grpo.staleness
            if changed or compare or self.colocated:
                self.push_weights(step)
            if not compare:
                return
            selfcheck.verify(*actors, self._data.peek(step), c)
        if self.colocated:
            self.push_weights(step)  # wakes the engines

    # -- faults and stops --------------------------------------------------------------------------------------------

    def _recover(self, e: RunError | UserError) -> None:
        """End the learners, to restart from the last checkpoint. Raises `e` if no retry is allowed."""
        if not isinstance(e, LearnersFailed | Stalled) or not self._was_up:
            raise e  # where they never came up it is an error in the setup rather than a fault
        if isinstance(e, Stalled):
            if e.action != "restart":
                raise e
            if self.stage == "grpo":  # a busy engine or the reward actor may be the cause
                self.engines.end_busy()
                self.scorer.end()
        self._failures += 1
        self._log("learners/failed", reason=first_line(e), failures=self._failures)
        if self._failures > self.config.cluster.learner_restarts:
            raise e
        with suppress(LearnersFailed, UserError):
            self._checkpoints.poll()  # a checkpoint in progress counts if it was written completely
        if self.stage == "grpo":  # an engine must not take a learner's place
            self.engines.release(*(LIVING if self.colocated else [State.RESTARTING]))
        self._cluster.end_learners()
        self._checkpoints.abandon()
        self._checkpoint = self._newest()
        self._up = False

    def _newest(self) -> CheckpointRef | None:
        """Find the checkpoint to restart from; with `checkpoint.resume=false` only this process's."""
        return self._checkpoints.resume(self._identity, by=None if self.config.checkpoint.resume else self._id)

    def _log(self, event: str, **fields: Any) -> None:
        """Log an event of an actor. It counts as progress; engine states are exported as metrics."""
        self.directory.events.log(event, **fields)
        self._watch.progress()
        subject, _, what = event.partition("/")
        if self._exporter and subject == "engine" and what in set(State):
            self._exporter.engine(fields["engine"], what)

    def _save(self, step: int, state: dict[str, Any], metrics: dict[str, float]) -> None:
        self.directory.begin("checkpoint", step)
        whole = {"same": self._identity, "by": self._id, **state}
        self._checkpoints.save(step, whole, self.learners, metrics)
        self._watch.progress()

    def _stop(self, step: int, state: dict[str, Any]) -> NoReturn:
        """Write a checkpoint of `step` and raise Interrupted.

        Raises UserError if it cannot be written, or RunError if its weights give nothing finite.
        """
        self.directory.events.log("signal", name=self._stop_signals.name)
        with suppress(UserError):
            self._checkpoints.finish()
        newest = latest(self.directory.path)
        saved = newest is not None and newest[1].get("by") == self._id and newest[1]["step"] == step
        if step != self._at and not saved:
            if self.stage == "grpo" and self.colocated:  # the learners need the memory
                self.engines.end_busy()
                self.engines.sleep()
            self.learners.check_weights()
            self._save(step, state, {})
            self._checkpoints.finish()
        raise Interrupted(
            f"stopped after step {step} of {self._total}; the same command continues there", self._stop_signals.status
        )
