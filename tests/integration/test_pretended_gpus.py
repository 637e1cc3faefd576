"""Every command on a real Ray whose nodes pretend to have GPUs, as far as its first call of CUDA.

There no process finds a GPU, which must be one line and status 2. What is checked: how many learners and engines there
are by default, on which nodes and GPUs, and with which environment. The driver of all nodes is a pretended one, too.
PRETENDED_GPUS=all (`make nightly`) adds larger layouts and a tensor-parallel engine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import psutil
import pytest
import ray
from conftest import PIXELS, manifest_rows, png
from pretended_driver import pretended_driver
from ray.cluster_utils import Cluster as RayCluster

from tatar_dist import cli
from tatar_dist.assets import locate
from tatar_dist.cluster.ray_cluster import Cluster
from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config
from tatar_dist.data.writing import write_manifest
from tatar_dist.errors import UserError
from tatar_dist.faults.health import State
from tatar_dist.faults.waiting import Waits
from tatar_dist.rollout.engine import RolloutEngine
from tatar_dist.rollout.options import COMMON_ENV, CPU_ENGINE_ENV, engine_environment
from tatar_dist.run.checkpoints import latest
from tatar_dist.run.events import read_events
from tatar_dist.run.process import process_facts

MODEL = str(locate("tatar_dist/assets/tiny-qwen2_5-vl"))
NODES = {"1": [1], "8": [8], "2x4": [4, 4]}
FEW_CORES = ["cluster.learner_cpus=0.25", "cluster.engine_cpus=0.25"]
COLOCATED = "cluster.placement=colocated"
ALL = os.environ.get("PRETENDED_GPUS") == "all"


class Case(NamedTuple):
    """`learners`: how many on each node, in their order; `engines`: GPUs of each engine, by node."""

    command: str
    nodes: str
    words: tuple[str, ...]
    learners: tuple[int, ...]
    engines: tuple[tuple[str, ...], ...] = ()

    def name(self) -> str:
        return " ".join([self.command, "on", self.nodes, *self.words])


CASES = [
    Case("evaluate", "1", (), (), (("0",),)),
    Case("grpo", "1", (COLOCATED, "rollout.push=cuda_ipc"), (1,), (("0",),)),
    Case("grpo", "2x4", ("rollout.push=nccl",), (4,), ((), ("0", "1", "2", "3"))),
    Case("evaluate", "2x4", ("rollout.tensor_parallel=2",), (), (("0,1", "2,3"), ("0,1", "2,3"))),
]
LARGER = [
    Case("sft", "8", (), (8,)),
    Case("grpo", "8", ("rollout.tensor_parallel=2",), (4,), (("4,5", "6,7"),)),
    Case("grpo", "8", (COLOCATED,), (8,), (tuple("01234567"),)),
    Case("sft", "2x4", (), (4, 4)),
    Case("sft", "2x4", ("cluster.learners=6", "cluster.learner_placement=spread"), (3, 3)),
    Case("grpo", "2x4", ("cluster.learners=6",), (4, 2), ((), ("2", "3"))),
    Case("grpo", "2x4", ("cluster.learners=6", "rollout.tensor_parallel=2"), (4, 2), ((), ("2,3",))),
    Case("grpo", "2x4", (COLOCATED, "rollout.push=cuda_ipc"), (4, 4), (tuple("0123"), tuple("0123"))),
    Case("evaluate", "2x4", (), (), (tuple("0123"), tuple("0123"))),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that are told of eight H100."""
    return pretended_driver(tmp_path_factory.mktemp("driver"), 8)


