"""Checkpoints of real learners: another number of them (F10), written beside training, node-local, a full disk (F8)."""

from __future__ import annotations

import dataclasses
import errno
import glob
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from tatar_dist.cluster.ray_cluster import Cluster
from tatar_dist.config.load import load_config
from tatar_dist.config.schema import CheckpointConfig, Config
from tatar_dist.data.sampler import PromptSampler
from tatar_dist.errors import RunError
from tatar_dist.learner.actor import Learner
from tatar_dist.learner.group import LearnerGroup
from tatar_dist.learner.sharding import Shard, shard_rows
from tatar_dist.prompts.source import PromptSource, read_manifests
from tatar_dist.run.checkpoints import Checkpoints, latest
from tatar_dist.run.directory import RunDirectory
from tatar_dist.run.events import Events, read_events
from tatar_dist.run.files import write_files
from tatar_dist.sampling import make_sampler

SAME = {"stage": "grpo"}
ROWS = 12  # divides over 1, 2 and 3 learners


class OpenLearner(Learner):
    """Shows what it holds, and writes a checkpoint only when the file OUTPUT/release is there."""

    def masters(self) -> dict[str, np.ndarray]:
        """Master weights by name, in full."""
        from deepspeed.utils import safe_get_full_fp32_param

        named = self.zero3.engine.module.named_parameters()
        return {f"fp32 {n}": safe_get_full_fp32_param(p).cpu().numpy().copy() for n, p in named}

    def state(self) -> dict[str, np.ndarray]:
        """Master weights and Adam moments, in full; step counters and settings of all groups; the engine's counters."""
        from deepspeed.utils import safe_get_full_optimizer_state

        engine, found = self.zero3.engine, self.masters()
        for name, p in engine.module.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{key} {name}"] = safe_get_full_optimizer_state(p, key).cpu().numpy().copy()
        base = engine.optimizer.optimizer
        found["steps"] = np.array([float(s["step"]) for s in base.state.values()])
        found["counters"] = np.array([engine.global_steps, engine.global_samples, engine.skipped_steps])
        found["rates"] = np.array([g["lr"] for g in base.param_groups])
        return found

    def gradient(self, shard: Shard) -> dict[str, np.ndarray]:
        """One step of the policy loss with KL to the frozen reference; the full gradient before it."""
        import torch
        from deepspeed.utils import safe_get_full_grad

        from tatar_dist.algo.loss import PolicyLoss, policy_loss

        named = dict(self.zero3.engine.module.named_parameters())
        for i, batch in enumerate(self._batches(shard)):
            self.zero3.begin(last=i == len(shard) - 1)
            with torch.no_grad():
                reference = self.zero3.reference_logp(batch)
            out = self.zero3.engine(batch)
            loss = policy_loss(
                PolicyLoss(0.2, 0.2, "token", "none", "truncate", 2.0), out.logp, None, reference, batch.advantage,
                batch.mask, batch.weight, kl_beta=0.5, engine_logp=batch.sampled_logprobs, entropy=out.entropy,
            ).loss  # fmt: skip
            self.zero3.backward(loss)
            if self.zero3.engine.is_gradient_accumulation_boundary():
                found = {n: safe_get_full_grad(p).float().cpu().numpy().copy() for n, p in named.items()}
            self.zero3.optimizer_step()
        self.trained_in = threading.get_ident()
        return found

    def files(self, part: str, *arguments: Any) -> Any:
        if part != "write":
            return super().files(part, *arguments)
        deadline = time.monotonic() + 300
        while not (Path(self.config.output) / "release").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.wrote_in = threading.get_ident()
        return super().files(part, *arguments)

    def threads(self) -> tuple[int, int, int]:
        """Where this rank trained, wrote its last checkpoint, and answers now."""
        return self.trained_in, self.wrote_in, threading.get_ident()


class Rig:
    """Learners of one config on one Ray, made anew in any number; no engines: rollouts are stored rows."""

    def __init__(self, config: Config, cluster: Cluster, source: PromptSource) -> None:
        self.config, self.cluster, self.source = config, cluster, source
        manifests = read_manifests(config.data, "train")
        samples = source.samples(PromptSampler(manifests, 0, 0.5, supervised=True), ROWS)
        rng = np.random.default_rng(0)
        plain = [source.sft_row(s) for s in samples]
        self.rows = [
            dataclasses.replace(
                r, advantage=float(rng.normal()), sampled_logprobs=(-1.0,) * len(r.completion_ids),
                weight=1 / ROWS / len(r.completion_ids),
            )
            for r in plain
        ]  # fmt: skip

    def start(self, count: int) -> LearnerGroup:
        learners = self.cluster.learners(count)
        learners.setup("grpo", 10)
        return learners

    def shards(self, learners: LearnerGroup) -> list[Shard]:
        return shard_rows(self.rows, len(learners.actors), self.config.grpo.micro_tokens)

    def ask(self, learners: LearnerGroup, method: str, shards: list[Any] | None = None) -> Any:
        """Rank 0's answer to a collective call."""
        arguments = [[s] for s in shards] if shards else [[]] * len(learners.actors)
        calls = [getattr(a, method).remote(*x) for a, x in zip(learners.actors, arguments, strict=True)]
        return learners.wait(calls)[0]


