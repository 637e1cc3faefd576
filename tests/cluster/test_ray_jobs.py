"""`ray job submit` on an existing cluster: the stage's status and exit status; a job that is stopped continues."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import Hosts, wait_until
from ray_hosts import RayCluster

from tatar_dist.run.events import read_events

ROOT = Path(__file__).parents[2]
HOSTS = 1
RAY = [sys.executable, "-m", "ray.scripts.scripts", "job"]
SMALL = ["sft.global_batch=4", "sft.eval_every=0", "cluster.learners=1"]


@pytest.fixture(scope="module")
def cluster(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory):
    """One node with the dashboard, which takes the jobs; `http` is what `ray job` needs."""
    with RayCluster(hosts, tmp_path_factory.mktemp("ray"), dashboard=True) as found:
        found.http = found.env | {"RAY_ADDRESS": "http://127.0.0.1:8265"}
        yield found


@pytest.fixture
def submit(cluster: RayCluster, hosts: Hosts, words: list[str]):
    """submit(job, 'key=value', ...) -> the running `ray job submit` of the SFT of the tiny model."""

    def go(job: str, *extra: str) -> subprocess.Popen[str]:
        options = [
            "--working-dir",
            ".",
            "--runtime-env",
            "configs/cluster/job-environment.yaml",
            "--submission-id",
            job,
        ]
        stage = [sys.executable, "launch/sft.py", "--config", "configs/sft.yaml", *words, *SMALL, *extra]
        return hosts[0].popen(
            [*RAY, "submit", *options, "--", *stage],
            cwd=ROOT,
            env=cluster.http,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    return go


def job_info(cluster: RayCluster, hosts: Hosts, job: str) -> dict:
    code = (
        "import json, sys; from ray.job_submission import JobSubmissionClient as Client;"
        "i = Client(sys.argv[1]).get_job_info(sys.argv[2]);"
        "print(json.dumps({'status': i.status, 'exit': i.driver_exit_code}))"
    )
    done = hosts[0].run([sys.executable, "-c", code, cluster.http["RAY_ADDRESS"], job], env=cluster.http, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def steps_of(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def test_a_job_stopped_leaves_a_checkpoint_and_the_next_one_continues(submit, cluster, hosts: Hosts, tmp_path: Path):
    run = tmp_path / "run"
    first = submit("stopped", f"output={run}", "sft.max_steps=100000", "checkpoint.every=0")
    wait_until(lambda: len(steps_of(run)) >= 2 or first.poll() is not None, 240, "two steps of the first job")
    hosts[0].run([*RAY, "stop", "stopped"], env=cluster.http, check=True)
    said, _ = first.communicate(timeout=120)
    assert job_info(cluster, hosts, "stopped")["status"] == "STOPPED", said
    done = len(steps_of(run))
    assert (run / f"checkpoints/step_{done:06d}/model").is_dir(), said

    second = submit("continued", f"output={run}", f"sft.max_steps={done + 2}", "checkpoint.accept=[sft.max_steps]")
    said, _ = second.communicate(timeout=240)
    assert second.returncode == 0, said
    assert job_info(cluster, hosts, "continued") == {"status": "SUCCEEDED", "exit": 0}
    assert steps_of(run) == list(range(done + 2))
    starts = [e["from_step"] for e in read_events(run) if e["event"] == "run/start"]
    assert starts == [0, done]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["output=/tmp/ray/run", "sft.globalbatch=3"], "tatar-dist: sft.globalbatch=3: unknown key"),
        (["output=runs/lost"], "tatar-dist: output=runs/lost: a Ray job's working directory goes when the job ends"),
    ],
)
def test_bad_input_is_a_failed_job_with_status_2(submit, cluster, hosts: Hosts, words: list[str], said: str):
    job = f"bad-{len(said)}"
    process = submit(job, *words)
    log, _ = process.communicate(timeout=120)
    assert process.returncode == 1  # what Ray's client makes of every failure
    assert said in log
    assert job_info(cluster, hosts, job) == {"status": "FAILED", "exit": 2}
