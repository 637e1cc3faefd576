"""Draw, sample and score the groups of a GRPO step, some steps ahead of need.

`ScoredBatches` is the interface to the loop; `Batches`, its queue, returns batches in the order of their steps.

With `staleness: k` the batch of step n is sampled from the weights of step n - k (of step 0 for the first k) while the
learners work. The lag is fixed, so that a run can be repeated. Prompts of the next batch are always drawn ahead.

A checkpoint holds the sampler's position before the queued batches, and their completions: after a resume the same
prompts are drawn and the saved completions are scored again. A batch cut short is sampled later, from newer weights.

A group whose completions all have the same reward has no advantage. `grpo.zero_std`: `keep` (it counts in the
normaliser and has a KL), `drop` (it stays out of the loss), or `refill` (dynamic sampling, arXiv 2503.14476): in up to
`grpo.refill_limit` rounds such groups are replaced by new prompts of their data set, sampled from the same weights,
and the whole batch is scored again, because a ranking depends on all of it; what remains is dropped.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from tatar_dist.cluster.reward import ScorerFailed
from tatar_dist.config.schema import Config
from tatar_dist.data.sampler import PromptSampler
from tatar_dist.errors import StopRequested, UserError
from tatar_dist.learner.group import PendingUpdate
from tatar_dist.learner.sharding import Shard, global_weights, shard_groups
from tatar_dist.prompts.source import PromptSource, read_manifests
from tatar_dist.rewards.presets import load_preset
from tatar_dist.rollout.engine import Sampling
from tatar_dist.rollout.pool import EngineFailed
from tatar_dist.trainer import Run
from tatar_dist.types import Completion, Group, Prompt, ScoredGroup


@dataclass
class Collected:
    """The groups of a step in order, those that a refill replaced, and reward metrics."""

    scored: list[ScoredGroup]
    replaced: list[ScoredGroup] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class PromptBatch:
    """Prompts of a step. `before`: sampler state before the draw; `collected` None: not sampled."""

    step: int
    before: dict[str, Any]
    prompts: list[Prompt]
    collected: Collected | None = None


@dataclass
class Batches:
    """Queue of batches. `total`: steps of the run; `lag` (grpo.staleness): batches drawn ahead."""

    sampler: PromptSampler
    draw: Callable[[int], list[Prompt]]  # the prompts of a step, taken from the sampler
    collect: Callable[[PromptBatch], Collected]  # samples and scores them; may take more from the sampler
    lag: int
    total: int = 0
    remembered: dict[str, Any] = field(default_factory=dict)  # group id -> completions sampled before a resume
    _queue: deque[PromptBatch] = field(default_factory=deque)

    def take(self, step: int) -> Collected:
        """Return the batch of `step`; at the start of a run, first sample `lag` batches."""
        for n in range(step, min(step + max(1, self.lag), self.total)):
            if n - step == len(self._queue):
                self._queue.append(self._drawn(n))
            batch = self._queue[n - step]
            if batch.collected is None:
                batch.collected = self.collect(batch)
        self.remembered.clear()  # the rest was sampled with a larger lag
        batch = self._queue.popleft()
        assert batch.collected is not None and batch.step == step
        return batch.collected

    def work_ahead(self, step: int) -> None:
        """Draw and, with a lag, sample the next batch in the update of `step`. Errors undo the draw."""
        n = step + 1 + len(self._queue)
        if n >= self.total or len(self._queue) >= max(1, self.lag):
            return
        before = self.sampler.state_dict()
        try:
            batch = self._drawn(n)
            if self.lag:
                batch.collected = self.collect(batch)
        except BaseException:
            self.sampler.load_state_dict(before)
            raise
        self._queue.append(batch)

    def _drawn(self, step: int) -> PromptBatch:
        return PromptBatch(step, self.sampler.state_dict(), self.draw(step))

    def state(self) -> dict[str, Any]:
        """Return, as JSON, what a resumed run needs to continue at the first batch not taken."""
        sampler = self._queue[0].before if self._queue else self.sampler.state_dict()
        done = [b.collected for b in self._queue if b.collected]
        groups = [s.group for c in done for s in (*c.scored, *c.replaced)]
        return {"sampler": sampler, "ahead": {**self.remembered, **{g.prompt.group_id: _packed(g) for g in groups}}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned. Checkpoints of older versions have no "ahead"."""
        self._queue.clear()
        self.sampler.load_state_dict(state["sampler"])
        self.remembered = dict(state.get("ahead", {}))

    def recall(self, prompts: Sequence[Prompt]) -> tuple[list[Group], list[Prompt]]:
        """Return groups of `prompts` sampled before a resume, and the prompts that have none."""
        new = [p for p in prompts if p.group_id not in self.remembered]
        known = [p for p in prompts if p.group_id in self.remembered]
        return [_unpacked(p, self.remembered.pop(p.group_id)) for p in known], new


def _packed(group: Group) -> list[Any]:
    completions = [[c.text, c.token_ids, c.logprobs, c.finish_reason] for c in group.completions]
    return [group.weight_version, group.prompt_token_ids, completions]