@pytest.fixture(scope="module")
def nodes(driver: dict[str, str]) -> Iterator[Callable[[str], None]]:
    """nodes("2x4"): this process is a client of a Ray of two nodes, each with four pretended GPUs."""
    ray.shutdown()  # the one that modules share
    running: list[Any] = ["", None]

    def end() -> None:
        ray.shutdown()
        if running[1]:
            running[1].shutdown()
        running[:] = "", None

    def start(name: str) -> None:
        if running[0] != name:
            end()
            running[:] = "", RayCluster()  # without a name until all nodes are up
            cluster = running[1]
            with patch.dict(os.environ, driver):  # raylets and all that they start inherit it
                os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray takes no more GPUs than it shows
                for gpus in NODES[name]:
                    cluster.add_node(num_cpus=4, num_gpus=gpus, object_store_memory=80 << 20)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            running[0] = name

    yield start
    end()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The recipes' words for a small model and small images; all but `output` and the cluster's size."""
    directory = tmp_path_factory.mktemp("pretended")
    for task in ("iqa", "iaa"):
        rows = [r | {"split": "test" if i % 4 == 0 else "train"} for i, r in enumerate(manifest_rows(task, 32))]
        write_manifest(directory / f"{task}.parquet", rows)
    files = f"[{directory / 'iqa.parquet'},{directory / 'iaa.parquet'}]"
    return [
        f"model.path={MODEL}",
        "model.dtype=float32",
        f"model.min_pixels={PIXELS**2}",
        f"model.max_pixels={PIXELS**2}",
        *(f"data.{split}={files}" for split in ("train", "test")),
        *FEW_CORES,
    ]


def cluster_words(name: str) -> list[str]:
    return [f"cluster.nodes={len(NODES[name])}", f"cluster.gpus_per_node={NODES[name][0]}"]


def started(run: Path) -> dict[str, dict[str, Any]]:
    return {e["name"]: e for e in read_events(run) if e["event"] == "process/started"}


def one_line(errors: str) -> str:
    """The last line on stderr; the others must be warnings of a run's start."""
    *warnings, line = errors.strip().splitlines()
    assert all("never run" in w for w in warnings), errors
    return line


def no_gpu(per_node: int) -> str:
    return f"tatar-dist: cluster.gpus_per_node={per_node}, but torch sees no GPU on {os.uname().nodename} "


def colocated(words: list[str], output: Path) -> Config:
    own = [f"output={output}", COLOCATED, "rollout.push=cuda_ipc", "cluster.network_interface=ib0"]
    return load_config(["configs/grpo.yaml"], [*words, *cluster_words("1"), *own])


def environment_of(actor: Any) -> dict[str, str]:
    return ray.get(actor.__ray_call__.remote(lambda _: dict(os.environ)))


