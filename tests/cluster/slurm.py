"""A real Slurm on `hosts.Hosts`: munged, slurmctld on a host of its own, slurmd on every node.

Everything it writes is in one directory; nothing of the machine's own Slurm is used. Partitions: `main` (default), and
`low`, whose jobs are preempted and requeued for those of `high`, after a user signal and `GRACE_SECONDS`.

With `gpus` the nodes have pretended GPUs, by number or type:number; nothing else on them sees one.

    with Hosts(2) as hosts, Slurm(hosts, gpus=("2", "a100:4")) as slurm:
        job = slurm.submit(["--wrap", "srun hostname"])
        state = slurm.wait(job)                         # {"JobState": "COMPLETED", "ExitCode": "0:0", ...}
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hosts import Host, Hosts, wait_until

GRACE_SECONDS = 60
CPUS = 4  # per node, whatever this machine has: several jobs share a node
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

CONFIG = """
ClusterName=test
SlurmctldHost=control({control})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=requeue_delay=0,bf_interval=2,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=20
KillWait=10
CompleteWait=0
MessageTimeout=20
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


class Slurm:
    """A running Slurm whose nodes are `hosts`. `run` is a user at the controller; `env` lets any process be one."""

    def __init__(self, hosts: Hosts, gpus: Sequence[str] = ()) -> None:
        self.hosts = hosts
        self.directory = Path(tempfile.mkdtemp(prefix="tatar-slurm-"))
        self.env = {"SLURM_CONF": str(self.directory / "slurm.conf")}
        self._munged: subprocess.Popen[bytes] | None = None
        try:
            self.control = hosts.add("control")
            self._write_config(gpus)
            self._start()
        except BaseException:
            self.close()
            raise

    def _write_config(self, gpus: Sequence[str]) -> None:
        nodes, devices = "", ""
        for host, gres in itertools.zip_longest(self.hosts, gpus):
            nodes += (
                f"NodeName={host.name} NodeHostname={host.name} NodeAddr={host.ip} CPUs={CPUS} Sockets=1 "
                f"CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=12000{f' Gres=gpu:{gres}' if gres else ''}\n"
            )
            if gres:
                *kind, count = gres.split(":")
                for i in range(int(count)):
                    file = self.directory / f"{host.name}-gpu{i}"
                    file.symlink_to("/dev/null")  # Slurm sets CUDA_VISIBLE_DEVICES for devices, not for plain files
                    devices += f"NodeName={host.name} Name=gpu {f'Type={kind[0]} ' if kind else ''}File={file}\n"
        text = CONFIG.format(control=self.control.ip, directory=self.directory, nodes=nodes, grace=GRACE_SECONDS)
        if gpus:
            text += "GresTypes=gpu\n"
            (self.directory / "gres.conf").write_text(devices)
        (self.directory / "slurm.conf").write_text(text)

    def _start(self) -> None:
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {name: self.directory / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
        options = [f"--{'seed' if n == 'seed' else n}-file={p}" for n, p in files.items() if n != "socket"]
        # --force: the directory is readable by us alone, munged would have it open to all
        self._munged = subprocess.Popen(
            ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={files['socket']}", *options],
            stderr=subprocess.DEVNULL,
        )
        wait_until(files["socket"].exists, 20, "munged's socket")
        self._daemon(self.control, ["slurmctld", "-D"])
        for host in self.hosts:
            self.start_node(host)
        self.wait_for_nodes()

    def _daemon(self, host: Host, command: list[str]) -> None:
        with (self.directory / f"{host.name}.out").open("a") as log:
            host.popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT)

    def start_node(self, host: Host) -> None:
        """slurmd on a host that was just powered on."""
        self._daemon(host, ["slurmd", "-D", "-N", host.name])

    def wait_for_nodes(self, timeout: float = 60) -> None:
        """Until every node is idle. Raises TimeoutError with what Slurm says of them."""

        def idle() -> bool:
            return self.run(["sinfo", "-h", "-p", "main", "-o", "%t %D"]).stdout.split() == [
                "idle",
                str(len(self.hosts)),
            ]

        try:
            wait_until(idle, timeout, "all nodes idle")
        except TimeoutError as e:
            said = self.run(["scontrol", "show", "nodes", "-o"])
            raise TimeoutError(f"{e}\n{said.stdout}{said.stderr}{self.logs()}") from None

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        options["env"] = self.env | options.get("env", {})
        return self.control.run(command, **options)

    def submit(self, words: list[str], **options: Any) -> str:
        """`sbatch words`; the job's number."""
        done = self.run(["sbatch", "--parsable", *words], **options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by its names; {} when Slurm does not know it."""
        said = self.run(["scontrol", "show", "job", "-o", job]).stdout
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def wait(self, job: str, timeout: float = 300) -> dict[str, str]:
        """The job when it has ended for good. Raises TimeoutError with its log."""

        def ended() -> dict[str, str] | None:
            found = self.job(job)
            return found if found.get("JobState") in ENDED else None

        try:
            return wait_until(ended, timeout, f"job {job} ended")
        except TimeoutError as e:
            raise TimeoutError(f"{e}\n{json.dumps(self.job(job), indent=1)}\n{self.output(job)}") from None

    def output(self, job: str) -> str:
        """What the job has printed so far."""
        path = Path(self.job(job).get("StdOut", ""))
        return path.read_text(errors="replace") if path.is_file() else ""

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted(self.directory.glob("*.log")) + sorted(self.directory.glob("*.out"))
        return "".join(f"== {f.name}\n{f.read_text(errors='replace')[-2000:]}\n" for f in files)

    def close(self) -> None:
        """The daemons on hosts die with their hosts; with them still up, here."""
        for host in [*self.hosts, *([self.control] if hasattr(self, "control") else [])]:
            if host.is_on:
                host.run(["pkill", "-KILL", "slurm"])
        if self._munged is not None:
            self._munged.kill()
            self._munged.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Slurm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
