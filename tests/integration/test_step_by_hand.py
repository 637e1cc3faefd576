"""Two learners, two engines and the reward actor, stepped by hand: after a push the engines sample from the learners'
weights, all of them; a push gone wrong is noticed; the reward sees the global batch.

The processes are started once for all tests of this file; a tied model is pushed in test_run.py, bfloat16 in
test_recipe.py. Each test begins with the learners' first
state, pushed to the engines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from itertools import islice

import numpy as np
import pytest
import ray
import torch
from conftest import tiny_words

from tatar_dist.cluster.ray_cluster import Cluster
from tatar_dist.cluster.selfcheck import verify
from tatar_dist.config.load import load_config
from tatar_dist.errors import LearnersFailed, RunError
from tatar_dist.learner.actor import WeightsOutOfSync
from tatar_dist.plan.plan import push_way
from tatar_dist.prompts.source import PromptSource
from tatar_dist.rollout.engine import Sampling, WrongWeightVersion
from tatar_dist.run.directory import RunDirectory
from tatar_dist.sampling import make_sampler
from tatar_dist.sync import weight_push
from tatar_dist.sync.object_store import from_wire, stream, to_wire
from tatar_dist.types import Completion, LearnerRow

PARTS = {"vision": "visual.", "language": "language_model.layers.", "embedding": "embed_tokens", "head": "lm_head"}
MOVING = ("grpo.optim.lr=0.003", "grpo.optim.schedule=constant")


def refuses_to_reset(engine):
    """On an engine: what it says about its caches while a request holds blocks of the prefix cache."""
    from vllm import SamplingParams

    vllm = engine.llm.llm_engine
    vllm.add_request("running", "a plain view of it", SamplingParams(max_tokens=8, temperature=0.0))
    vllm.step()
    try:
        engine._reset_caches()
    except RunError as error:
        return str(error)
    finally:
        vllm.abort_request(["running"])
    return None


class Rig:
    """Learners, engines and fixed prompts of one model, stepped with made-up advantages."""

    def __init__(self, config, cluster, source):
        self.config, self.cluster, self.step = config, cluster, 0
        self.learners = cluster.learners(config.cluster.learners)
        self.pool, self.way = cluster.engines(config.rollout.engines), weight_push(config, push_way(config))
        self.pool.start(1)
        self.learners.setup("grpo", 10)
        self.pool.started()
        self.prompts = source.batch(make_sampler(config), config.grpo.prompts_per_step, 0)

    def sampling(self):
        return Sampling(4, 1.0, 40, 0, self.step)

    def generate(self):
        groups = self.pool.generate(self.prompts, self.sampling())
        assert {g.weight_version for g in groups} == {self.pool.version}
        return groups

    def learn(self, groups):
        """One update towards random advantages; returns the step's metrics. Raises WeightsOutOfSync."""
        rng = np.random.default_rng(self.step)
        rows = [
            LearnerRow(
                g.prompt.group_id, g.prompt.sample.image, g.prompt.text, c.token_ids, g.prompt.sample.task,
                float(rng.normal()), c.logprobs, g.prompt_token_ids, 1 / 40 / len(groups),
            )
            for g in groups
            for c in g.completions
        ]  # fmt: skip
        self.step += 1
        ranks = len(self.learners.actors)
        return self.learners.grpo_step([[rows[r::ranks]] for r in range(ranks)], 0).result().metrics

    def weights(self):
        found = {}
        for ref in stream(self.learners, 1 << 20):
            found |= {n: from_wire(w).clone() for n, w in ray.get(ref)["bucket"].items()}
        return found

    def push(self):
        return self.pool.push(partial(self.way.push, self.learners), self.pool.version + 1)


@pytest.fixture(scope="module")
def started(model_untied, manifests, tmp_path_factory, shared_ray) -> Iterator[Rig]:
    place = tmp_path_factory.mktemp("rig")
    config = load_config([], [f"output={place / 'run'}", *tiny_words(model_untied, manifests), *MOVING])
    with RunDirectory(config) as directory, Cluster(config) as cluster:
        rig = Rig(config, cluster, PromptSource(config, directory))
        rig.start = place / "start"
        rig.start.mkdir()
        rig.learners.save(rig.start).result()
        yield rig


@pytest.fixture
def rig(started: Rig) -> Rig:
    started.learners.load(started.start, len(started.learners.actors))
    started.push()
    return started


def test_an_engine_whose_prefix_cache_is_in_use_does_not_keep_it_in_silence(rig):
    said = ray.get(rig.pool.engines[0].actor.__ray_call__.remote(refuses_to_reset))
    assert said == "engine 0: the prefix cache is in use and keeps states of the old weights"
    assert rig.generate() and rig.push()  # it goes on


