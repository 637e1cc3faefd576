"""The check of a way of pushing before training: what it notices, what it falls back to, what it leaves behind."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from conftest import tiny_words

from tatar_dist import grpo as controller
from tatar_dist.cluster import selfcheck
from tatar_dist.cluster.ray_cluster import Cluster
from tatar_dist.config.load import load_config
from tatar_dist.errors import Interrupted
from tatar_dist.learner.actor import WeightsOutOfSync
from tatar_dist.prompts.source import PromptSource
from tatar_dist.report.reading import history
from tatar_dist.run.directory import RunDirectory, read_metrics
from tatar_dist.run.events import read_events
from tatar_dist.run.status import RunWatcher
from tatar_dist.sampling import make_sampler
from tatar_dist.sync import checked
from tatar_dist.sync.checked import CheckedPush
from tatar_dist.sync.object_store import ObjectStorePush
from tatar_dist.types import LearnerRow

LIMIT_S = 5.0
ONE = ("cluster.learners=1", "rollout.engines=1")
PARTS = {"vision", "merger", "embedding", "even layers", "odd layers", "norm"}


def skip(learner, mark: str) -> None:
    """On a learner: gather no weights whose names contain `mark`."""
    gather = learner.zero3.full_parameters

    def some(everywhere: bool = False):
        return (pair for pair in gather(everywhere) if mark not in pair[0])

    learner.zero3.full_parameters = some


def skip_nothing(learner) -> None:
    del learner.zero3.full_parameters


class Faulty(ObjectStorePush):
    """A push that leaves out the weights whose names contain `mark`; from its push number `since` on."""

    mark, since, pushes = "", 0, 0

    def push(self, learners, engines, version):
        self.pushes += 1
        if self.pushes <= self.since:
            return super().push(learners, engines, version)
        ray.get([a.__ray_call__.remote(skip, self.mark) for a in learners.actors])
        try:
            return super().push(learners, engines, version)
        finally:
            ray.get([a.__ray_call__.remote(skip_nothing) for a in learners.actors])


class Late(ObjectStorePush):
    def push(self, learners, engines, version):
        done = super().push(learners, engines, version)
        time.sleep(LIMIT_S)
        return done


class Stopped(ObjectStorePush):
    """A push during which the run is asked to stop."""

    def push(self, learners, engines, version):
        done = super().push(learners, engines, version)
        os.kill(os.getpid(), signal.SIGTERM)
        return done


class Rig:
    def __init__(self, config, cluster, directory):
        self.config, self.waits, self.events = config, cluster.waits, []
        self.learners, self.pool = cluster.learners(config.cluster.learners), cluster.engines(config.rollout.engines)
        self.spare = ObjectStorePush(config, self.waits, self.log)
        self.pool.start(1, lambda engines, version: self.spare.push(self.learners, engines, version))
        self.learners.setup("grpo", 10)
        self.pool.started()
        prompts = PromptSource(config, directory).batch(make_sampler(config), config.grpo.prompts_per_step, 0)
        self.prompts = prompts

    def log(self, event, **fields):
        self.events.append({"event": event, **fields})

    def check(self, way=ObjectStorePush, spare=ObjectStorePush, seconds=60.0, **facts):
        """Check `way` as if it were NCCL, with `spare` behind it. Returns the events of the check."""
        config = dataclasses.replace(
            self.config, rollout=dataclasses.replace(self.config.rollout, push_check_s=seconds)
        )
        push = CheckedPush(config, "nccl", self.waits, self.log)
        self.learners.config = config
        push._way, push.spare = (made(config, self.waits, self.log) for made in (way, spare))
        vars(push._way).update(facts)
        self.events = []
        selfcheck.check(push, self.pool, self.learners, self.prompts, 0, lambda: None)
        return [e for e in self.events if e["event"] in ("push/checked", "push/fallback")]

    def call(self, function):
        """Call it on all learners."""
        return ray.get([a.__ray_call__.remote(function) for a in self.learners.actors], timeout=60)

    def weights(self):
        return self.call(bits)

    def learn(self):
        """One update towards made-up advantages; its metrics and the weights after it."""
        groups = self.pool.generate(self.prompts, selfcheck.Sampling(2, 1.0, 24, 0, 0))
        rows = [
            LearnerRow(
                g.prompt.group_id, g.prompt.sample.image, g.prompt.text, c.token_ids, g.prompt.sample.task,
                i - 0.5, c.logprobs, g.prompt_token_ids, 1 / 200,
            )
            for g in groups
            for i, c in enumerate(g.completions)
        ]  # fmt: skip
        ranks = len(self.learners.actors)
        return self.learners.grpo_step([[rows[r::ranks]] for r in range(ranks)], 0).result().metrics, self.weights()


def bits(learner) -> dict[str, bytes]:
    """On a learner: its shards of all weights, its master weights and moments, as bytes."""
    import torch

    optimizer = learner.zero3.engine.optimizer
    shards = {n: p.ds_tensor.data for n, p in learner.zero3._named()}
    shards |= {f"master {i}": t.data for i, t in enumerate(optimizer.fp32_partitioned_groups_flat)}
    return {n: t.detach().clone().view(torch.uint8).numpy().tobytes() for n, t in shards.items()}


@contextmanager
def rig_of(model, manifests, place, *words) -> Iterator[Rig]:
    config = load_config([], [f"output={place / 'run'}", *tiny_words(model, manifests), *words])
    with RunDirectory(config) as directory, Cluster(config) as cluster:
        yield Rig(config, cluster, directory)


WORDS = ("rollout.engines=1", "rollout.deterministic=true", "grpo.optim.lr=0.003", "grpo.logprob_gap_limit=0.05")


@pytest.fixture(scope="module")
def rig(model_untied, manifests, tmp_path_factory, shared_ray) -> Iterator[Rig]:
    """Two learners and an engine in float32."""
    with rig_of(model_untied, manifests, tmp_path_factory.mktemp("checked"), *WORDS) as rig:
        rig.start = tmp_path_factory.mktemp("start")
        rig.learners.save(rig.start).result()
        yield rig


def test_a_checked_way_sees_every_part_of_the_model_and_leaves_no_trace(rig):
    before = rig.weights()
    unchecked = rig.learn()
    rig.learners.load(rig.start, 2)
    assert rig.weights() == before
    (checked,) = rig.check()
    assert (checked["event"], checked["way"], checked["bit"]) == ("push/checked", "nccl", 3)
    assert set(checked["seen"]) == PARTS | {"head"} and "unseen" not in checked
    assert min(checked["seen"].values()) > 4e-5 > 1e-5 > max(checked["gap"], checked["moved"]) > 0
    assert rig.weights() == before
    assert rig.call(special_values) == ["", ""]
    assert rig.learn() == unchecked
    rig.learners.load(rig.start, 2)


@pytest.mark.parametrize(
    "facts",
    [{"mark": "visual."}, {"mark": "layers.1.mlp"}, {"mark": "", "since": 1}],
    ids=["no tower", "not all of a layer", "nothing but the first"],
)
def test_a_push_that_misses_weights_is_noticed_and_the_object_store_takes_over(rig, facts, capsys):
    before = rig.weights()
    failed, checked = rig.check(Faulty, **facts)
    assert (failed["event"], failed["way"]) == ("push/fallback", "nccl")
    assert failed["reason"].startswith("WeightsOutOfSync: engine and learner log-probabilities differ by ")
    assert (checked["event"], checked["way"]) == ("push/checked", "object_store") and checked["gap"] < 1e-5
    assert rig.weights() == before
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tatar-dist: ")]
    assert said == [
        f"tatar-dist: weight push by nccl: the check before training failed ({failed['reason']}); "
        "the run goes on with the object store"
    ]


def test_a_push_that_is_late_is_given_up(rig):
    before = rig.weights()
    failed, checked = rig.check(Late, seconds=LIMIT_S)
    assert failed["reason"] == f"RunError: not done within rollout.push_check_s={LIMIT_S:g} s"
    assert checked["way"] == "object_store" and rig.weights() == before


def test_weights_that_do_not_arrive_by_the_object_store_either_end_the_run(rig):
    before = rig.weights()
    with pytest.raises(WeightsOutOfSync, match="differ by"):
        rig.check(Faulty, Faulty)
    assert rig.weights() == before


def special_values(learner) -> str:
    """On a learner: flip bits of values at the ends of the format. Returns what is wrong."""
    import torch

    name, p = next((n, p) for n, p in learner.zero3._named() if p.ds_tensor.numel() > 64)
    shard = p.ds_tensor.data
    kept, info = shard.clone(), torch.finfo(shard.dtype)
    values = [0.0, -0.0, 1.0, -1.0, info.max, info.min, info.tiny, info.smallest_normal / 4]
    shard[: len(values)] = torch.tensor(values, dtype=shard.dtype)
    want = shard.clone()
    problems = []
    for bit in range(7):
        learner.zero3.flip(bit)
        change = (shard.double() - want.double()).abs() / want.double().abs()
        if not shard.isfinite().all() or (shard == want).any():
            problems.append(f"{name}, bit {bit}: not all moved or not all finite")
        usual = want.abs() >= info.tiny
        if not ((2 ** (bit - 8) < change[usual]) & (change[usual] <= 2.0 ** (bit - 7))).all():
            problems.append(f"{name}, bit {bit}: moved by {change[usual].min():.3g} to {change[usual].max():.3g}")
        learner.zero3.flip(bit)
        if not torch.equal(shard.view(torch.uint8), want.view(torch.uint8)):
            problems.append(f"{name}, bit {bit}: not restored")
    shard.copy_(kept)
    return "; ".join(problems)


@pytest.mark.nightly
def test_adapters_and_frozen_weights_are_checked_too(model_tied, manifests, tmp_path, shared_ray):
    words = ("model.lora_rank=4", "model.train_vision=false", "model.dtype=bfloat16", *ONE)
    with rig_of(model_tied, manifests, tmp_path, *WORDS, *words) as rig:
        before = rig.weights()
        assert rig.call(special_values) == [""]
        (checked,) = rig.check()
        assert set(checked["seen"]) == PARTS and 0 < max(checked["gap"], checked["moved"]) < 0.05
        assert checked["bit"] == 6 and "vision" in checked["unseen"]  # this model hardly looks, in bfloat16
        assert not {"embedding", "even layers", "odd layers"} & set(checked["unseen"].split(", "))
        assert rig.weights() == before


def events_of(config, *names):
    return [e for e in read_events(Path(config.output)) if e["event"] in names]


def test_moved_weights_are_never_saved_nor_trained_on(model_untied, make_config, monkeypatch, capsys):
    armed = ["controller.push_check:raise:step=9", "learner.flip:kill:rank=0"]  # the first fires never, and checks
    words = ("grpo.max_steps=1", f"failpoints={armed}", *ONE)
    config = make_config(model_untied, *words)
    monkeypatch.setattr(checked, "ObjectStorePush", Stopped)  # after the way back
    with pytest.raises(Interrupted, match="stopped while starting; the same command starts at step 0"):
        controller.run(config)
    monkeypatch.undo()
    run = Path(config.output)
    assert not list((run / "checkpoints").glob("*"))
    names = ("push/fallback", "learners/failed", "learners/ready", "push/done", "push/checked")
    ready, fallback, failed, _, moved = events_of(config, *names)
    assert ready["world_size"] == 1 and "learner rank 0 died" in fallback["reason"] == failed["reason"]
    assert moved["event"] == "push/done"  # with moved weights

    capsys.readouterr()
    controller.run(dataclasses.replace(config, failpoints=["controller.push_check:raise"]))
    line = "tatar-dist: weight push by object_store: the check before training failed (RuntimeError: failpoint "
    assert line in capsys.readouterr().err
    (step,) = read_metrics(run)
    assert abs(step["loss/kl"]) < 1e-6 and step["sync/logprob_gap_max"] < 1e-4  # the start model is the policy
    start = events_of(config, "run/start")[-1]
    assert start["push"] == "object_store" and [e["event"] for e in events_of(config, *names)][-5:] == [
        "push/fallback", "push/done", "push/done", "push/checked", "push/done",
    ]  # fmt: skip
    status = RunWatcher(run).read()
    assert (status.push, status.push_checked) == ("object_store", True)
    assert "push/fallback" in [t["event"] for t in status.troubles]
    told = history(read_events(run), 1)
    assert "2 ways of pushing given up" in told.summary and "push checked" in [e.what for e in told.entries]
