"""One GRPO step: sampler, engines, reward actor (sampling.py), batcher, learners, engines again.

In: a checked config. Out: a run directory (see run/directory.py) whose `checkpoints/latest/model` is the trained model.
`staleness: 0`: engines and learners take turns on the same weights; `k`: while the learners work, the engines sample
the batch of k steps later (sampling.py). Start, checkpoints and faults: trainer.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from tatar_dist.cluster.ray_cluster import Cluster
from tatar_dist.cluster.reward_client import ScorerFailed
from tatar_dist.cluster.selfcheck import verify
from tatar_dist.config.schema import Config
from tatar_dist.data.sampler import PromptSampler
from tatar_dist.errors import StopAsked, UserError
from tatar_dist.evaluate.runner import held_out_metrics
from tatar_dist.faults.interrupts import Interrupts
from tatar_dist.learner.group import Learning
from tatar_dist.learner.sharding import global_weights, shard_groups
from tatar_dist.plan.plan import resolve
from tatar_dist.plan.proven import unproven
from tatar_dist.prompts.source import PromptSource, read_manifests
from tatar_dist.rewards.presets import load_preset
from tatar_dist.rollout.engine import Sampling
from tatar_dist.rollout.pool import EngineFailed
from tatar_dist.run.directory import RunDirectory
from tatar_dist.sampling import Batch, Batches, Collected, collect
from tatar_dist.sync.transports import gpu_push
from tatar_dist.trainer import Steps, Training
from tatar_dist.types import Group, Prompt, ScoredGroup


def run(config: Config) -> None:
    """Train until `grpo.max_steps` or `grpo.epochs`. Raises Interrupted after a clean stop, UserError for bad input."""
    plan, g = resolve(config, "grpo"), config.grpo
    with RunDirectory(config) as directory, Interrupts(config.checkpoint.grace_seconds) as stop:
        steps = GRPOSteps(config, directory, stop, plan.engines)
        total = g.max_steps or max(1, round(g.epochs * steps.sampler.steps_per_epoch(g.prompts_per_step)))
        steps.batches.total = total
        Training(config, "grpo", plan, steps, total, directory, stop).run()


def make_sampler(config: Config) -> PromptSampler:
    """The sampler of `data.train`; which tasks need pools that rank follows from the reward's preset."""
    manifests, d, r = read_manifests(config.data, "train"), config.data, config.reward
    ranked = load_preset(r.preset, r.weights, r.params).ranked_tasks
    return PromptSampler(manifests, config.seed, d.iqa_fraction, d.min_rank_pool, ranked=ranked)


