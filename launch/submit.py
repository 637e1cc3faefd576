"""Run a stage on several nodes by what this machine offers; `make sft|grpo|eval NODES=n` calls it.

    python launch/submit.py grpo NODES [--wait] [--dry-run] [--config FILE] [key=value ...]

Where Slurm answers: `sbatch --nodes=NODES --gpus-per-node=N slurm/STAGE.sh ...`, N as in cluster.gpus_per_node
(--wait stays until it ends, with its exit status).
Else with RAY_ADDRESS=http://...: `ray job submit` there; with RAY_ADDRESS=host:port: the stage joins that cluster.
Else NODES Ray nodes on this machine, for development, ended with the stage. Their ports are open on all interfaces of
the machine, as Ray's always are, and ask for a token of their own. One node needs none of that: the stage runs here.
--dry-run prints the commands and the plan and runs none of them. Exit status: the stage's, or sbatch's.
"""

from __future__ import annotations

import math
import os
import re
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
from types import FrameType
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tatar_dist.config.load import load_config  # noqa: E402
from tatar_dist.config.schema import Config  # noqa: E402
from tatar_dist.errors import UserError  # noqa: E402
from tatar_dist.plan.plan import Plan, Stage, as_table, resolve  # noqa: E402
from tatar_dist.run.process import short_temp_dir  # noqa: E402

NODE = "/tatar-ray-xxxxxxxx/99"  # Ray's directory of a node on this machine, below that for temporary files

COMMANDS: dict[str, Stage] = {"sft": "sft", "grpo": "grpo", "eval": "evaluate"}
RAY = str(Path(sys.executable).with_name("ray"))  # of this environment, activated or not
START_SECONDS = 120
STOP_SECONDS = 30
JOB_ENVIRONMENT = "configs/cluster/job-environment.yaml"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
Command = tuple[list[str], dict[str, str]]  # argv, and what it has in its environment beside ours


def slurm_config() -> str:
    """Return what `scontrol show config` prints, "" where no Slurm answers."""
    if shutil.which("sbatch") is None:
        return ""
    try:
        done = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return ""
    except OSError as e:
        raise UserError(
            f"sbatch is here but scontrol is not ({e.strerror}): whether Slurm runs cannot be asked: put Slurm's bin/ "
            "on the PATH, or take sbatch off it"
        ) from None
    return "" if done.returncode else done.stdout


def sbatch_gpus(config: Config, slurm: str) -> list[str]:
    """Return the option that asks for the nodes' GPUs: none where Slurm counts none, or SBATCH_* variables ask."""
    asked = any(k.startswith("SBATCH_GPUS") for k in os.environ) or "gpu" in os.environ.get("SBATCH_GRES", "")
    counted = re.search(r"^GresTypes .*gpu", slurm, re.MULTILINE)
    gpus = config.cluster.gpus_per_node
    return [f"--gpus-per-node={gpus}"] if gpus and counted and not asked else []


def stage_command(python: str, stage: str, words: list[str]) -> list[str]:
    return [python, f"launch/{COMMANDS[stage]}.py", *words]


def sbatch_command(stage: str, options: list[str], words: list[str], wait: bool) -> list[str]:
    return ["sbatch", *(["--wait"] if wait else []), *options, f"slurm/{stage}.sh", *words]


def submit_to_slurm(stage: str, command: list[str], wait: bool) -> int:
    """sbatch prints the job's number; then how to follow and to stop it."""
    status = subprocess.run(command).returncode
    if status and not wait:
        asked = shlex.join(command[: command.index(f"slurm/{stage}.sh") + 1])
        print(f"tatar-dist: Slurm refused {asked} (from NODES and cluster.gpus_per_node)", file=sys.stderr)
    if status == 0 and not wait:
        print(
            f"follow it:                              tail -F tatar-{stage}-JOB.log\n"
            "let it save a checkpoint, requeue, go on: scancel --batch --signal=USR1 JOB\n"
            "stop it for good at its last checkpoint:  scancel JOB"
        )
    return status


