"""Two Ray nodes on this machine that have pretended GPUs, and a process that runs commands which join them.

`ask(*words)` gives what `tatar-dist` answered. Each node has a driver of its own, so that each can be given other GPUs
while Ray runs; the process has the first node's.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretended_driver import pretended_driver

ROOT = Path(__file__).parents[2]
START_S = 120
# the second node has an old GPU for its display, which CUDA_VISIBLE_DEVICES hides
GPUS: tuple[dict[str, Any], ...] = (
    {"gpus": 4},
    {"gpus": 3, "others": {2: {"name": "NVIDIA T400", "capability": (7, 5), "gib": 4}}},
)

# Reads a command a line; answers with its status and what it printed.
COMMANDS = """
import contextlib, io, json, os, sys
from dataclasses import asdict
import torch
from tatar_dist.cli import main

for line in sys.stdin:
    words = json.loads(line)
    torch.version.cuda = "13.0"  # as a CUDA build says, for score and serve
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if words[0] == "doctor":
            from tatar_dist.commands.doctor_nodes import examine
            status = [asdict(check) for check in examine(os.environ["RAY_ADDRESS"])]
        elif words[0] == "read":
            import ray
            from tatar_dist.cluster.nodes import read_nodes
            ray.init(logging_level="ERROR", log_to_driver=False)
            status = [(m.driver, [[g.name, round(g.gib), g.capability] for g in m.gpus]) for m in read_nodes()]
            out.write(json.dumps({k: v for k, v in ray.cluster_resources().items() if "GPU" in k or "type" in k}))
            ray.shutdown()
        else:
            status = main(words)
    print(json.dumps([status, out.getvalue(), err.getvalue().strip().splitlines()]), flush=True)
"""


@dataclass
class Nodes:
    """The running nodes. `drivers`: the directory of each one's driver."""

    drivers: list[Path]
    process: subprocess.Popen[str]

    def give(self, node: int, **gpus: Any) -> None:
        """Give a node other GPUs, as many as Ray counted."""
        pretended_driver(self.drivers[node], **{**GPUS[node], **gpus})

    def ask(self, *words: str) -> tuple[Any, str, list[str]]:
        """Run a command. Returns status, output, lines of standard error.

        `read` and `doctor` are what a run reads of the nodes and the doctor's checks of them, as status.
        """
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process ended"
        return tuple(json.loads(answer))  # type: ignore[return-value]


@contextmanager
def gpu_nodes(directory: Path) -> Iterator[Nodes]:
    """Start the nodes, with four and two H100."""
    token = directory / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(24))
    common = {
        **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"},
        **{"RAY_enable_metrics_collection": "0", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    }
    with ExitStack() as stack:
        log = stack.enter_context(open(directory / "log", "w+"))
        drivers = [directory / "driver0", directory / "driver1"]
        environments = []
        for driver, gpus, visible in zip(drivers, GPUS, ("0,1,2,3", "0,1"), strict=True):
            driver.mkdir()
            told = {**pretended_driver(driver, **gpus), "CUDA_VISIBLE_DEVICES": visible}
            environments.append({**os.environ, **common, **told})
        with socket.socket() as s, socket.socket() as t:
            s.bind(("127.0.0.1", 0))
            t.bind(("127.0.0.1", 0))
            port, client = s.getsockname()[1], t.getsockname()[1]
        environment = {**environments[0], "RAY_ADDRESS": f"127.0.0.1:{port}"}
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", COMMANDS], cwd=ROOT, env=environment, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True,
            )
        )  # fmt: skip
        stack.callback(process.kill)  # it may hang in a command
        head = ["--head", f"--port={port}", f"--ray-client-server-port={client}", "--include-dashboard=false"]
        started: list[subprocess.Popen[bytes]] = []
        stack.callback(lambda: [node.wait(START_S) for node in started])
        stack.callback(lambda: [node.terminate() for node in reversed(started)])
        for i, where in enumerate((head, [f"--address=127.0.0.1:{port}"])):
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", *where, "--num-cpus=8", "--block"]
            command += ["--object-store-memory=80000000", "--dashboard-agent-listen-port=0"]
            quiet = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL}
            started.append(subprocess.Popen(command, env=environments[i], **quiet))  # type: ignore[call-overload]
            end = time.monotonic() + START_S
            while Path(log.name).read_text().count("Ray runtime started.") <= i:
                assert time.monotonic() < end and started[i].poll() is None, Path(log.name).read_text()
                time.sleep(0.1)
        yield Nodes(drivers, process)
