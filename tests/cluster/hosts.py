"""Several hosts on this machine: Linux namespaces on one bridge, for tests of what happens between machines.

A `Host` has its own network, processes, mounts, host name, IPC, /dev/shm, /tmp/ray and /etc/hosts; files are shared, as
on a cluster with a network file system. Hosts can be cut off, powered off and on again. `outsider` is on the same
network and belongs to nobody: what it can reach, a stranger can.

    with Hosts(2) as hosts:
        hosts[0].run(["ping", "-c1", "node2"], check=True)
        hosts[1].cut_link()

Root and the tools of .ci/packages are needed; without them the tests fail, they do not skip.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TOOLS = ("ip", "unshare", "nsenter", "setpriv", "munged", "slurmctld", "slurmd")
NETWORKS = 2**14  # 10.128.0.0/24 ... 10.191.255.0/24
_count = itertools.count()

INIT = """
set -e
hostname "$1"
mount -t tmpfs -o size=8g shm /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs -o size=8g ray /tmp/ray
mount --bind "$2" /etc/hosts
ip link set lo up
echo up
trap : TERM INT HUP USR1 USR2
while :; do sleep 86400 & wait $! || :; done  # process 1: bash takes in what its children leave behind
"""


def require_tools() -> None:
    """Raises AssertionError naming what is missing: these tests must not pass by not running."""
    assert os.geteuid() == 0, "tests/cluster needs root: it makes namespaces and network devices"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    assert not missing, f"tests/cluster needs {', '.join(missing)}: run .ci/packages"


def wait_until(condition: Callable[[], Any], timeout: float, what: str) -> Any:
    """The first true result of `condition`, asked five times a second.

    Raises:
        TimeoutError: names `what` did not happen.
    """
    end = time.monotonic() + timeout
    while True:
        if found := condition():
            return found
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout:g} s: {what}")
        time.sleep(0.2)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Host:
    """One machine. `name` resolves on every host of its `Hosts`; `link` is its cable's end at the bridge."""

    def __init__(self, name: str, ip: str, link: str, bridge: str, names: Path) -> None:
        self.name, self.ip, self.link = name, ip, link
        self._bridge, self._names = bridge, names
        self._machine: subprocess.Popen[str] | None = None
        self.power_on()

    @property
    def is_on(self) -> bool:
        return self._machine is not None and self._machine.poll() is None

    @property
    def pid(self) -> int:
        """Process 1 of the host, as this machine numbers it."""
        assert self._machine is not None and self.is_on, f"{self.name} is off"
        parent = self._machine.pid
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])

    def command(self, cmd: list[str], cwd: str | Path | None = None) -> list[str]:
        """The command line that runs `cmd` on the host."""
        enter = ["nsenter", "-t", str(self.pid), "--net", "--pid", "--mount", "--uts", "--ipc"]
        return [*enter, f"--wd={cwd or Path.cwd()}", "--", *cmd]

    def run(
        self, cmd: list[str], *, cwd: str | Path | None = None, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run and wait. `env` is added to this process's; output is captured unless `options` say otherwise."""
        if not {"stdout", "stderr"} & set(options):
            options.setdefault("capture_output", True)
        options = {"text": True, "timeout": 300, **options}
        return subprocess.run(self.command(cmd, cwd), env={**os.environ, **(env or {})}, **options)

    def popen(
        self, cmd: list[str], *, cwd: str | Path | None = None, env: dict[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Start and return. Killing what is returned leaves the command alive: signal it with `kill`."""
        return subprocess.Popen(self.command(cmd, cwd), env={**os.environ, **(env or {})}, **{"text": True, **options})

    def kill(self, pid: int, signal: str = "KILL") -> None:
        """Signal a process by the number it has on this host."""
        self.run(["kill", f"-{signal}", str(pid)], check=True)

    def out_of_memory(self, pid: int, timeout: float = 60) -> None:
        """Let the kernel end a process for memory: a cgroup gives it 4 MiB beyond what it has.

        Raises:
            TimeoutError: it has not needed more so far; it may go on as before.
        """
        ours = re.search(r"^\d+:memory:/(.*)", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        hierarchy = Path("/sys/fs/cgroup/memory") / ours[1] if ours else Path("/sys/fs/cgroup")  # version 1; 2
        limit, counts = ("memory.limit_in_bytes", "memory.oom_control") if ours else ("memory.max", "memory.events")
        group = hierarchy / f"tatar-{os.getpid()}-{next(_count)}"
        group.mkdir()
        try:
            (group / limit).write_text(str(4 << 20))
            self.run(["bash", "-c", f"echo {pid} > {group}/cgroup.procs"], check=True)  # by its number there
            killed = re.compile(r"^oom_kill [1-9]", re.MULTILINE)
            wait_until(lambda: killed.search((group / counts).read_text()), timeout, f"{pid} out of memory")
        finally:
            for left in (group / "cgroup.procs").read_text().split():
                (hierarchy / "cgroup.procs").write_text(left)
            wait_until(lambda: not (group / "cgroup.procs").read_text(), 10, "the end of what was in the cgroup")
            group.rmdir()

    def pids(self, pattern: str) -> list[int]:
        """Processes of this host whose command line matches, oldest first, by their numbers on this host."""
        return [int(pid) for pid in self.run(["pgrep", "-f", pattern]).stdout.split()]

    def cut_link(self) -> None:
        """Pull the cable: packets are lost both ways, nobody is told."""
        _ip("link", "set", self.link, "down")

    def restore_link(self) -> None:
        _ip("link", "set", self.link, "up")

    def power_off(self) -> None:
        """Every process is gone at once, and with them all memory and the network device."""
        if self._machine is not None:
            self._machine.kill()
            self._machine.wait()
            # the kernel removes it too, but not at once, and the next one has its name
            subprocess.run(["ip", "link", "del", self.link], capture_output=True)

    def power_on(self) -> None:
        """Boot: no process, empty memory, the same name and address."""
        assert not self.is_on, f"{self.name} is on"
        apart = ["--net", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--mount-proc"]
        self._machine = subprocess.Popen(
            # should this process die, so does the machine
            ["setpriv", "--pdeathsig", "KILL", "unshare", *apart, "bash", "-c", INIT, "bash", self.name, self._names],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._machine.stdout is not None
        assert self._machine.stdout.readline() == "up\n", f"{self.name} did not start"
        _ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", str(self._machine.pid))
        _ip("link", "set", self.link, "master", self._bridge, "up")
        self.run(["ip", "addr", "add", f"{self.ip}/24", "dev", "eth0"], check=True)
        self.run(["ip", "link", "set", "eth0", "up"], check=True)


class Hosts:
    """`count` hosts named node1 ..., and `outsider`. This machine is on their network too, at `gateway`."""

    def __init__(self, count: int) -> None:
        require_tools()
        _remove_left_behind()
        index = next(_count)
        number = (os.getpid() * 8 + index) % NETWORKS
        self._network = f"10.{128 + number // 256}.{number % 256}"
        self.bridge = f"td{os.getpid()}b{index}"
        self.gateway = f"{self._network}.1"
        self._directory = Path(tempfile.mkdtemp(prefix="tatar-hosts-"))
        self._names = self._directory / "hosts"
        self._all: dict[str, Host] = {}
        try:
            _ip("link", "add", self.bridge, "type", "bridge")
            _ip("addr", "add", f"{self.gateway}/24", "dev", self.bridge)
            _ip("link", "set", self.bridge, "up")
            self._names.write_text("127.0.0.1 localhost\n")
            self._nodes = [self.add(f"node{i + 1}") for i in range(count)]
            self.outsider = self.add("outsider")
        except subprocess.CalledProcessError as e:
            self.close()
            raise RuntimeError(f"{' '.join(map(str, e.cmd))}: {e.stderr}") from e
        except BaseException:
            self.close()
            raise

    def add(self, name: str) -> Host:
        """One more host on the network, for example a controller; not among those that are iterated."""
        ip = f"{self._network}.{11 + len(self._all)}"
        with self._names.open("a") as f:
            f.write(f"{ip} {name}\n")
        self._all[name] = Host(name, ip, f"{self.bridge}v{len(self._all)}", self.bridge, self._names)
        return self._all[name]

    def __getitem__(self, index: int) -> Host:
        return self._nodes[index]

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Host]:
        return iter(self._nodes)

    def named(self, name: str) -> Host:
        return self._all[name]

    def close(self) -> None:
        for host in self._all.values():
            host.power_off()
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _remove_left_behind() -> None:
    """Bridges of test processes that were killed."""
    for device in Path("/sys/class/net").iterdir():
        owner = re.fullmatch(r"td(\d+)b\d+", device.name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            subprocess.run(["ip", "link", "del", device.name], capture_output=True)