class GRPOSteps(Steps):
    """Generate, score, learn, push. Reward actor and engines, unless colocated, survive the learners' restarts."""

    def __init__(self, config: Config, directory: RunDirectory, stop: Interrupts, engines: int) -> None:
        self.config, self.directory, self.stop, self.engines = config, directory, stop, engines
        self.source = PromptSource(config, directory)
        self.costs = self.source.backbone.costs()
        self.sampler, n = make_sampler(config), config.grpo.prompts_per_step
        draw = lambda step: self.source.batch(self.sampler, n, step)  # noqa: E731
        self.batches = Batches(self.sampler, draw, self._collect, config.grpo.staleness)
        self.held_out = self.source.held_out_prompts() if config.grpo.eval_every else []

    def state(self) -> dict[str, Any]:
        return self.batches.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.batches.load_state(state)

    def start(self, cluster: Cluster) -> None:
        self.pool, self.scorer = cluster.engines(self.engines), cluster.scorer()
        self.pool.weights = lambda: self.learners.weight_buckets(self.config.rollout.bucket_mib << 20)
        self.pool.start(cluster.threads(self.engines))
        self.transport, self.colocated = gpu_push(self.config), cluster.colocated
        if self.colocated:  # one after the other: both measure how much of the GPU is free
            with self._may_stop():
                self.pool.started()
            self.pool.sleep()

    def ready(self, step: int, changed: bool) -> None:
        self.pool.progress = self.watch.progress
        self.pool.places = len(self.learners.actors) if self.colocated else None
        with self._may_stop():
            self.pool.started()
        # with a lag a step's own comparison of probabilities contains what was learned since: compare here, before that
        check = unproven(self.config) or self.config.grpo.staleness
        if changed or check or self.colocated:
            self._push(step)
        if check:
            state = self.sampler.state_dict()
            verify(
                self.pool,
                self.learners,
                self.source.batch(self.sampler, self.config.grpo.prompts_per_step, step),
                self.config,
            )
            self.sampler.load_state_dict(state)

    def pause(self) -> None:
        self.pool.end_all() if self.colocated else self.pool.end_starts()

    def hung(self) -> None:
        self.pool.end_busy()
        self.scorer.end()

    def _push(self, version: int) -> dict[str, float]:
        assert self.pool.weights is not None
        if self.transport is not None:
            return self.pool.push_by(self.transport, self.learners, version)
        return self.pool.push(self.pool.weights(), version)

    def step(self, step: int, last: bool) -> dict[str, float]:
        """One optimiser step; returns its metrics by their contract names."""
        g, r = self.config.grpo, self.config.rollout
        start, self._spent = time.perf_counter(), dict.fromkeys(("generate", "reward"), 0.0)
        with self._may_stop():
            batch = self.batches.take(step)
        scored = batch.scored
        self.directory.rollouts(step, scored, batch.replaced)  # before anything can go wrong: the update's evidence
        weights = global_weights(scored, g.aggregation, r.max_new_tokens, g.mask_truncated)
        self.pool.sleep() if self.colocated else self.pool.tend()  # what is to be restarted loads meanwhile
        self.directory.begin("learn", step)
        shards = shard_groups(scored, len(self.learners.actors), weights, g.micro_tokens, self.costs)
        learning = self.learners.start_grpo_step(shards, step)
        self._work_ahead(step, learning)
        report = learning.result()
        self.directory.begin("sync", step)
        t0 = time.perf_counter()
        sync = self._push(step + 1)
        end = time.perf_counter()
        metrics = {**batch.metrics, **_completion_metrics(scored), **report.metrics, **sync}
        metrics["policy/staleness"] = sum(step - s.group.weight_version for s in scored) / len(scored)
        metrics |= _times(self._spent | {"learn": report.seconds, "sync": end - t0, "step": end - start}, scored)
        if self.held_out and ((step + 1) % g.eval_every == 0 or last):
            self.directory.begin("evaluate", step)
            with suppress(StopAsked), self._may_stop():  # the step itself counts
                metrics |= held_out_metrics(self.pool, self.held_out, r.max_new_tokens)
        return metrics

    def _collect(self, batch: Batch) -> Collected:
        """Generate and score a batch with the weights that the engines have."""
        r, step = self.config.rollout, batch.step
        sampling = Sampling(self.config.grpo.group_size, r.temperature, r.max_new_tokens, self.config.seed, step)

        def generate(prompts: Sequence[Prompt]) -> list[Group]:
            known, new = self.batches.recall(prompts)
            return known + (self.pool.generate(new, sampling) if new else [])

        begin = (lambda phase: None) if self.pool.held else (lambda phase: self.directory.begin(phase, step))
        g, source = self.config.grpo, self.source
        found = collect(g, batch.prompts, step, generate, self.scorer, source, self.sampler, begin)
        self._spent["generate"] += found.generate_seconds  # in this step, for whichever batch
        self._spent["reward"] += found.reward_seconds
        return found

    def _work_ahead(self, step: int, learning: Learning) -> None:
        """While the learners work on `step`. What goes wrong here and lasts is met again with the step behind us.

        After a signal the batch is still worth having, as long as the learners are at work anyway.
        """
        self.pool.held = True
        try:
            with self._may_stop(learning):
                self.batches.work_ahead(step)
        except (StopAsked, UserError, EngineFailed, ScorerFailed):
            pass
        finally:
            self.pool.held = False

    @contextmanager
    def _may_stop(self, learning: Learning | None = None) -> Iterator[None]:
        """Inside, a signal ends every wait at once (StopAsked), beside `learning` once that is over; outside, what has
        begun is finished."""

        def check() -> None:
            self.watch.raise_if_asked()
            if learning is None or learning.over():
                self.stop.leave_if_asked()

        self.pool.check = self.scorer.check = check
        try:
            yield
        finally:
            self.pool.check = self.scorer.check = self.watch.raise_if_asked


def _times(seconds: dict[str, float], scored: list[ScoredGroup]) -> dict[str, float]:
    """Seconds by part of this step. With staleness the parts lie side by side, and generating is for a later step."""
    tokens, total = sum(len(c.token_ids) for s in scored for c in s.group.completions), seconds["step"]
    return {f"time/{part}": spent for part, spent in seconds.items()} | {
        "perf/tokens_per_second": tokens / total,
        "perf/rollout_idle": 1 - seconds["generate"] / total,
        "perf/learner_idle": 1 - seconds["learn"] / total,
    }


def _completion_metrics(scored: list[ScoredGroup]) -> dict[str, float]:
    metrics = {}
    for task in ("iqa", "iaa"):
        completions = [c for s in scored if s.group.prompt.sample.task == task for c in s.group.completions]
        if completions:
            n = len(completions)
            metrics[f"completion/tokens/{task}"] = sum(len(c.token_ids) for c in completions) / n
            metrics[f"completion/clipped_ratio/{task}"] = sum(c.finish_reason == "length" for c in completions) / n
    return metrics
