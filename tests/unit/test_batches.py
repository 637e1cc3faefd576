"""The queue of batches: order, lag, what a checkpoint holds, and that a resume samples nothing twice."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tatar_dist.sampling import Batches, Collected, PromptBatch
from tatar_dist.types import Completion, Group, Prompt, Sample, ScoredGroup

IDS = [f"{n:06d}/{3 * n + i:02d}" for n in range(6) for i in range(2)]  # a third of what is drawn is a refill's


class Counter:
    """A sampler whose state is how many samples it gave."""

    at = 0

    def state_dict(self) -> dict:
        return {"at": self.at}

    def load_state_dict(self, state: dict) -> None:
        self.at = state["at"]


class World:
    """Draws two prompts a step; samples them with the current version, and takes one more sample, as a refill does."""

    def __init__(self, lag: int, total: int = 6) -> None:
        self.sampler, self.version, self.log, self.sampled = Counter(), 0, [], []
        self.batches = Batches(self.sampler, self.draw, self.collect, lag, total)  # type: ignore[arg-type]

    def draw(self, step: int) -> list[Prompt]:
        ids = [f"{self.sampler.at + i:02d}" for i in range(2)]
        self.sampler.at += 2
        return [Prompt(Sample(i, "d", "iqa", b"", 1.0), "text", f"{step:06d}/{i}") for i in ids]

    def collect(self, batch: PromptBatch) -> Collected:
        known, new = self.batches.recall(batch.prompts)
        self.sampled += [p.group_id for p in new]
        made = Completion("a", (1, 2), (-0.1, -1 / 3), "stop")
        groups = sorted(known + [Group(p, (7,), (made,), self.version) for p in new], key=lambda g: g.prompt.group_id)
        self.sampler.at += 1
        zero = np.zeros(1)
        return Collected([ScoredGroup(g, zero, {}, zero, zero) for g in groups])

    def learn(self, step: int) -> None:
        """One step, as the controller makes it."""
        self.log.append([(s.group.prompt.group_id, s.group.weight_version) for s in self.batches.take(step).scored])
        self.batches.work_ahead(step)
        self.version = step + 1


@pytest.mark.parametrize("lag", [0, 1, 2, 4, 9])
def test_each_batch_has_the_weights_of_lag_steps_before_and_every_sample_comes_once(lag):
    world = World(lag)
    for step in range(6):
        world.learn(step)
    assert [[v for _, v in batch] for batch in world.log] == [[max(0, n - lag)] * 2 for n in range(6)]
    assert [i for batch in world.log for i, _ in batch] == [
        f"{n:06d}/{3 * n + i:02d}" for n in range(6) for i in range(2)
    ]
    assert world.sampler.at == 18 and len(world.sampled) == 12, "nothing is drawn or sampled beyond the last step"


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_resumed_run_is_the_undisturbed_one(lag, stop):
    whole = World(lag)
    for step in range(6):
        whole.learn(step)
    first = World(lag)
    for step in range(stop):
        first.learn(step)
    state = json.loads(json.dumps(first.batches.state()))

    second = World(lag)
    second.version = stop
    second.batches.load_state(state)
    for step in range(stop, 6):
        second.learn(step)
    assert first.log + second.log == whole.log if stop else second.log == whole.log
    assert sorted(first.sampled + second.sampled) == sorted(whole.sampled), "what was sampled ahead is not made again"


def test_a_run_stopped_between_two_steps_of_another_lag_goes_on_with_fresher_weights():
    first = World(lag=3)
    for step in range(2):
        first.learn(step)
    second = World(lag=0)
    second.version = 2
    second.batches.load_state(first.batches.state())
    for step in range(2, 6):
        second.learn(step)
    assert [i for batch in first.log + second.log for i, _ in batch] == IDS
    assert [batch[0][1] for batch in second.log] == [0, 3, 4, 5]


def test_working_ahead_that_is_cut_short_leaves_no_trace():
    class Stop(BaseException):
        pass

    world = World(lag=1)
    world.learn(0)
    world.learn(1)
    kept, broken = world.batches.state(), world.batches.collect

    def stop(batch: PromptBatch) -> Collected:
        world.sampler.at += 5
        raise Stop

    taken = world.batches.take(2)
    after = world.batches.state()
    world.batches.collect = stop
    with pytest.raises(Stop):
        world.batches.work_ahead(2)
    assert world.batches.state() == after and after != kept and taken.scored
    world.batches.collect = broken
    world.version = 3
    world.learn(3)
    assert [i for i, _ in world.log[-1]] == ["000003/09", "000003/10"]


def test_a_checkpoint_of_before_batches_were_kept_can_be_read():
    world = World(lag=1)
    world.batches.load_state({"sampler": {"at": 6}, "step": 2})
    world.version = 2
    world.learn(2)
    assert world.log == [[("000002/06", 2), ("000002/07", 2)]]


def test_numbers_survive_the_checkpoint_to_the_bit():
    world = World(lag=1)
    world.learn(0)
    state = json.loads(json.dumps(world.batches.state()))
    (stored, *_) = state["ahead"].values()
    assert stored[2][0][2] == [-0.1, -1 / 3]