def test_each_process_has_its_environment_and_after_a_restart_the_gpu_that_it_had(nodes, words, tmp_path):
    nodes("1")
    with Cluster(colocated(words, tmp_path)) as cluster:
        learners, pool = cluster.learners(1), cluster.engines(1)
        engine, reward = pool.make(0), cluster.scorer().make()
        for call in (lambda: learners.setup("grpo", 9), lambda: ray.get(engine.setup.remote(1, 0))):
            with pytest.raises(UserError, match=r"torch sees no GPU on .* \(CUDA_VISIBLE_DEVICES: 0\): install with"):
                call()
        assert environment_of(reward)["CUDA_VISIBLE_DEVICES"] == ""  # unset, it would see the learners' GPUs
        learner = environment_of(learners.actors[0])
        of_a_rank = {"CUDA_VISIBLE_DEVICES": "0", "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
        assert learner.items() >= of_a_rank.items()
        assert "DS_ACCELERATOR" not in learner
        found = environment_of(engine)
        expected = {
            "CUDA_VISIBLE_DEVICES": "0",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_V2_MODEL_RUNNER": "0",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "NCCL_SOCKET_IFNAME": "ib0",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        assert found.items() >= expected.items()
        assert not {"VLLM_TARGET_DEVICE", "VLLM_CPU_OMP_THREADS_BIND"} & found.keys(), "they are for a CPU"
        for own in (learner, found):
            assert own["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
            assert Path(own["TRITON_CACHE_DIR"]).is_relative_to(tempfile.gettempdir())

        cluster.end_learners()
        again = cluster.learners(1, again=True)
        places = [ray.get(a.__ray_call__.remote(lambda _: process_facts())) for a in (again.actors[0], pool.make(0))]
        assert [p["gpu"] for p in places] == ["0", "0"] and len({p["pid"] for p in places}) == 2


if ALL:  # it loads a model

    def test_the_workers_of_a_tensor_parallel_engine_see_its_gpus_and_end_with_it(nodes, words, tmp_path):
        """The engine is on a CPU, its workers are the processes that vLLM spawns on GPUs, too."""
        nodes("8")
        own = ["cluster.gpus_per_node=0", "rollout.tensor_parallel=2", "rollout.max_model_len=448"]
        config = load_config(["configs/eval.yaml"], [f"output={tmp_path}", *words, *own, "rollout.max_num_seqs=4"])
        cpu = {k: v for k, v in CPU_ENGINE_ENV.items() if k != "CUDA_VISIBLE_DEVICES"}
        environment = {"env_vars": COMMON_ENV | engine_environment(config, True, 1) | cpu}
        three = ray.remote(num_gpus=3)(type("Three", (), {})).remote()
        engine = ray.remote(num_gpus=2, runtime_env=environment)(RolloutEngine).remote(config, 0)
        assert ray.get([three.__ray_ready__.remote(), engine.setup.remote(1, 0)])[1]["gpu"] == "3,4"

        def workers(engine: Any) -> list[tuple[int, str, int]]:
            return engine.llm.collective_rpc(lambda w: (w.local_rank, os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()))

        found = ray.get(engine.__ray_call__.remote(workers))
        assert [place[:2] for place in found] == [(0, "3,4"), (1, "3,4")] and found[0][2] != found[1][2]
        ray.kill(engine)
        ray.kill(three)
        deadline = time.monotonic() + 60
        while any(psutil.pid_exists(pid) for *_, pid in found):
            assert time.monotonic() < deadline, "workers outlive their engine"
            time.sleep(0.2)


class Unlucky(RolloutEngine):
    """An engine that loads nothing, and whose GPU is gone when it starts again (version -1)."""

    def setup(self, threads: int, version: int) -> dict[str, Any]:
        if version == -1:
            raise UserError("torch sees no GPU")
        return process_facts()


def test_an_engine_whose_gpu_is_gone_when_it_starts_again_does_not_end_the_run(nodes, words, tmp_path):
    nodes("1")
    with Cluster(load_config(["configs/eval.yaml"], [f"output={tmp_path}", *words, *cluster_words("1")])) as cluster:
        pool = cluster.engines(1, cls=Unlucky)
        pool.start(1)
        pool.started()
        pool.release(State.HEALTHY)
        pool.relaunch()
        pool.relaunched()
        assert pool.engines[0].health.state is State.DEAD and "no GPU" in pool.engines[0].health.reason


def test_more_gpus_than_ray_has_are_one_line(nodes, words, tmp_path, capfd):
    nodes("1")
    run = ["grpo", "--config", "configs/grpo.yaml", f"output={tmp_path / 'run'}", *words]
    assert cli.main([*run, "cluster.nodes=1", "cluster.gpus_per_node=8"]) == 2
    assert one_line(capfd.readouterr().err) == (
        "tatar-dist: 4 learner(s) and what was started before need 4 GPUs, Ray has 1: add nodes, or lower "
        "cluster.learners, rollout.engines or cluster.gpus_per_node"
    )


def test_a_run_resumes_on_gpus_and_loses_nothing_where_there_are_none(nodes, words, tmp_path, capfd):
    nodes("1")
    run = ["sft", "--config", "configs/sft.yaml", f"output={tmp_path / 'run'}", *words, "sft.global_batch=4"]
    assert cli.main([*run, "cluster.gpus_per_node=0", "sft.max_steps=1"]) == 0
    assert started(tmp_path / "run")["learner-0"]["gpu"] == "", "a run on CPUs leaves the GPUs alone"
    before = latest(tmp_path / "run")
    capfd.readouterr()
    longer = ["sft.max_steps=2", "checkpoint.accept=[sft.max_steps]"]
    assert cli.main([*run, *cluster_words("1"), *longer]) == 2
    assert one_line(capfd.readouterr().err).startswith(no_gpu(1))
    assert started(tmp_path / "run")["learner-0"]["gpu"] == "0"
    start = [e for e in read_events(tmp_path / "run") if e["event"] == "run/start"][-1]
    assert start["from_step"] == 1 and latest(tmp_path / "run") == before


def test_local_engines_of_a_rationale_run_use_the_gpu(nodes, words, tmp_path, capfd):
    nodes("1")
    rows = next(w for w in words if w.startswith("data.train=")).removeprefix("data.train=[").split(",")[0]
    own = ["rationale.teacher.local=true", *(w for w in words if w.startswith(("model.", "cluster.")))]
    run = ["rationale", "build", rows, "--output", str(tmp_path / "r.parquet")]
    assert cli.main([*run, *own, *cluster_words("1")]) == 2
    line = one_line(capfd.readouterr().err)
    assert line.startswith(no_gpu(1)) and "(CUDA_VISIBLE_DEVICES: 0)" in line


def test_a_ray_of_our_own_has_cpus_for_as_many_processes_as_gpus_where_the_cores_are_fewer(words, tmp_path):
    """Learners of 12 CPUs on two GPUs: more than Ray would count of this machine's cores."""
    command = [sys.executable, "-m", "tatar_dist", "sft", "--config", "configs/sft.yaml", f"output={tmp_path / 'run'}"]
    own = ["cluster.gpus_per_node=2", "cluster.learner_cpus=12", "cluster.object_store_mib=128"]
    env = {**os.environ, **pretended_driver(tmp_path, 2), "CUDA_VISIBLE_DEVICES": "0,1"}
    done = subprocess.run([*command, *words, *own], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and one_line(done.stderr).startswith(no_gpu(2))
    assert {e["gpu"] for name, e in started(tmp_path / "run").items() if name != "controller"} <= {"0", "1"}


def test_a_development_cluster_has_cpus_for_as_many_processes_as_gpus():
    command = [sys.executable, "launch/submit.py", "grpo", "2", "--dry-run", "--config", "configs/grpo.yaml"]
    environment = {"PATH": "", "HOME": os.environ.get("HOME", "/")}  # neither Slurm nor a Ray
    command += ["cluster.gpus_per_node=4", "cluster.learner_cpus=12"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = [int(n) for n in re.findall(r"--num-cpus=(\d+)", done.stdout)]
    assert len(found) == 2 and sum(found) >= 4 * 12 + 4, done  # four learners and four engines


def test_scoring_and_the_server_name_the_missing_gpu(tmp_path):
    picture, gpu = tmp_path / "a.png", "cluster.gpus_per_node=1"
    picture.write_bytes(png(1))
    commands = [
        ["score", str(picture), "--model", MODEL, "--set", gpu],
        ["serve", "--model", MODEL, "--port", "0", gpu],
    ]
    both = [
        subprocess.Popen([sys.executable, "-m", "tatar_dist", *words], stderr=subprocess.PIPE, text=True)
        for words in commands
    ]
    try:
        for process in both:
            assert one_line(process.communicate(timeout=300)[1]).startswith(no_gpu(1)) and process.returncode == 2
    finally:
        for process in both:
            process.kill()  # a server that starts would stay
            process.wait()


@pytest.mark.parametrize("case", CASES + (LARGER if ALL else []), ids=Case.name)
def test_a_command_places_its_processes_and_names_the_missing_gpu(case, nodes, words, tmp_path, monkeypatch, capfd):
    nodes(case.nodes)
    engines = sum(len(e) for e in case.engines)
    names = {"controller", *(f"learner-{i}" for i in range(sum(case.learners)))}
    names |= {f"engine-{i}" for i in range(engines)}
    gather = Waits.gather

    def when_all_are_there(self, *arguments):  # else the first that finds no GPU ends the run
        deadline = time.monotonic() + 300
        while not names <= started(tmp_path / "run").keys():
            assert time.monotonic() < deadline, f"{names - started(tmp_path / 'run').keys()} did not start"
            time.sleep(0.1)
        return gather(self, *arguments)

    monkeypatch.setattr(Waits, "gather", when_all_are_there)
    recipe = {"evaluate": "eval"}.get(case.command, case.command)
    run = [case.command, "--config", f"configs/{recipe}.yaml", f"output={tmp_path / 'run'}"]
    status = cli.main([*run, *words, *cluster_words(case.nodes), *case.words])
    line = one_line(capfd.readouterr().err)
    assert status == 2
    per_node = NODES[case.nodes][0]
    assert line.startswith(
        f"tatar-dist: cluster.gpus_per_node={per_node}, but torch sees no GPU on {os.uname().nodename}"
    )
    found = started(tmp_path / "run")
    assert found.keys() == names
    assert read_events(tmp_path / "run")[-1]["reason"] == "UserError" + line.removeprefix("tatar-dist")
    assert found["controller"]["gpu"] == os.environ.get("CUDA_VISIBLE_DEVICES"), "the controller is left alone"

    learners = [(found[f"learner-{i}"]["node"], found[f"learner-{i}"]["gpu"]) for i in range(sum(case.learners))]
    order = list(dict.fromkeys(node for node, _ in learners))
    assert [sum(n == node for n, _ in learners) for node in order] == list(case.learners)
    assert len(set(learners)) == len(learners), "a GPU of its own for each"
    if "cluster.learner_placement=spread" not in case.words:
        assert [n for n, _ in learners] == sorted((n for n, _ in learners), key=order.index), "node after node"
        assert [g for _, g in learners] == [str(i) for n in case.learners for i in range(n)]
    places = [(found[f"engine-{i}"]["node"], found[f"engine-{i}"]["gpu"]) for i in range(engines)]
    if COLOCATED in case.words:
        assert places == learners[:engines]
    else:
        used = [(node, gpu) for node, visible in learners + places for gpu in visible.split(",")]
        assert len(set(used)) == len(used), "no GPU is shared"
    others = [n for n in dict.fromkeys(n for n, _ in places) if n not in order]
    by_node = [tuple(sorted(g for n, g in places if n == node)) for node in order + others]
    assert [gpus for gpus in by_node if gpus] == [gpus for gpus in case.engines if gpus]