@dataclasses.dataclass
class Trained:
    """Two learners trained for three steps, their checkpoint of step 3, and what they held then."""

    rig: Rig
    run: Path
    state: dict[str, np.ndarray]
    gradient: dict[str, np.ndarray]
    sampler: dict[str, Any]
    next_prompts: list[str]
    threads: tuple[int, int, int]


def config_of(words: list[str], output: Path, *more: str) -> Config:
    return load_config(
        [],
        [
            f"output={output}", *words, "grpo.optim.lr=0.003", "grpo.optim.lr_scale={visual: 0.5}",
            "grpo.prompts_per_step=6", "grpo.group_size=2", "grpo.micro_tokens=120",
            "grpo.logprob_gap_limit=100", *more,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    run = tmp_path_factory.mktemp("trained") / "run"
    config = config_of(words, run)
    with pytest.MonkeyPatch.context() as patch, RunDirectory(config) as directory, Cluster(config) as cluster:
        patch.setattr("tatar_dist.cluster.ray_cluster.Learner", OpenLearner)
        source = PromptSource(config, directory)
        rig = Rig(config, cluster, source)
        sampler = make_sampler(config)
        learners = rig.start(2)
        events = Events(run)
        store = Checkpoints(run, config.checkpoint, events)
        for step in range(3):
            source.batch(sampler, 6, step)
            learners.grpo_step(rig.shards(learners), step).result()
        state, position = rig.ask(learners, "state"), sampler.state_dict()
        store.save(3, {"same": SAME, "sampler": position}, learners, {})
        prompts = [p.group_id for p in source.batch(sampler, 6, 3)]
        gradient = rig.ask(learners, "gradient", rig.shards(learners))
        store.poll()
        events.log("step/done", checkpoint=latest(run))
        (run / "release").touch()
        store.finish()
        threads = rig.ask(learners, "threads")
        cluster.end_learners()
        yield Trained(rig, run, state, gradient, position, prompts, threads)


def weights_of(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "model" / "model.safetensors")


def test_training_goes_on_while_a_checkpoint_is_written_and_the_checkpoint_is_of_the_step_it_was_begun(trained):
    order = [(e["event"], e.get("checkpoint")) for e in read_events(trained.run)]
    assert order[-2:] == [("step/done", None), ("checkpoint/saved", None)]  # a step done before the checkpoint counted
    saved = weights_of(latest(trained.run)[0])
    masters = {k.removeprefix("fp32 "): v for k, v in trained.state.items() if k.startswith("fp32 ")}
    assert len(saved) == len(masters) > 20
    for name, weight in saved.items():
        (master,) = [v for k, v in masters.items() if k.endswith(name)]
        assert np.array_equal(weight, master), name


def test_training_and_every_other_call_share_one_thread_and_writing_has_another(trained):
    trained_in, wrote_in, answers_in = trained.threads
    assert trained_in == answers_in != wrote_in


@pytest.mark.parametrize(("count", "storage"), [(1, "shared"), (2, "local"), (3, "local")])
def test_any_number_of_learners_continues_what_two_left(trained, count, storage, tmp_path):
    rig = trained.rig
    config = dataclasses.replace(
        rig.config, checkpoint=dataclasses.replace(rig.config.checkpoint, storage=storage, asynchronous=False)
    )
    private = set(glob.glob(f"{tempfile.gettempdir()}/tatar_checkpoint_*"))
    directory, state = Checkpoints(trained.run, config.checkpoint, Events(trained.run)).resume(SAME)
    assert (state["step"], state["learners"]) == (3, 2)
    learners = rig.start(count)
    try:
        learners.config = config
        fresh = rig.ask(learners, "masters")
        learners.load(directory, state["learners"])
        found = rig.ask(learners, "state")
        assert found.keys() == trained.state.keys()
        assert not any(np.array_equal(fresh[k], found[k]) for k in fresh), "what was equal already proves nothing"
        assert all(found[k].any() for k in found if not k.startswith("counters"))
        for key, value in trained.state.items():
            assert np.array_equal(found[key], value), key

        sampler = make_sampler(config)
        sampler.load_state_dict(state["sampler"])
        assert sampler.state_dict() == trained.sampler
        assert [p.group_id for p in rig.source.batch(sampler, 6, 3)] == trained.next_prompts

        store = Checkpoints(tmp_path, config.checkpoint, Events(tmp_path))
        store.save(3, {"same": SAME}, learners, {})  # the same weights again, by this number of writers
        again, written = store.resume(SAME)
        assert written["learners"] == count == len(list((again / "deepspeed").glob("*optim_states.pt")))
        before = weights_of(directory)
        assert all(np.array_equal(w, before[n]) for n, w in weights_of(again).items())

        gradient = rig.ask(learners, "gradient", rig.shards(learners))
        a, b = (np.concatenate([g[n].ravel() for n in sorted(trained.gradient)]) for g in (gradient, trained.gradient))
        assert np.linalg.norm(b) > 1e-3 and np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-5
    finally:
        rig.cluster.end_learners()
    assert set(glob.glob(f"{tempfile.gettempdir()}/tatar_checkpoint_*")) <= private


def test_a_learner_that_dies_while_it_writes_is_named_and_the_checkpoint_does_not_count(trained, tmp_path):
    rig = trained.rig
    (trained.run / "release").unlink()
    store = Checkpoints(tmp_path, rig.config.checkpoint, Events(tmp_path))
    learners = rig.start(2)
    try:
        store.save(4, {"same": SAME}, learners, {})
        ray.kill(learners.actors[1])
        (trained.run / "release").touch()
        with pytest.raises(RunError, match="learner rank 1"):
            store.finish()
    finally:
        (trained.run / "release").touch()
        rig.cluster.end_learners()
    assert list((tmp_path / "checkpoints").iterdir()) == [] and store.resume(SAME) is None


# F8: a full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """small_disk(mib) -> a directory on a tmpfs of that size."""
    mounted: list[Path] = []

    def mount(mib: int) -> Path:
        directory = tmp_path / f"disk{len(mounted)}"
        directory.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(directory)], check=True)
        mounted.append(directory)
        return directory

    yield mount
    for directory in mounted:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def test_the_words_of_every_library_for_a_full_disk_are_understood(small_disk):
    state = {"a": torch.zeros(3 << 20)}  # 12 MiB
    writers = {
        "torch, as DeepSpeed calls it": lambda path: torch.save(state, path),
        "torch, into a file of Python": lambda path: torch.save(state, path.open("wb")),
        "safetensors": lambda path: save_file(state, path),
        "Python": lambda path: path.write_bytes(bytes(12 << 20)),
    }
    for who, writer in writers.items():
        directory = small_disk(8)
        with pytest.raises(OSError) as e:
            write_files(directory, [("small", lambda path: path.write_bytes(b"fits")), ("large", writer)])
        assert e.value.errno == errno.ENOSPC, who