def test_engines_follow_the_learners_through_three_steps_and_notice_when_they_do_not(rig):
    before = rig.weights()
    for _ in range(3):
        metrics = rig.learn(rig.generate())
        assert metrics["sync/logprob_gap_max"] < 1e-4
        assert metrics["optim/grad_norm"] > 0
        sync = rig.push()
    assert sync["sync/bytes"] == 2 * sum(t.numel() * 4 for t in before.values())  # two engines, float32
    after = rig.weights()
    for part, mark in PARTS.items():
        moved = max(float((after[n] - before[n]).abs().max()) for n in before if mark in n)
        assert moved > 1e-3, f"{part} did not change, so the comparison proves nothing for it"
    assert rig.learn(rig.generate())["sync/logprob_gap_max"] < 1e-4  # weights of the last push, the same prompts
    # now the update of the line above is not pushed
    with pytest.raises(WeightsOutOfSync, match="push was skipped"):
        rig.learn(rig.generate())


def forget(engine) -> None:
    """From now on the engine keeps the vision tower's cached outputs over a push."""
    engine._reset_caches = engine.llm.reset_prefix_cache


def remember(engine) -> None:
    del engine._reset_caches


def asleep(engine) -> bool:
    return engine._asleep


def test_engines_on_the_learners_gpus_sleep_while_the_check_before_training_computes(rig):
    engines = [e.actor for e in rig.pool.engines]
    assert not any(ray.get([e.__ray_call__.remote(asleep) for e in engines]))
    alone, cluster = rig.pool.config, dataclasses.replace(rig.config.cluster, placement="colocated")
    rig.pool.config = dataclasses.replace(alone, cluster=cluster)
    try:
        verify(rig.pool, rig.learners, rig.prompts, rig.config)
        assert all(ray.get([e.__ray_call__.remote(asleep) for e in engines]))
        with pytest.raises(WrongWeightVersion, match="holds weight version -1"):  # it has none until it is pushed to
            ray.get(engines[0].generate.remote(rig.prompts, Sampling(1, 1.0, 8), rig.pool.version))
    finally:
        rig.pool.config = alone
        rig.push()


def test_a_push_without_an_encoder_cache_reset_is_noticed(rig):
    rig.generate()  # outputs of the tower are cached now
    engines = [e.actor for e in rig.pool.engines]
    ray.get([e.__ray_call__.remote(forget) for e in engines])
    try:
        rig.learn(rig.generate())
        rig.push()
        with pytest.raises(WeightsOutOfSync, match="encoder"):
            rig.learn(rig.generate())
    finally:
        ray.get([e.__ray_call__.remote(remember) for e in engines])


def test_the_check_before_training_passes_after_a_push_and_stops_a_run_whose_push_was_skipped(rig):
    rig.learn(rig.generate())
    with pytest.raises(WeightsOutOfSync, match="push was skipped"):
        verify(rig.pool, rig.learners, rig.prompts, rig.config)
    rig.push()
    before = {n: w.sum() for n, w in rig.weights().items()}
    gap = verify(rig.pool, rig.learners, rig.prompts[:3], rig.config)  # an odd number, over two learners
    assert 0 < gap["sync/logprob_gap"] <= gap["sync/logprob_gap_max"] < 1e-4
    assert {n: w.sum() for n, w in rig.weights().items()} == before  # it only looks


