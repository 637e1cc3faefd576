"""Run a stage on several nodes by what this machine offers; `make sft|grpo|eval NODES=n` calls it.

    python launch/submit.py grpo NODES [--wait] [--dry-run] [--config FILE] [key=value ...]

Where Slurm answers: `sbatch --nodes=NODES slurm/STAGE.sh ...` (--wait stays until it ends, with its exit status).
Else with RAY_ADDRESS=http://...: `ray job submit` there; with RAY_ADDRESS=host:port: the stage joins that cluster.
Else NODES Ray nodes on this machine, for development: with a token of their own, ended with the stage.
--dry-run prints the commands and the plan and runs none of them. Exit status: the stage's, or sbatch's.
"""

from __future__ import annotations

import math
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tatar_dist.config import Config, load_config  # noqa: E402
from tatar_dist.errors import UserError  # noqa: E402
from tatar_dist.plan import Stage, as_table, resolve  # noqa: E402

COMMANDS: dict[str, Stage] = {"sft": "sft", "grpo": "grpo", "eval": "evaluate"}
RAY = [sys.executable, "-m", "ray.scripts.scripts"]  # `ray` of this environment, activated or not
START_SECONDS = 120
STOP_SECONDS = 30
JOB_ENVIRONMENT = "configs/cluster/job-environment.yaml"


def slurm_answers() -> bool:
    if shutil.which("sbatch") is None:
        return False
    try:
        return subprocess.run(["scontrol", "ping"], capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def stage_command(stage: str, words: list[str]) -> list[str]:
    return ["python", f"launch/{COMMANDS[stage]}.py", *words]


def sbatch_command(stage: str, nodes: int, words: list[str], wait: bool) -> list[str]:
    return ["sbatch", *(["--wait"] if wait else []), f"--nodes={nodes}", f"slurm/{stage}.sh", *words]


def submit_to_slurm(stage: str, command: list[str], wait: bool) -> int:
    """sbatch prints the job's number; then how to follow it."""
    status = subprocess.run(command).returncode
    if status == 0 and not wait:
        print(
            f"follow it: tail -F tatar-{stage}-JOB.log   stop it with a checkpoint: scancel --batch --signal=USR1 JOB"
        )
    return status


def job_command(stage: str, words: list[str], job: str) -> list[str]:
    options = ["--working-dir", ".", "--runtime-env", JOB_ENVIRONMENT, "--submission-id", job]
    return ["ray", "job", "submit", *options, "--", *stage_command(stage, words)]


def submit_to_ray(command: list[str], job: str) -> int:
    """Stays with the job. Ray's client knows success and failure only; the driver's own status is asked for."""
    if subprocess.run([*RAY, *command[1:]]).returncode == 0:
        return 0
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(os.environ["RAY_ADDRESS"]).get_job_info(job).driver_exit_code or 1


def local_nodes(config: Config, nodes: int, port: int) -> list[list[str]]:
    """The commands that start `nodes` Ray nodes here. CPUs are logical: processes take turns on the cores."""
    plan_cpus = (1 + config.cluster.learners) * config.cluster.learner_cpus
    plan_cpus += (1 + config.rollout.engines) * config.cluster.engine_cpus
    common = [
        f"--num-cpus={max(os.cpu_count() or 1, math.ceil(plan_cpus / nodes) + 2)}",
        f"--object-store-memory={config.cluster.object_store_mib << 20}",
        "--dashboard-agent-listen-port=0",
        "--disable-usage-stats",
        "--block",
    ]
    client = f"--ray-client-server-port={free_port()}"
    head = ["ray", "start", "--head", f"--port={port}", client, "--include-dashboard=false"]
    others = [["ray", "start", f"--address={loopback(0)}:{port}"]] * (nodes - 1)
    return [[*start, f"--node-ip-address={loopback(i)}", *common] for i, start in enumerate([head, *others])]


def loopback(node: int) -> str:
    """Each node's own address of the loopback device; Ray would replace 127.0.0.1 by one that others can reach."""
    return f"127.0.1.{node + 1}"


def free_port() -> int:
    with socket.socket() as s:
        s.bind((loopback(0), 0))
        return s.getsockname()[1]


@contextmanager
def local_cluster(config: Config, nodes: int) -> Iterator[dict[str, str]]:
    """A development cluster; yields the environment of its clients.

    Raises:
        UserError: it did not come up.
    """
    port, gpus = free_port(), config.cluster.gpus_per_node
    address = f"{loopback(0)}:{port}"
    with tempfile.TemporaryDirectory(prefix="tatar-ray-") as directory, ExitStack() as stack:
        env = secured(Path(directory, "token"))
        started: list[subprocess.Popen[bytes]] = []
        stack.callback(lambda: end(started))
        for i, command in enumerate(local_nodes(config, nodes, port)):
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(i * gpus, (i + 1) * gpus)))}
            log = Path(directory, f"node{i + 1}.log")
            with log.open("wb") as out:
                # a directory each, or they would take each other's socket names; a session of its own: Ctrl-C is for
                # the stage, which stops at a safe point while Ray lives
                start = [*RAY, *command[1:], f"--temp-dir={directory}/{i + 1}"]
                started.append(
                    subprocess.Popen(start, env=env | visible, stdout=out, stderr=out, start_new_session=True)
                )
            wait_for_node(address, f"node{i + 1}={loopback(i)}", env, log)  # one by one: Ray gives a node 30 s to start
        yield env | {"RAY_ADDRESS": address}