def job_command(stage: str, words: list[str], job: str) -> list[str]:
    options = ["--working-dir", ".", "--runtime-env", JOB_ENVIRONMENT, "--submission-id", job]
    return [RAY, "job", "submit", *options, "--", *stage_command("python", stage, words)]


def submit_to_ray(command: list[str], job: str) -> int:
    """Stays with the job. Ray's client knows success and failure only; the driver's own status is asked for.

    Raises:
        UserError: nobody there takes jobs.
    """
    from ray.job_submission import JobSubmissionClient

    address = os.environ["RAY_ADDRESS"]
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as e:
        raise UserError(f"RAY_ADDRESS={address}: takes no jobs: {' '.join(str(e).split())[:200]}") from None
    if subprocess.run(command).returncode == 0:
        return 0
    try:
        return client.get_job_info(job).driver_exit_code or 1
    except RuntimeError:  # it was never taken; Ray's client has said why
        return 1


def local_nodes(config: Config, nodes: int, port: int, directory: Path) -> list[Command]:
    """The commands that start `nodes` Ray nodes here. CPUs are logical: processes take turns on the cores.

    Raises:
        UserError: fewer GPUs than they need.
    """
    most = nodes * config.cluster.gpus_per_node  # of a number that is left to the plan
    plan_cpus = (1 + (config.cluster.learners or most)) * config.cluster.learner_cpus
    plan_cpus += (1 + (config.rollout.engines or most)) * config.cluster.engine_cpus
    common = [
        f"--num-cpus={max(os.cpu_count() or 1, math.ceil(plan_cpus / nodes) + 2)}",
        f"--object-store-memory={config.cluster.object_store_mib << 20}",
        "--dashboard-agent-listen-port=0",
        "--disable-usage-stats",
        "--block",
    ]
    client = f"--ray-client-server-port={free_port()}"
    head = [RAY, "start", "--head", f"--port={port}", client, "--include-dashboard=false"]
    others = [[RAY, "start", f"--address={loopback(0)}:{port}"]] * (nodes - 1)
    gpus = devices(nodes, config.cluster.gpus_per_node)
    return [
        # a directory each, or they would take each other's socket names
        (
            [*start, f"--node-ip-address={loopback(i)}", f"--temp-dir={directory}/{i + 1}", *common],
            {"CUDA_VISIBLE_DEVICES": gpus[i]},
        )
        for i, start in enumerate([head, *others])
    ]


