"""The batches of a GRPO run on their way to the learners: drawn, then generated and scored, some of them ahead of need.

In: the sampler. Out: `Batch`es in the order of their steps. With `staleness: k` the batch of step n is sampled from the
weights of step n - k (those the run starts with, for the first k), while the learners work: the lag is fixed, so that
a run can be repeated. Prompts of the next batch are always drawn ahead, images read and checked.

What is ahead belongs to a checkpoint: `state` holds the sampler's position before it, and its completions. After a
resume the same prompts are drawn, and completions that are remembered are scored again instead of sampled again. A
batch that was cut short (a signal, the last engine's death) is sampled later, from fresher weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tatar_dist.collect import Collected
from tatar_dist.data.sampler import PromptSampler
from tatar_dist.records import Completion, Group, Prompt


@dataclass
class Batch:
    """The prompts of one step. `before`: the sampler's state before they were drawn; `collected` None: not sampled."""

    step: int
    before: dict[str, Any]
    prompts: list[Prompt]
    collected: Collected | None = None


@dataclass
class Batches:
    """The queue. `total`: the run's steps; `lag`: how many batches are sampled ahead (`grpo.staleness`)."""

    sampler: PromptSampler
    draw: Callable[[int], list[Prompt]]  # the prompts of a step, taken from the sampler
    collect: Callable[[Batch], Collected]  # samples and scores them; may take more from the sampler
    lag: int
    total: int = 0
    remembered: dict[str, Any] = field(default_factory=dict)  # group id -> its completions, of before a resume
    _queue: deque[Batch] = field(default_factory=deque)

    def take(self, step: int) -> Collected:
        """The batch of `step`. At the start of a run the `lag` batches from it on are sampled here."""
        for n in range(step, min(step + max(1, self.lag), self.total)):
            if n - step == len(self._queue):
                self._queue.append(self._drawn(n))
            batch = self._queue[n - step]
            if batch.collected is None:
                batch.collected = self.collect(batch)
        self.remembered.clear()  # what nobody asked for belongs to a run of more lag
        batch = self._queue.popleft()
        assert batch.collected is not None and batch.step == step
        return batch.collected

    def work_ahead(self, step: int) -> None:
        """While `step` is learned: draw the next batch and, with a lag, sample it. Cut short, it leaves no trace."""
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

    def _drawn(self, step: int) -> Batch:
        return Batch(step, self.sampler.state_dict(), self.draw(step))

    def state(self) -> dict[str, Any]:
        """What a run needs to go on with the first batch that was not taken. JSON."""
        sampler = self._queue[0].before if self._queue else self.sampler.state_dict()
        done = [b.collected for b in self._queue if b.collected]
        groups = [s.group for c in done for s in (*c.scored, *c.replaced)]
        return {"sampler": sampler, "ahead": {**self.remembered, **{g.prompt.group_id: _packed(g) for g in groups}}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go back to what `state` returned; one without "ahead" is of before batches were kept."""
        self._queue.clear()
        self.sampler.load_state_dict(state["sampler"])
        self.remembered = dict(state.get("ahead", {}))

    def recall(self, prompts: Sequence[Prompt]) -> tuple[list[Group], list[Prompt]]:
        """The groups of `prompts` that were sampled before a resume, once each, and the prompts without one."""
        known = [_unpacked(p, self.remembered.pop(p.group_id)) for p in prompts if p.group_id in self.remembered]
        found = {g.prompt.group_id for g in known}
        return known, [p for p in prompts if p.group_id not in found]


def _packed(group: Group) -> list[Any]:
    completions = [[c.text, c.token_ids, c.logprobs, c.finish_reason] for c in group.completions]
    return [group.weight_version, group.prompt_token_ids, completions]


def _unpacked(prompt: Prompt, packed: list[Any]) -> Group:
    version, prompt_ids, completions = packed
    made = tuple(Completion(text, tuple(ids), tuple(logprobs), end) for text, ids, logprobs, end in completions)
    return Group(prompt, tuple(prompt_ids), made, version)
