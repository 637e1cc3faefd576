"""A stranger on the network gets nothing from any port of a run, and the token is where it belongs and nowhere else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import Host, Hosts, wait_until
from ray_hosts import RayCluster

ROOT = Path(__file__).parents[2]
STRANGER = str(Path(__file__).with_name("stranger.py"))
REFUSED = {"closed", "http 401", "http 403", "grpc UNAUTHENTICATED"}
# what Ray's control process knows of actors, workers, nodes and jobs, runtime environments included, as it sends it
LISTINGS = """
import sys, grpc
address, token = sys.argv[1], open(sys.argv[2]).read()
with grpc.insecure_channel(address) as channel:
    for what in ("Actor", "Worker", "Node", "Job"):
        ask = channel.unary_unary(f"/ray.rpc.{what}InfoGcsService/GetAll{what}Info")
        print(ask(b"", timeout=20, metadata=(("authorization", f"Bearer {token}"),)).decode("latin1"))
"""


def listening(host: Host) -> dict[int, str]:
    """Ports that can be reached from outside the host -> the process behind."""
    found = {}
    for line in host.run(["ss", "-ltnpH"], check=True).stdout.splitlines():
        ip, _, port = line.split()[3].rpartition(":")
        if "127.0.0.1" not in ip and ip != "[::1]":
            found[int(port)] = "".join(re.findall(r'\(\("([^"]+)"', line))
    return found


def asked(host: Host, ip: str, ports: list[int], *token: str) -> dict[int, str]:
    """What `host` gets from the ports of `ip`."""
    done = host.run([sys.executable, STRANGER, *token, ip, *map(str, ports)], cwd=ROOT, check=True)
    return {int(port): verdict for port, verdict in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def run(hosts, words, tmp_path_factory):
    """A GRPO run in the middle of training on two hosts: (its Ray, its run directory)."""
    directory = tmp_path_factory.mktemp("security")
    output, log = directory / "run", directory / "driver.log"
    with RayCluster(hosts, directory) as cluster, log.open("w") as said:
        longer = ["cluster.learner_placement=spread", "grpo.max_steps=100000", "rollout.engines=2"]
        command = [
            sys.executable,
            "launch/grpo.py",
            "--config",
            "configs/demo.yaml",
            *words,
            f"output={output}",
            *longer,
        ]
        driver = hosts[0].popen(command, cwd=ROOT, env=cluster.env, stdout=said, stderr=subprocess.STDOUT)
        steps = output / "metrics.jsonl"

        def trains() -> bool:
            assert driver.poll() is None, log.read_text()[-3000:]
            return steps.exists() and steps.read_text().count("\n") > 0

        wait_until(trains, 240, "the first step")
        yield cluster, output
        before = steps.read_text().count("\n")
        wait_until(lambda: trains() and steps.read_text().count("\n") > before, 60, "a step after all these questions")


def test_a_stranger_is_refused_on_every_port(hosts, run):
    cluster, _ = run
    behind = {host.ip: listening(host) for host in hosts}
    processes = {name for ports in behind.values() for name in ports.values()}
    expected = {"gcs_server", "raylet", "ray::Learner", "ray::RolloutEng"}
    assert expected <= processes, f"not all of a run listens here: {processes}"
    answers = {ip: asked(hosts.outsider, ip, list(ports)) for ip, ports in behind.items()}
    open_to_all = {
        f"{ip}:{port} {behind[ip][port]}": verdict
        for ip, verdicts in answers.items()
        for port, verdict in verdicts.items()
        if verdict not in REFUSED
    }
    assert not open_to_all
    assert {"closed", "http 401", "grpc UNAUTHENTICATED"} == {v for found in answers.values() for v in found.values()}


def test_with_the_token_the_same_client_is_served(hosts, run):
    cluster, _ = run
    head, token = hosts[0], cluster.env["RAY_AUTH_TOKEN_PATH"]
    names = listening(head)
    gcs = next(port for port, name in names.items() if name == "gcs_server")
    assert asked(hosts.outsider, head.ip, [gcs], "--harmless", "--token", token) == {gcs: "grpc OK"}
    agents = [port for port, name in names.items() if name == "ray::DashboardA"]
    served = asked(hosts.outsider, head.ip, agents, "--harmless", "--token", token)
    assert {v.split()[0] for v in served.values()} == {"http", "grpc"}
    assert not REFUSED & set(served.values())


def test_a_wrong_token_is_refused(hosts, run, tmp_path):
    wrong = tmp_path / "token"
    wrong.write_text("0" * 48)
    ports = list(listening(hosts[0]))
    assert set(asked(hosts.outsider, hosts[0].ip, ports, "--token", str(wrong)).values()) <= REFUSED


def test_the_token_is_in_one_file_that_only_its_owner_reads(hosts, run):
    cluster, output = run
    path = Path(cluster.env["RAY_AUTH_TOKEN_PATH"])
    token = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600 and len(token) >= 32
    found = subprocess.run(["grep", "-rlF", token, str(path.parent)], capture_output=True, text=True).stdout
    assert found.split() == [str(path)]  # not in config.yaml, metrics, events, logs of launcher and driver
    assert (output / "config.yaml").is_file()
    for host in hosts:
        assert host.run(["ls", "/tmp/ray/session_latest/logs"], check=True).stdout
        assert not host.run(["grep", "-rlF", token, "/tmp/ray"]).stdout
        for what in ("cmdline", "environ"):
            # the pattern comes from the file: grep's own command line must not hold it
            assert not host.run(["bash", "-c", f"grep -laFf {path} /proc/[0-9]*/{what}"]).stdout, (host.name, what)


def test_ray_lists_the_environment_of_actors_without_the_token(hosts, run):
    cluster, _ = run
    token = Path(cluster.env["RAY_AUTH_TOKEN_PATH"])
    command = [sys.executable, "-c", LISTINGS, cluster.address, str(token)]
    listed = hosts[0].run(command, cwd=ROOT, check=True).stdout
    assert "VLLM_LOGGING_LEVEL" in listed  # it does list environments
    assert token.read_text() not in listed


def doctor(host: Host, env: dict[str, str], directory: str) -> dict[str, dict]:
    """Checks of `tatar-dist doctor --json`, by name, run in a directory of the host."""
    run = ["bash", "-c", 'cd "$0" && exec "$@"', directory, sys.executable, "-m", "tatar_dist", "doctor", "--json"]
    done = host.run(run, cwd=ROOT, env=env | {"PYTHONPATH": str(ROOT)})
    assert done.stdout, done.stderr
    return {c["name"]: c for c in json.loads(done.stdout)["checks"]}


def test_the_doctor_looks_at_every_node_and_is_no_stranger(hosts, run, tmp_path):
    cluster, _ = run
    found = doctor(hosts[0], cluster.env, str(tmp_path))
    assert found["Ray cluster"]["found"] == f"{len(hosts)} nodes, 0 GPUs"
    for name in ("Ray cluster", "versions on the nodes", "clocks of the nodes", "this directory"):
        assert found[name]["ok"], found[name]
    assert not list(tmp_path.iterdir())
    private = doctor(hosts[0], cluster.env, "/tmp/ray")["this directory"]  # each host has its own
    assert not private["ok"] and private["found"] == f"not seen from {hosts[1].ip}"
    wrong = tmp_path / "token"
    wrong.write_text("0" * 48)
    refused = doctor(hosts[0], cluster.env | {"RAY_AUTH_TOKEN_PATH": str(wrong)}, str(tmp_path))["Ray cluster"]
    assert not refused["ok"] and cluster.address in refused["found"]


def test_the_metrics_exporter_would_answer_strangers_were_it_on(tmp_path):
    """The control of what launch/ray_security.sh closes, and of the client that finds it."""
    with Hosts(1) as alone, RayCluster(alone, tmp_path, metrics=True):
        ports = list(listening(alone[0]))
        assert "http 200" in asked(alone.outsider, alone[0].ip, ports).values()