def sft(words: list[str], output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tatar_dist", "sft", "--config", "configs/demo.yaml", f"output={output}", *words]
    command += ["cluster.learners=1", "sft.max_steps=3", "sft.global_batch=4", "sft.eval_every=0", "data.validation=[]"]
    return subprocess.run([*command, *more], capture_output=True, text=True, timeout=500)


def test_a_run_on_a_full_disk_trains_on_with_its_last_checkpoint_and_ends_with_one_line(words, small_disk, tmp_path):
    probe = sft(words, tmp_path / "probe", "sft.max_steps=1")
    assert probe.returncode == 0, probe.stderr
    size = sum(f["bytes"] for f in latest(tmp_path / "probe")[1]["files"].values())
    disk = small_disk((size * 3 // 2) >> 20)
    found = sft(words, disk / "run", "checkpoint.every=1")
    assert found.returncode == 2 and "Traceback" not in found.stderr, found.stderr
    for step in (2, 3):
        said = f"step_00000{step}: cannot write the checkpoint: No space left on device; step_000001 is kept"
        assert said in found.stderr
    assert found.stderr.strip().splitlines()[-1].startswith("tatar-dist: ")
    events = read_events(disk / "run")
    failed = [Path(e["path"]).name for e in events if e["event"] == "checkpoint/failed"]
    assert failed == ["step_000002", "step_000003"]
    assert [e["step"] for e in events if e["event"] == "step/done"] == [0, 1, 2]  # training went on after the first
    directory, state = Checkpoints(disk / "run", CheckpointConfig(), Events(disk / "run")).resume(
        latest(disk / "run")[1]["same"]
    )
    assert state["step"] == 1 and sorted(p.name for p in directory.parent.iterdir()) == ["latest", "step_000001"]
