"""A Ray cluster on `hosts.Hosts`: head on the first host, a worker on each other one, token authentication.

    with Hosts(2) as hosts, RayCluster(hosts, tmp_path) as cluster:
        hosts[0].run([sys.executable, "launch/grpo.py", ...], env=cluster.env)
        hosts[1].power_off(); hosts[1].power_on()
        cluster.start(hosts[1])

A node's death is noticed within 2 s (its processes are gone) or 5 s (its link is cut), see QUICK.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
from pathlib import Path

from hosts import Host, Hosts, wait_until

ROOT = Path(__file__).parents[2]
PORT = 6379
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
COMMON = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "RAY_USAGE_STATS_ENABLED": "0"}


class RayCluster:
    """`env` is what a client needs. Logs of `ray start` are in `directory`, Ray's own in /tmp/ray of each host."""

    def __init__(
        self, hosts: Hosts, directory: Path, cpus: int = 4, metrics: bool = False, dashboard: bool = False
    ) -> None:
        self.hosts, self.directory, self.cpus = hosts, directory, cpus
        self._dashboard = [f"--include-dashboard={str(dashboard).lower()}"]  # at the head's 127.0.0.1:8265
        self.address = f"{hosts[0].ip}:{PORT}"
        token = directory / "ray-token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(24))
        self.env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), **COMMON, "RAY_ADDRESS": self.address}
        self._node_env = {**self.env, **QUICK, "TATAR_METRICS": str(int(metrics))}
        del self._node_env["RAY_ADDRESS"]
        self._starts: dict[str, subprocess.Popen[str]] = {}
        for host in hosts:
            self._ray_start(host)
        self.wait_for([*hosts])

    def _ray_start(self, host: Host) -> None:
        head = ["--head", f"--port={PORT}", *self._dashboard]
        where = head if host is self.hosts[0] else [f"--address={self.address}"]
        command = [
            *("bash", "-c", 'source launch/ray_security.sh; exec "$@"', "bash"),
            *(sys.executable, "-m", "ray.scripts.scripts", "start", *where, f"--node-ip-address={host.ip}"),
            *(f"--num-cpus={self.cpus}", "--object-store-memory=200000000", "--block"),
        ]
        with (self.directory / f"ray-{host.name}.log").open("a") as log:
            self._starts[host.name] = host.popen(
                command, cwd=ROOT, env=self._node_env, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )

    def start(self, host: Host) -> None:
        """Let a host join (again): it was powered on, or its link was restored after Ray had given it up."""
        before = self._starts[host.name]
        wait_until(lambda: before.poll() is not None, 60, f"the former Ray of {host.name} ended")
        self._ray_start(host)
        self.wait_for([host])

    def wait_for(self, hosts: list[Host], timeout: int = 90) -> None:
        """Until all `hosts` are nodes of the cluster. Raises RuntimeError naming those that are not."""
        names = [f"{h.name}={h.ip}" for h in hosts]
        done = self.hosts[0].run(
            [sys.executable, "launch/ray_nodes.py", self.address, str(timeout), *names], cwd=ROOT, env=self.env
        )
        if done.returncode:
            logs = "".join(f"== {f}\n{f.read_text()[-2000:]}" for f in self.directory.glob("ray-*.log"))
            raise RuntimeError(f"{done.stderr}\n{logs}")

    def close(self) -> None:
        """End every Ray process on the hosts, and only there: each host sees its own processes alone."""
        for host in self.hosts:
            if host.is_on:
                host.run(["pkill", "-KILL", "-f", "ray"])

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
