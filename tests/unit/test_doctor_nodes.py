"""What the doctor makes of the nodes' answers."""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tatar_dist.commands import doctor
from tatar_dist.commands.doctor_nodes import Node, checks, examine

HERE = {"python": "3.11.9", "vllm": "0.11.0"}
GOOD = Node("10.0.0.1", 8, HERE, 0.002, 0.001, True)


def found(*nodes: Node, silent: dict[str, str] | None = None):
    silent = silent or {}
    return {c.name: c for c in checks(nodes, silent, HERE)}


def test_nodes_alike_are_fine():
    said = found(GOOD, replace(GOOD, address="10.0.0.2", ahead=-0.01))
    assert all(c.ok for c in said.values())
    assert said["Ray cluster"].found == "2 nodes, 16 GPUs"
    assert said["clocks of the nodes"].found == "at most 0.010 s apart"


def test_what_is_wrong_is_named_with_its_node():
    late = replace(GOOD, address="10.0.0.2", ahead=-12.4)
    old = replace(GOOD, address="10.0.0.3", versions={"python": "3.11.9", "vllm": "0.10.0"})
    bare = replace(GOOD, address="10.0.0.4", versions={"python": "3.11.9"}, sees_file=False)
    said = found(GOOD, late, old, bare, silent={"10.0.0.5": "not within 120 s"})
    assert not any(c.ok for c in said.values())
    assert said["clocks of the nodes"].found == "10.0.0.2 -12.4 s"
    assert said["versions on the nodes"].found == "10.0.0.3: vllm 0.10.0 for 0.11.0; 10.0.0.4: vllm missing for 0.11.0"
    assert said["versions on the nodes"].required
    assert said["this directory"].found == "not seen from 10.0.0.4"
    assert said["Ray cluster"].found.endswith("no answer from 10.0.0.5: not within 120 s")


def test_a_slow_answer_is_no_wrong_clock():
    assert found(replace(GOOD, ahead=3.0, doubt=2.5))["clocks of the nodes"].ok
    assert not found(replace(GOOD, ahead=3.0, doubt=1.5))["clocks of the nodes"].ok


def test_nodes_that_say_nothing_are_not_called_fine_and_a_directory_without_room_for_a_file_is_said():
    assert set(found(silent={"10.0.0.5": "gone"})) == {"Ray cluster"}
    said = found(replace(GOOD, sees_file=None))["this directory"]
    assert not said.ok and said.found == "not writable"


@pytest.mark.parametrize(("state", "ok"), [(-1, True), (0, True), (5, False)])
def test_a_clock_is_wrong_only_where_the_kernel_says_so(state, ok, monkeypatch):
    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda _: SimpleNamespace(adjtimex=lambda _: state))
    (check,) = doctor._clock()
    assert check.ok is ok


def test_a_machine_without_shared_memory_is_a_note(monkeypatch):
    monkeypatch.setattr(doctor.Path, "is_dir", lambda _: False)
    memory, disk, shared = doctor._machine()
    assert disk.found.endswith("GiB free") and (shared.ok, shared.required) == (False, False)


def test_the_address_of_a_job_server_is_said():
    (check,) = examine("http://127.0.0.1:8265")
    assert check.ok and "submit the doctor" in check.found


def test_a_cluster_that_is_not_there_is_said_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        (check,) = examine(f"127.0.0.1:{taken.getsockname()[1]}")
    assert not check.ok and "refused" in check.found and "RAY_ADDRESS" in check.hint


def test_the_directory_of_rays_sockets_is_shown(monkeypatch, tmp_path):
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    row = list(doctor._cluster())[-1]
    assert row.ok and row.found == f"/tmp, as TMPDIR={long} is too long for the names of sockets"
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert doctor._temporary().found == "/tmp"
    monkeypatch.setattr(os, "access", lambda *_: False)
    wrong = doctor._temporary()
    assert not wrong.ok and wrong.required and wrong.found.startswith("TMPDIR=/tmp: ")
    assert wrong.hint.startswith("set TMPDIR to a directory of at most ")
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    assert doctor._temporary().found == f"{long} (RAY_TMPDIR)"
