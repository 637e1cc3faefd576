"""GPUs that only Slurm and a pretended driver know: what a job asks for, what its Ray gets, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pretended_driver import pretended_driver
from slurm import Slurm

ROOT = Path(__file__).parents[2]
HOSTS = 3
GPUS = ("3", "a100:2", "1")
SHARED = ("--oversubscribe", "--cpus-per-task=2", "--mem=5000")
FOUND = """
import json, os, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

ray.init(logging_level="ERROR")
visible = ray.remote(num_cpus=0)(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
found = {"driver": [0, os.environ.get("CUDA_VISIBLE_DEVICES", "")]}
for node in ray.nodes():
    gpus = node["Resources"].get("GPU", 0)
    task = visible.options(num_gpus=gpus, scheduling_strategy=On(node["NodeID"], soft=False))
    found[node["NodeManagerHostname"]] = [gpus, ray.get(task.remote(), timeout=60)]
print(json.dumps(found))
"""


def before_each_command(directory: Path, script: str) -> str:
    """A TATAR_CONTAINER that runs `script` before each command of a job."""
    path = directory / "container.sh"
    path.write_text(f'source {ROOT}/.venv/bin/activate\n{script}\nexec "$@"\n')
    return f"bash {path}"


def test_each_nodes_ray_has_its_gpus_and_the_stage_places_its_learners_on_them(submit, slurm: Slurm, tmp_path: Path):
    """Another job holds the first GPU of node1. A learner that has its GPU ends the stage: this torch sees none."""
    (tmp_path / "found.py").write_text(FOUND)
    look = f"[[ -z ${{RAY_ADDRESS:-}} ]] || {sys.executable} {tmp_path}/found.py >{tmp_path}/found.json"
    other = slurm.submit(["--nodelist=node1", "--gpus-per-node=1", f"--output={tmp_path}/other", "--wrap", "sleep 600"])
    try:
        job, _ = submit(
            "sft",
            *("cluster.gpus_per_node=2", "cluster.learner_placement=spread", "sft.global_batch=4"),
            sbatch=("--nodes=2", "--nodelist=node[1-2]", "--gpus-per-node=2", *SHARED),
            TATAR_CONTAINER=before_each_command(tmp_path, look),
            **pretended_driver(tmp_path, gpus=3),
        )
        ended = slurm.wait(job)
    finally:  # the next tests want its GPU
        slurm.run(["scancel", other], check=True)
    log = slurm.output(job)
    found = json.loads((tmp_path / "found.json").read_text())
    assert {host: [count, sorted(seen.split(","))] for host, (count, seen) in found.items()} == {
        "driver": [0, [""]],
        "node1": [2, ["1", "2"]],
        "node2": [2, ["0", "1"]],
    }, log
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), log
    assert "tatar-dist: cluster.gpus_per_node=2, but torch sees no GPU on node" in log


def test_ray_gets_the_configured_gpus_however_sbatch_was_asked(submit, slurm: Slurm, tmp_path: Path):
    """Four jobs; each ends where its first node would start Ray."""
    look = 'if [[ "$1 $2" == "ray start" ]]; then echo "${*: -1} of $CUDA_VISIBLE_DEVICES"; exit 1; fi'
    container = before_each_command(tmp_path, look)
    other = [":", "--nodes=1", "--nodelist=node3", *SHARED]  # a heterogeneous job's, without GPUs
    asked = [
        ("node1", [], 2, "0,1"),  # --exclusive of the script alone: 3 GPUs, none of them for steps
        ("node1", ["--gpus-per-node=2", *SHARED, *other], 2, "0,1"),
        ("node2", ["--gpus=2", *SHARED], 1, "0"),
        ("node3", ["--gpus-per-task=1", *SHARED], 1, "0"),
    ]
    jobs = []
    for node, options, gpus, _ in asked:
        sbatch = ("--nodes=1", f"--nodelist={node}", *options)
        words = (f"cluster.gpus_per_node={gpus}", "cluster.learners=1")
        jobs.append(submit("sft", *words, sbatch=sbatch, TATAR_CONTAINER=container))
    for (job, directory), (node, _, gpus, devices) in zip(jobs, asked, strict=True):
        slurm.wait(job)
        (log,) = directory.glob(f"logs/*/{node}.log")
        assert log.read_text().splitlines()[0] == f"--num-gpus={gpus} of {devices}"


def test_a_node_with_too_few_gpus_ends_the_job_before_ray_starts(submit, slurm: Slurm):
    few = ("--nodes=2", "--nodelist=node[1-2]", "--gpus-per-node=1", *SHARED)
    none = ("--nodes=1", "--nodelist=node2", *SHARED)
    unlike = ("--nodes=2", "--nodelist=node[2-3]")
    said = {few: "1 on node1, 1 on node2", none: "0 on node2", unlike: "1 on node3"}
    jobs = [submit("sft", "cluster.gpus_per_node=2", sbatch=sbatch) for sbatch in said]
    for (job, directory), expected in zip(jobs, said.values(), strict=True):
        ended = slurm.wait(job)
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
        assert slurm.output(job) == (
            f"sft: too few GPUs in this job for cluster.gpus_per_node=2 ({expected}): submit it with sbatch "
            f"--gpus-per-node=2, or set cluster.gpus_per_node={expected[0]}\n"
        )
        assert not (directory / "logs").exists() and not (directory / "run").exists()


def test_make_asks_slurm_for_the_gpus_of_the_configuration(slurm: Slurm, words: list[str], tmp_path: Path):
    def make(gpus: int, *more: str, **env: str) -> str:
        arguments = " ".join([*words, f"output={tmp_path}/run", f"cluster.gpus_per_node={gpus}", *more])
        done = slurm.run(["make", "--no-print-directory", "sft", "NODES=2", f"ARGS={arguments}"], cwd=ROOT, env=env)
        return done.stdout + done.stderr

    assert "sbatch --nodes=2 --gpus-per-node=2 slurm/sft.sh" in make(2, "--dry-run")
    assert "sbatch --nodes=2 slurm/sft.sh" in make(0, "--dry-run")
    assert "sbatch --nodes=2 slurm/sft.sh" in make(2, "--dry-run", SBATCH_GRES="gpu:a100:2")
    assert "tatar-dist: Slurm refused sbatch --nodes=2 --gpus-per-node=4 slurm/sft.sh (from NODES" in make(4)
