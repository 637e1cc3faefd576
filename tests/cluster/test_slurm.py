"""Jobs on a real Slurm whose nodes are namespaces: trained, refused, side by side, preempted and requeued."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hosts import Hosts, wait_until
from slurm import Slurm
from test_security import REFUSED, asked, listening

from tatar_dist.run.events import read_events

ROOT = Path(__file__).parents[2]
SLURMS_OWN = {"srun", "slurmd", "slurmstepd"}  # munge guards them
STEPS = 10
DETERMINISTIC = ["rollout.deterministic=true", "cluster.learner_placement=spread", f"grpo.max_steps={STEPS}"]
SMALL_SFT = ["sft.global_batch=4", "sft.max_steps=2", "sft.eval_every=0", "cluster.learners=1"]


@pytest.fixture(scope="module")
def reference(submit, slurm: Slurm) -> Path:
    """A job on two nodes that nothing disturbs."""
    job, directory = submit("grpo", *DETERMINISTIC)
    found = slurm.wait(job, 400)
    assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), slurm.output(job)
    return directory


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights_of(run: Path, step: int = STEPS) -> str:
    return hashlib.sha256((run / f"checkpoints/step_{step:06d}/model/model.safetensors").read_bytes()).hexdigest()


def our_line(log: str) -> str:
    (line,) = [line for line in log.splitlines() if line.startswith(("tatar-dist: ", "grpo: "))]
    return line


def test_two_nodes_train_and_the_job_is_completed(reference: Path):
    run = reference / "run"
    assert steps_of(run) == list(range(STEPS))
    assert (run / "checkpoints/latest").exists()
    (ready,) = [e for e in read_events(run) if e["event"] == "learners/ready"]
    assert set(ready["hosts"]) == {"node1", "node2"}
    assert {e["host"] for e in read_events(run) if e["event"] == "engine/ready"} == {"node1", "node2"}
    assert [p.name for p in reference.glob("logs/*/*") if p.name == "token"] == []


def test_a_jobs_model_is_evaluated_by_another_job(submit, slurm: Slurm, manifests: list[str], reference: Path):
    words = [f"model.path={reference}/run/checkpoints/latest/model", f"data.test=[{','.join(manifests)}]"]
    job, directory = submit("eval", *words, "data.eval_limit=4")
    found = slurm.wait(job, 300)
    assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), slurm.output(job)
    measured = json.loads((directory / "run/metrics.json").read_text())["datasets"]
    assert {name: m["n"] for name, m in measured.items()} == {"set-iqa": 4, "set-iaa": 4}
    assert {e["host"] for e in read_events(directory / "run") if e["event"] == "engine/ready"} == {"node1", "node2"}


def test_bad_arguments_are_exit_status_2_and_one_line(submit, slurm: Slurm):
    job, directory = submit("grpo", "grpo.groupsize=3")
    found = slurm.wait(job, 60)
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "2:0")
    assert our_line(slurm.output(job)).startswith("tatar-dist: grpo.groupsize=3: unknown key")
    assert not (directory / "logs").exists()


def test_a_node_that_does_not_come_is_named_at_once(submit, slurm: Slurm, tmp_path: Path):
    activate = tmp_path / "activate"
    activate.write_text(f"source {ROOT}/.venv/bin/activate; [[ $SLURMD_NODENAME != node2 ]]\n")
    job, directory = submit("grpo", TATAR_ACTIVATE=str(activate))
    found = slurm.wait(job, 90)
    assert (found["JobState"], found["ExitCode"]) == ("FAILED", "1:0"), slurm.output(job)
    line = our_line(slurm.output(job))
    assert line.startswith("grpo: node node2 did not come: ") and "TATAR_ACTIVATE" in line and "on node2" in line
    assert not (directory / "run").exists()


def test_two_jobs_on_one_node_do_not_collide_and_ask_strangers_for_a_token(submit, slurm: Slurm, hosts: Hosts):
    half = ("--nodes=1", "--nodelist=node1", "--oversubscribe", "--cpus-per-task=2", "--mem=5000")
    jobs = [submit("sft", *SMALL_SFT, f"seed={seed}", sbatch=half) for seed in range(2)]

    def both() -> bool:
        return all(slurm.job(job)["JobState"] == "RUNNING" and (d / "run/events.jsonl").exists() for job, d in jobs)

    wait_until(both, 120, "both jobs running at the same time")
    tokens = [*jobs[0][1].glob("logs/*/token"), *jobs[1][1].glob("logs/*/token")]
    assert [t.stat().st_mode & 0o777 for t in tokens] == [0o600] * 2
    assert tokens[0].read_text() != tokens[1].read_text()
    for job, _ in jobs:
        assert hosts[0].run(["stat", "-c", "%a", f"/tmp/ray/tatar-{job}"]).stdout == "700\n"
    ours = {port: name for port, name in listening(hosts[0]).items() if name not in SLURMS_OWN}
    answers = asked(hosts.outsider, hosts[0].ip, list(ours))
    assert {"gcs_server", "raylet"} <= set(ours.values()) and set(answers.values()) <= REFUSED, (ours, answers)
    for job, directory in jobs:
        found = slurm.wait(job)
        assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), slurm.output(job)
        assert steps_of(directory / "run") == [0, 1]


def test_f9_a_preempted_job_is_requeued_and_ends_with_the_same_weights(
    submit, slurm: Slurm, hosts: Hosts, reference: Path
):
    job, directory = submit("grpo", *DETERMINISTIC, "checkpoint.every=0", sbatch=("--nodes=2", "--partition=low"))
    run = directory / "run"
    wait_until(lambda: any(e["event"] == "step/done" for e in read_events(run)), 300, "the first step")
    urgent = slurm.submit(
        ["--partition=high", "--nodes=2", "--exclusive", f"--output={directory}/urgent", "--wrap", "true"]
    )
    assert slurm.wait(urgent, 120)["JobState"] == "COMPLETED"
    found = slurm.wait(job, 400)
    log = slurm.output(job)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    assert "ended with 75: requeued" in log

    events = read_events(run)
    (signal,) = [e for e in events if e["event"] == "signal"]
    starts = [e["from_step"] for e in events if e["event"] == "run/start"]
    assert signal["name"] == "SIGUSR1" and 1 <= signal["step"] < STEPS
    assert len(starts) == 2 and 1 <= starts[1] < STEPS
    assert steps_of(run) == list(range(STEPS))
    assert weights_of(run) == weights_of(reference / "run")
    assert weights_of(run) != weights_of(run, starts[1])


def test_a_signal_while_the_nodes_start_requeues_at_once(submit, slurm: Slurm, tmp_path: Path):
    """The first start hangs on node2; after the signal the job is requeued and trains."""
    activate = tmp_path / "activate"
    activate.write_text(
        f"source {ROOT}/.venv/bin/activate; "
        "[[ $SLURMD_NODENAME != node2 || ${SLURM_RESTART_COUNT:-0} != 0 ]] || sleep 100000\n"
    )
    job, directory = submit("sft", *SMALL_SFT, TATAR_ACTIVATE=str(activate))
    wait_until(lambda: [*directory.glob("logs/*/node2.log")], 120, "node2 starting")
    slurm.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    found = slurm.wait(job, 200)
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("COMPLETED", "0:0", "1"), slurm.output(job)
    assert "ended with 75: requeued" in slurm.output(job)
    assert steps_of(directory / "run") == [0, 1]