def devices(nodes: int, gpus: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each node: `gpus` each, of those that we may use."""
    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = [str(i) for i in range(nodes * gpus)] if ours is None else [d for d in ours.split(",") if d]
    if len(found) < nodes * gpus:
        raise UserError(f"CUDA_VISIBLE_DEVICES={ours}: {nodes} nodes of cluster.gpus_per_node={gpus} need more GPUs")
    return [",".join(found[i * gpus : (i + 1) * gpus]) for i in range(nodes)]


def loopback(node: int) -> str:
    """Each node's own address of the loopback device; Ray would replace 127.0.0.1 by one that others can reach."""
    return f"127.0.1.{node + 1}"


def free_port() -> int:
    with socket.socket() as s:
        s.bind((loopback(0), 0))
        return s.getsockname()[1]


@contextmanager
def local_cluster(config: Config, nodes: int) -> Iterator[dict[str, str]]:
    """A development cluster; yields the environment of its clients. Signals end it, also while it starts.

    Raises:
        UserError: it did not come up.
    """
    port = free_port()
    address = f"{loopback(0)}:{port}"
    for number in SIGNALS:
        signal.signal(number, leave)
    with (
        tempfile.TemporaryDirectory(
            prefix="tatar-ray-", dir=short_temp_dir(NODE), ignore_cleanup_errors=True
        ) as directory,
        ExitStack() as stack,
    ):
        env = secured(Path(directory, "token"))
        started: list[subprocess.Popen[bytes]] = []
        stack.callback(end, started)
        for i, (command, more) in enumerate(local_nodes(config, nodes, port, Path(directory))):
            log = Path(directory, f"node{i + 1}.log")
            with log.open("wb") as out:
                # a session of its own: Ctrl-C is for the stage, which stops at a safe point while Ray lives
                started.append(
                    subprocess.Popen(command, env=env | more, stdout=out, stderr=out, start_new_session=True)
                )
            wait_for_node(address, f"node{i + 1}={loopback(i)}", env, log)  # one by one: Ray gives a node 30 s to start
        yield env | {"RAY_ADDRESS": address}


def leave(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


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
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave half of them
    for p in reversed(processes):
        p.terminate()
    for p in processes:
        try:
            p.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            p.kill()


def run_stage(command: list[str], env: dict[str, str]) -> int:
    """The stage as a child that gets our signals; its status, 128 + n where a signal ended it."""
    child = subprocess.Popen(command, env=env)
    for number in SIGNALS:
        signal.signal(number, lambda n, _: child.send_signal(n))
    signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends it to the child as well
    status = child.wait()
    return 128 - status if status < 0 else status


def run(stage: str, nodes: int, words: list[str], wait: bool, dry: bool) -> int:
    files = [b for a, b in zip(words, words[1:], strict=False) if a == "--config"]
    values = [w for i, w in enumerate(words) if w != "--config" and (not i or words[i - 1] != "--config")]
    config = load_config(files, values)
    plan = resolve(config, COMMANDS[stage])  # what cannot run is refused before anything starts
    address = os.environ.get("RAY_ADDRESS", "")
    here = stage_command(sys.executable, stage, words)
    if slurm := slurm_config():
        command = sbatch_command(stage, [f"--nodes={nodes}", *sbatch_gpus(config, slurm)], words, wait)
        return show(plan, [(command, {})]) if dry else submit_to_slurm(stage, command, wait)
    if address.startswith(("http://", "https://")):
        if not Path(config.output).is_absolute():
            raise UserError(
                f"output={config.output}: a Ray job's working directory goes when the job ends: give an absolute "
                "path that all nodes share"
            )
        job = f"tatar-{stage}-{secrets.token_hex(4)}"
        command = job_command(stage, words, job)
        return show(plan, [(command, {"RAY_ADDRESS": address})]) if dry else submit_to_ray(command, job)
    if address or nodes == 1:
        joined = {"RAY_ADDRESS": address} if address else {}
        return show(plan, [(here, joined)]) if dry else run_stage(here, dict(os.environ))
    if dry:
        port, directory = free_port(), Path(short_temp_dir(NODE), f"tatar-ray-{secrets.token_hex(4)}")
        print(f"mkdir -m 700 {directory}")
        print(f"export RAY_AUTH_TOKEN_PATH={directory}/token && source launch/ray_security.sh && unset RAY_ADDRESS")
        last: Command = (here, {"RAY_ADDRESS": f"{loopback(0)}:{port}"})
        return show(plan, [*local_nodes(config, nodes, port, directory), last])
    with local_cluster(config, nodes) as env:
        return run_stage(here, env)


def show(plan: Plan, commands: list[Command]) -> int:
    """As shell lines, all but the last in the background; then the plan."""
    from rich.console import Console

    lines = [" ".join([*(f"{k}={shlex.quote(v)}" for k, v in env.items()), shlex.join(argv)]) for argv, env in commands]
    print(" &\n".join(lines), flush=True)
    Console().print(as_table(plan))
    return 0


def main(*words: str) -> int:
    if len(words) < 2 or words[0] not in COMMANDS:
        raise UserError(f"launch/submit.py: expected {'|'.join(COMMANDS)} NODES [--config FILE] [key=value ...]")
    (stage, nodes), rest = words[:2], words[2:]
    if not (nodes.isascii() and nodes.isdecimal() and int(nodes)):
        raise UserError(f"NODES={nodes}: must be a number from 1")
    given = [w for w in rest if w not in ("--wait", "--dry-run")]
    if not any(w.startswith("cluster.nodes=") for w in given):
        given.append(f"cluster.nodes={nodes}")
    os.chdir(ROOT)
    return run(stage, int(nodes), given, "--wait" in rest, "--dry-run" in rest)


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except UserError as e:
        print(f"tatar-dist: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
