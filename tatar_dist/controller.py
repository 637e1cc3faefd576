"""The GRPO loop, on one screen: sampler, engines, reward actor (collect.py), batcher, learners, engines again.

In: a checked config. Out: a run directory (see run_directory.py) whose `checkpoints/latest/model` is the trained model.
`staleness 0`: engines and learners take turns on the same weights. A run that finds a checkpoint in its directory
continues from it; one that is interrupted leaves one.
"""

from __future__ import annotations

import time
from typing import Any

from tatar_dist.checkpoint import Checkpoints
from tatar_dist.cluster import Cluster
from tatar_dist.collect import collect
from tatar_dist.config import Config
from tatar_dist.data.sampler import PromptSampler
from tatar_dist.evaluate.runner import held_out_metrics
from tatar_dist.interrupts import Interrupted, Interrupts
from tatar_dist.learner.group import LearnerGroup
from tatar_dist.learner.sharding import global_weights, shard_groups
from tatar_dist.plan import resolve
from tatar_dist.progress import Progress
from tatar_dist.prompt_source import PromptSource, read_manifests
from tatar_dist.records import ScoredGroup
from tatar_dist.rewards.presets import load_preset
from tatar_dist.rollout.engine import Sampling
from tatar_dist.rollout.pool import RolloutPool
from tatar_dist.run_directory import RunDirectory


def run(config: Config) -> None:
    """Train until `grpo.max_steps` or `grpo.epochs`. Raises Interrupted after a clean stop, UserError for bad input."""
    plan, g = resolve(config, "grpo"), config.grpo
    with RunDirectory(config) as directory, Interrupts() as stop:
        source = PromptSource(config, directory)
        sampler = make_sampler(config)
        total = g.max_steps or max(1, round(g.epochs * sampler.steps_per_epoch(g.prompts_per_step)))
        checkpoints = Checkpoints(directory.path.absolute(), config.checkpoint.keep)
        same = {"stage": "grpo", "learners": plan.learners, "model.path": config.model.path}
        found = checkpoints.resume(same) if config.checkpoint.resume else None
        first = found[1]["step"] if found else 0
        directory.rewind(first)
        if first >= total:
            return
        held_out = source.held_out_prompts() if g.eval_every else []
        with Cluster(config) as cluster, Progress("grpo", total, first) as progress:
            learners, pool, scorer = _start(cluster, plan, total)
            if found:
                learners.load(found[0])
                sampler.load_state_dict(found[1]["sampler"])
                pool.push(learners.weight_buckets(config.rollout.bucket_mib << 20), first)
            progress.ready()
            for step in range(first, total):
                metrics = _step(config, step, source, sampler, pool, scorer, learners, directory)
                if held_out and ((step + 1) % g.eval_every == 0 or step + 1 == total):
                    metrics |= held_out_metrics(pool, held_out, config.rollout.max_new_tokens)
                directory.log(step, metrics)
                progress.update(step + 1, metrics)
                done = step + 1 == total or stop.requested
                if done or (config.checkpoint.every and (step + 1) % config.checkpoint.every == 0):
                    checkpoints.save(step + 1, {"same": same, "sampler": sampler.state_dict()}, learners.save)
                if stop.requested and step + 1 < total:
                    raise Interrupted(f"stopped after step {step + 1} of {total}; the same command continues there")


def make_sampler(config: Config) -> PromptSampler:
    """The sampler of `data.train`; which tasks need pools that rank follows from the reward's preset."""
    manifests, d, r = read_manifests(config.data, "train"), config.data, config.reward
    ranked = load_preset(r.preset, r.weights, r.params).ranked_tasks
    return PromptSampler(manifests, config.seed, d.iqa_fraction, d.min_rank_pool, ranked=ranked)


def _start(cluster: Cluster, plan: Any, total: int) -> tuple[LearnerGroup, RolloutPool, Any]:
    """All actors, brought up at the same time."""
    learners, pool, scorer = cluster.learners(plan.learners), cluster.engines(plan.engines), cluster.reward_actor()
    engines = pool.start(cluster.threads(plan.engines))
    learners.setup("grpo", plan.split, total)
    pool.started(engines)
    return learners, pool, scorer


def _step(
    config: Config,
    step: int,
    source: PromptSource,
    sampler: PromptSampler,
    pool: RolloutPool,
    scorer: Any,
    learners: LearnerGroup,
    directory: RunDirectory,
) -> dict[str, float]:
    """One optimiser step; returns its metrics by their contract names."""
    g, r = config.grpo, config.rollout
    start = time.perf_counter()
    prompts = source.batch(sampler, g.prompts_per_step, step)
    sampling = Sampling(g.group_size, r.temperature, r.max_new_tokens, config.seed, step)
    batch = collect(g, prompts, sampling, pool, scorer, source, sampler)
    scored = batch.scored
    directory.rollouts(step, scored, batch.replaced)  # before anything can go wrong: they are the update's evidence
    weights = global_weights(scored, g.aggregation, r.max_new_tokens, g.mask_truncated)
    t0 = time.perf_counter()
    report = learners.grpo_step(shard_groups(scored, len(learners.actors), weights), step)
    t1 = time.perf_counter()
    sync = pool.push(learners.weight_buckets(r.bucket_mib << 20), step + 1)
    end = time.perf_counter()
    tokens = sum(len(c.token_ids) for s in scored for c in s.group.completions)
    return {
        **batch.metrics,
        **_completion_metrics(scored),
        **report.metrics,
        **sync,
        "time/generate": batch.generate_seconds,
        "time/reward": batch.reward_seconds,
        "time/learn": t1 - t0,
        "time/sync": end - t1,
        "time/step": end - start,
        "perf/tokens_per_second": tokens / (end - start),
        "perf/rollout_idle": 1 - batch.generate_seconds / (end - start),
        "perf/learner_idle": 1 - (t1 - t0) / (end - start),
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
