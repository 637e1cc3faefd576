"""`make sft NODES=4`: a Slurm job where Slurm answers, else four Ray nodes on the machine itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hosts import Host, Hosts
from slurm import Slurm

from tatar_dist.run.events import read_events

ROOT = Path(__file__).parents[2]
HOSTS = 4
SMALL = ["sft.global_batch=4", "sft.max_steps=2", "sft.eval_every=0", "cluster.learner_placement=spread"]


@pytest.fixture
def make(hosts: Hosts, words: list[str], tmp_path: Path):
    """make(host, *more, ...) -> what `make sft NODES=4` with the tiny model gave; its run directory is tmp_path/run."""

    def go(host: Host, *more: str, env: dict[str, str] | None = None, settings: tuple[str, ...] = ()):
        arguments = " ".join([*words, *SMALL, f"output={tmp_path / 'run'}", *more])
        return host.run(
            ["make", "--no-print-directory", "sft", "NODES=4", f"ARGS={arguments}", *settings],
            cwd=ROOT,
            env={"TATAR_LOGS": str(tmp_path / "logs"), "TATAR_TMPDIR": "/tmp/ray", "TMPDIR": "/tmp/ray", **(env or {})},
        )

    return go


def learner_nodes(run: Path) -> set[str]:
    (ready,) = [e for e in read_events(run) if e["event"] == "learners/ready"]
    return set(ready["nodes"])


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_without_slurm_four_ray_nodes_here_and_none_is_left(make, hosts: Hosts, tmp_path: Path):
    done = make(hosts[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps_of(tmp_path / "run") == [0, 1]
    assert (tmp_path / "run/checkpoints/latest/model/config.json").is_file()
    assert len(learner_nodes(tmp_path / "run")) == 2
    assert hosts[0].pids("raylet|gcs_server") == []


def test_with_slurm_a_job_of_four_nodes(make, slurm: Slurm, hosts: Hosts, tmp_path: Path):
    options = {"SBATCH_OUTPUT": str(tmp_path / "job.log")}
    done = make(slurm.control, env=slurm.env | options, settings=("WAIT=1",))
    log = (tmp_path / "job.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert "Ray is up on 4 node(s), driver on node1" in log
    assert steps_of(tmp_path / "run") == [0, 1]
    assert len(learner_nodes(tmp_path / "run")) == 2
    assert not list(tmp_path.glob("logs/*/token"))


def test_dry_run_prints_the_commands_and_starts_nothing(make, slurm: Slurm, hosts: Hosts, tmp_path: Path):
    here = make(hosts[0], "--dry-run")
    assert here.returncode == 0 and here.stdout.count("ray start --address=127.0.1.1:") == 3
    assert "ray start --head" in here.stdout and "source launch/ray_security.sh" in here.stdout
    (stage,) = [line for line in here.stdout.splitlines() if "python launch/sft.py --config configs/sft.yaml" in line]
    assert stage.startswith("RAY_ADDRESS=127.0.1.1:")
    there = make(slurm.control, "--dry-run", env=slurm.env)
    assert there.returncode == 0 and "ray start" not in there.stdout
    assert "sbatch --nodes=4 slurm/sft.sh --config configs/sft.yaml" in there.stdout
    ray = make(hosts[0], "--dry-run", env={"RAY_ADDRESS": "http://node1:8265"})
    assert ray.returncode == 0 and "ray job submit --working-dir ." in ray.stdout
    one = make(slurm.control, "cluster.gpus_per_node=8", "--dry-run", env=slurm.env, settings=("NODES=1",))
    # this Slurm counts no GPUs
    assert "sbatch --nodes=1 slurm/sft.sh" in one.stdout
    assert not (tmp_path / "run").exists() and slurm.run(["squeue", "-h"]).stdout == ""


def test_what_cannot_run_is_refused_before_anything_starts(make, slurm: Slurm, hosts: Hosts, tmp_path: Path):
    for host, env in ((hosts[0], {}), (slurm.control, slurm.env)):
        done = make(host, "sft.global_batch=1", env=env)
        assert done.returncode == 2  # make's own status for a recipe that failed
        assert "tatar-dist: sft.global_batch=1 rows are too few for 2 learners" in done.stderr, done.stderr
    assert slurm.run(["squeue", "-h"]).stdout == ""
    assert not (tmp_path / "run").exists()