def fill_memory(learner) -> None:
    """From now on the learner finds no memory for a micro-batch."""

    import torch

    def allocate(rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.11 GiB in all")

    learner.kept, allocate.new_step = learner.collate, lambda: None
    learner.collate = allocate


def free_memory(learner) -> None:
    learner.collate = learner.kept


def test_a_learner_without_memory_says_which_keys_to_set(rig):
    groups = rig.generate()
    ray.get([a.__ray_call__.remote(fill_memory) for a in rig.learners.actors])
    try:
        with pytest.raises(
            LearnersFailed, match=r"Tried to allocate 2.00 GiB.*\. The learners' GPUs are full: lower sft"
        ):
            rig.learn(groups)
    finally:
        ray.get([a.__ray_call__.remote(free_memory) for a in rig.learners.actors])


def test_an_engine_refuses_to_sample_from_another_weight_version(rig):
    other = rig.pool.version + 5  # as if a restarted engine, which holds the initial weights, were asked for it
    with pytest.raises(WrongWeightVersion, match=f"holds weight version {rig.pool.version}, asked for {other}"):
        ray.get(rig.pool.engines[0].actor.generate.remote(rig.prompts, Sampling(2, 1.0, 8), other))


@pytest.mark.parametrize("idle", [False, True])
def test_a_large_tensor_is_read_where_ray_stored_it(shared_ray, idle):
    sent = torch.arange(1 << 20)
    back = ray.get(ray.put({"bucket": {"weight": dataclasses.replace(to_wire(sent), idle=idle)}}))["bucket"]["weight"]
    assert not back.data.flags.owndata, "Ray lays its buffers in another way now: they are copied"
    assert torch.equal(from_wire(back), sent)


def run_out_of_memory(engine) -> None:
    """From now on the engine's worker has no memory for the third part of a push."""
    transfer = engine.llm.llm_engine.model_executor.driver_worker.worker.weight_transfer_engine
    load, parts = transfer.receive_weights, []

    def receive(update) -> None:
        parts.append(update)
        if len(parts) == 3:
            raise MemoryError("no room for it")
        load(update)

    transfer.receive_weights = receive


def lose_shards(learner) -> None:
    """From now on gathering fails after ten tensors."""

    def some():
        yield from islice(type(learner.zero3).full_parameters(learner.zero3), 10)
        raise OSError("a shard is lost")

    learner.zero3.full_parameters = some


def find_shards(learner) -> None:
    del learner.zero3.full_parameters


def test_an_engine_or_the_learners_fail_between_two_buckets(rig):
    rig.learn(rig.generate())
    first, second = rig.pool.engines
    ray.get(second.actor.__ray_call__.remote(run_out_of_memory))
    nbytes = sum(t.nbytes for t in rig.weights().values())
    assert rig.push()["sync/bytes"] == nbytes  # one engine has all of them
    assert (first.health.state, second.health.state) == ("healthy", "dead")
    assert second.health.reason == "weight push: MemoryError: no room for it"
    groups = ray.get(first.actor.generate.remote(rig.prompts, rig.sampling(), rig.pool.version))
    assert rig.learn(groups)["sync/logprob_gap_max"] < 1e-4

    ray.get([a.__ray_call__.remote(lose_shards) for a in rig.learners.actors])
    with pytest.raises(LearnersFailed, match="^gathering weights: OSError: a shard is lost"):
        rig.push()
    assert first.health.state == "stale"  # it lives, and holds ten tensors of the new weights among old ones
    with pytest.raises(ray.exceptions.RayTaskError, match="holds weight version -1"):
        ray.get(first.actor.generate.remote(rig.prompts, rig.sampling(), rig.pool.version))
    ray.get([a.__ray_call__.remote(find_shards) for a in rig.learners.actors])
    rig.pool.relaunch()
    rig.pool.relaunched()
    assert rig.push()["sync/bytes"] == 2 * nbytes
    alone = ray.get(first.actor.generate.remote(rig.prompts, rig.sampling(), rig.pool.version))
    assert rig.learn(alone)["sync/logprob_gap_max"] < 1e-4


def answering(group, number: str):
    """The group with every completion replaced by one answer."""
    text = f"<think>a plain view</think><answer>{number}</answer>"
    return dataclasses.replace(
        group, completions=tuple(Completion(text, (1,), (0.0,), "stop") for _ in group.completions)
    )


def test_iaa_reward_depends_on_another_engines_images_and_iqa_reward_does_not(rig):
    iaa = [p for p in rig.prompts if p.sample.task == "iaa"]
    iqa = [p for p in rig.prompts if p.sample.task == "iqa"]
    # the first image of each task goes to engine 0, the second to engine 1
    calls = [
        e.actor.generate.remote([iaa[i], iqa[i]], rig.sampling(), rig.pool.version)
        for i, e in enumerate(rig.pool.engines)
    ]
    (iaa0, iqa0), (iaa1, iqa1) = ray.get(calls)
    scorer = rig.cluster.scorer()

    def rewards(*groups):
        scored, _ = scorer.score(list(groups))
        return {s.group.prompt.group_id: s for s in scored}

    first, second = (
        rewards(answering(iaa0, "50.00"), answering(iqa0, "50.00"), answering(iaa1, n), answering(iqa1, n))
        for n in ("10.00", "90.00")
    )
    iaa_id, iqa_id = iaa0.prompt.group_id, iqa0.prompt.group_id
    assert np.abs(first[iaa_id].terms["thurstone"] - second[iaa_id].terms["thurstone"]).min() > 1e-3
    assert np.array_equal(first[iqa_id].reward, second[iqa_id].reward)
    assert np.array_equal(first[iqa_id].terms["gaussian"], second[iqa_id].terms["gaussian"])
    # and with the completions the two engines really made
    real = rewards(iaa0, iqa0, iaa1, iqa1)
    altered = rewards(iaa0, iqa0, answering(iaa1, "1.00"), answering(iqa1, "1.00"))
    assert np.array_equal(real[iqa_id].reward, altered[iqa_id].reward)
    assert not np.array_equal(real[iaa_id].reward, altered[iaa_id].reward)