def wait_for_node(address: str, node: str, env: dict[str, str], log: Path) -> None:
    command = [sys.executable, "launch/ray_nodes.py", address, str(START_SECONDS), node]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(log.read_text(errors="replace").strip().splitlines()[-1:])
        raise UserError(f"the development cluster: {done.stderr.strip().splitlines()[-1]}; ray start said: {said}")


def secured(token: Path) -> dict[str, str]:
    """This environment and what launch/ray_security.sh adds to it; the token's file is made."""
    env = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(token)}
    script = "source launch/ray_security.sh && unset RAY_ADDRESS && env --null"
    done = subprocess.run(["bash", "-ec", script], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.split("\0") if line)


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """`ray start --block` takes its processes with it when it is asked to; workers first, the head last."""
    for p in reversed(processes):
        p.terminate()
    for p in processes:
        try:
            p.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            p.kill()


def run_stage(command: list[str], env: dict[str, str]) -> int:
    """The stage as a child that gets our signals; its status, 128 + n where a signal ended it."""
    child = subprocess.Popen([sys.executable, *command[1:]], env=env)
    signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends it to the child as well
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda n, _: child.send_signal(n))
    status = child.wait()
    return 128 - status if status < 0 else status


def run(stage: str, nodes: int, words: list[str], wait: bool, dry: bool) -> int:
    files = [b for a, b in zip(words, words[1:], strict=False) if a == "--config"]
    values = [w for i, w in enumerate(words) if w != "--config" and (not i or words[i - 1] != "--config")]
    config = load_config(files, values)
    plan = resolve(config, COMMANDS[stage])  # what cannot run is refused before anything starts
    address = os.environ.get("RAY_ADDRESS", "")
    job = f"tatar-{stage}-{secrets.token_hex(4)}"
    command = stage_command(stage, words)
    if slurm_answers():
        lines = [sbatch_command(stage, nodes, words, wait)]
    elif address.startswith(("http://", "https://")):
        lines = [job_command(stage, words, job)]
    elif address:
        lines = [command]
    else:
        lines = [*local_nodes(config, nodes, free_port()), command]
    if dry:
        from rich.console import Console

        if lines[0][:2] == ["ray", "start"]:
            print("export RAY_AUTH_TOKEN_PATH=NEW_FILE; source launch/ray_security.sh   # the last: with RAY_ADDRESS")
        print("\n".join(map(shlex.join, lines)), flush=True)
        Console().print(as_table(plan))
        return 0
    if lines[0][0] == "sbatch":
        return submit_to_slurm(stage, lines[0], wait)
    if lines[0][:2] == ["ray", "job"]:
        return submit_to_ray(lines[0], job)
    if address:
        return run_stage(command, dict(os.environ))
    with local_cluster(config, nodes) as env:
        return run_stage(command, env)


def main(stage: str, nodes: str, *words: str) -> int:
    given = [w for w in words if w not in ("--wait", "--dry-run")]
    if not nodes.isdigit() or int(nodes) < 1:
        raise UserError(f"NODES={nodes}: must be a number from 1")
    if not any(w.startswith("cluster.nodes=") for w in given):
        given.append(f"cluster.nodes={nodes}")
    os.chdir(ROOT)
    return run(stage, int(nodes), given, "--wait" in words, "--dry-run" in words)


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except UserError as e:
        print(f"tatar-dist: {e}", file=sys.stderr)
        sys.exit(2)