def _unpacked(prompt: Prompt, packed: list[Any]) -> Group:
    version, prompt_ids, rows = packed
    completions = tuple(Completion(text, tuple(ids), tuple(logprobs), end) for text, ids, logprobs, end in rows)
    return Group(prompt, tuple(prompt_ids), completions, version)


def make_sampler(config: Config) -> PromptSampler:
    """Make the sampler of `data.train`. Ranking terms need `data.min_rank_pool` images a task."""
    manifests, d, r = read_manifests(config.data, "train"), config.data, config.reward
    ranked = load_preset(r.preset, r.weights, r.params).ranked_tasks
    return PromptSampler(manifests, config.seed, d.iqa_fraction, d.min_rank_pool, ranked=ranked)


class ScoredBatches:
    """The scored groups of each step of a GRPO run.

    Attributes:
        total: steps of the run.
        held_out: prompts of `data.validation` for an evaluation during training.
        seconds: spent on generating and scoring since `take` began, for whichever batch.
    """

    def __init__(self, config: Config, run: Run) -> None:
        g = config.grpo
        self.config, self.run = config, run
        self.source, self.sampler = PromptSource(config, run.directory), make_sampler(config)
        self.total = g.max_steps or max(1, round(g.epochs * self.sampler.steps_per_epoch(g.prompts_per_step)))
        self.held_out = self.source.held_out_prompts() if g.eval_every else []
        self.seconds = {"generate": 0.0, "reward": 0.0}
        self._costs = self.source.backbone.costs()
        self._batches = Batches(self.sampler, self._draw, self._collect, g.staleness, self.total)

    def state(self) -> dict[str, Any]:
        return self._batches.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self._batches.load_state(state)

    def peek(self, step: int) -> list[Prompt]:
        """Return the prompts of `step` without advancing the sampler."""
        before = self.sampler.state_dict()
        prompts = self._draw(step)
        self.sampler.load_state_dict(before)
        return prompts

    def take(self, step: int) -> Collected:
        """Return the batch of `step`. Raises StopRequested on a signal: no update is lost by it."""
        self.seconds = {"generate": 0.0, "reward": 0.0}
        with self.run.waits.interruptible():
            return self._batches.take(step)

    def work_ahead(self, step: int, update: PendingUpdate) -> None:
        """Draw and, with a lag, sample a later batch while the learners work on `step`.

        Errors are suppressed: if the cause persists, `take` raises it again after the current step has finished. A
        stop signal ends sampling ahead only once the learners are done with the step.
        """
        with (
            suppress(StopRequested, UserError, EngineFailed, ScorerFailed),
            self.run.engines.without_refresh(),
            self.run.waits.interruptible(update.over),
        ):
            self._batches.work_ahead(step)

    def shards(self, scored: Sequence[ScoredGroup]) -> list[Shard]:
        """Assign the rows of a batch to learners, each with its weight in the global loss."""
        g = self.config.grpo
        weights = global_weights(scored, g.aggregation, self.config.rollout.max_new_tokens, g.mask_truncated)
        return shard_groups(scored, len(self.run.learners.actors), weights, g.micro_tokens, self._costs)

    def _draw(self, step: int) -> list[Prompt]:
        return self.source.batch(self.sampler, self.config.grpo.prompts_per_step, step)

    def _collect(self, batch: PromptBatch) -> Collected:
        """Generate and score a batch with the engines' current weights.

        With `grpo.zero_std: refill`, groups whose rewards are all equal are replaced in up to `grpo.refill_limit`
        rounds; every round scores the whole batch.
        """
        g, step, out = self.config.grpo, batch.step, Collected([])
        asked = fresh = batch.prompts
        groups: list[Group] = []
        for round_ in range(1 + (g.refill_limit if g.zero_std == "refill" else 0)):
            if round_:
                silent = {s.group.prompt.group_id: s for s in out.scored if s.zero_std}
                new = self.source.more([s.group.prompt for s in silent.values()], asked, self.sampler, step)
                if not new:
                    break
                out.replaced += [silent[group_id] for group_id in new]
                groups = [group for group in groups if group.prompt.group_id not in new]
                fresh = list(new.values())
                asked = asked + fresh
            with self._phase("generate", step):
                groups = sorted(groups + self._generate(fresh, step), key=lambda group: group.prompt.group_id)
            with self._phase("reward", step):
                out.scored, out.metrics = self.run.scorer.score(groups, step)
        if g.zero_std != "keep":
            out.scored = [replace(s, trained=not s.zero_std) for s in out.scored]
        out.metrics["reward/replaced_groups"] = float(len(out.replaced))
        out.metrics["reward/dropped_groups"] = float(sum(not s.trained for s in out.scored))
        return out

    def _generate(self, prompts: Sequence[Prompt], step: int) -> list[Group]:
        r = self.config.rollout
        sampling = Sampling(self.config.grpo.group_size, r.temperature, r.max_new_tokens, self.config.seed, step)
        known, new = self._batches.recall(prompts)
        return known + (self.run.engines.generate(new, sampling) if new else [])

    @contextmanager
    def _phase(self, phase: str, step: int) -> Iterator[None]:
        """Measure a phase; show it as the run's, unless sampling ahead during an update."""
        if not self.run.engines.refresh_blocked:
            self.run.directory.begin(phase, step)
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start
