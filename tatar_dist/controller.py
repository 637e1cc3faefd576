"""The GRPO loop, on one screen: sampler, engines, reward actor (collect.py), batcher, learners, engines again.

In: a checked config. Out: a run directory (see run_directory.py) whose `checkpoints/latest/model` is the trained model.
`staleness 0`: engines and learners take turns on the same weights. Start, checkpoints and faults: training.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tatar_dist.cluster import Cluster
from tatar_dist.collect import Collected, collect
from tatar_dist.config import Config
from tatar_dist.data.sampler import PromptSampler
from tatar_dist.evaluate.runner import held_out_metrics
from tatar_dist.interrupts import Interrupts, StopAsked
from tatar_dist.learner.sharding import global_weights, shard_groups
from tatar_dist.plan import resolve
from tatar_dist.prompt_source import PromptSource, read_manifests
from tatar_dist.proven import unproven
from tatar_dist.records import ScoredGroup
from tatar_dist.rewards.presets import load_preset
from tatar_dist.rollout.engine import Sampling
from tatar_dist.run_directory import RunDirectory
from tatar_dist.sync.transports import gpu_push
from tatar_dist.sync.verify import PROMPTS, verify
from tatar_dist.training import Steps, Training


def run(config: Config) -> None:
    """Train until `grpo.max_steps` or `grpo.epochs`. Raises Interrupted after a clean stop, UserError for bad input."""
    plan, g = resolve(config, "grpo"), config.grpo
    with RunDirectory(config) as directory, Interrupts(config.checkpoint.grace_seconds) as stop:
        steps = GRPOSteps(config, directory, stop, plan.engines)
        total = g.max_steps or max(1, round(g.epochs * steps.sampler.steps_per_epoch(g.prompts_per_step)))
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
        self.sampler = make_sampler(config)
        self.held_out = self.source.held_out_prompts() if config.grpo.eval_every else []

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
        check = unproven(self.config)
        if changed or check or self.colocated:
            self._push(step)
        if check:
            state = self.sampler.state_dict()
            verify(self.pool, self.learners, self.source.batch(self.sampler, PROMPTS, step), self.config)
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
        start = time.perf_counter()
        prompts = self.source.batch(self.sampler, g.prompts_per_step, step)
        sampling = Sampling(g.group_size, r.temperature, r.max_new_tokens, self.config.seed, step)
        with self._may_stop():
            batch = collect(
                g, prompts, sampling, self.pool, self.scorer, self.source, self.sampler,
                lambda phase: self.directory.begin(phase, step),
            )  # fmt: skip
        scored = batch.scored
        self.directory.rollouts(step, scored, batch.replaced)  # before anything can go wrong: the update's evidence
        weights = global_weights(scored, g.aggregation, r.max_new_tokens, g.mask_truncated)
        self.pool.sleep() if self.colocated else self.pool.tend()  # what is to be restarted loads meanwhile
        self.directory.begin("learn", step)
        t0 = time.perf_counter()
        report = self.learners.grpo_step(shard_groups(scored, len(self.learners.actors), weights), step)
        self.directory.begin("sync", step)
        t1 = time.perf_counter()
        sync = self._push(step + 1)
        end = time.perf_counter()
        metrics = {**batch.metrics, **_completion_metrics(scored), **report.metrics, **sync}
        metrics |= _times(batch, scored, t1 - t0, end - t1, end - start)
        if self.held_out and ((step + 1) % g.eval_every == 0 or last):
            self.directory.begin("evaluate", step)
            with suppress(StopAsked), self._may_stop():  # the step itself counts
                metrics |= held_out_metrics(self.pool, self.held_out, r.max_new_tokens)
        return metrics

    @contextmanager
    def _may_stop(self) -> Iterator[None]:
        """Inside, a signal ends every wait at once (StopAsked); outside, what has begun is finished."""

        def check() -> None:
            self.stop.leave_if_asked()
            self.watch.raise_if_asked()

        self.pool.check = self.scorer.check = check
        try:
            yield
        finally:
            self.pool.check = self.scorer.check = self.watch.raise_if_asked


def _times(batch: Collected, scored: list[ScoredGroup], learn: float, sync: float, total: float) -> dict[str, float]:
    tokens = sum(len(c.token_ids) for s in scored for c in s.group.completions)
    return {
        "time/generate": batch.generate_seconds,
        "time/reward": batch.reward_seconds,
        "time/learn": learn,
        "time/sync": sync,
        "time/step": total,
        "perf/tokens_per_second": tokens / total,
        "perf/rollout_idle": 1 - batch.generate_seconds / total,
        "perf/learner_idle": 1 - learn / total,
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
