"""What the doctor makes of the nodes' answers."""

from __future__ import annotations

from dataclasses import replace

from tatar_dist.doctor_nodes import Node, checks, examine

HERE = {"python": "3.11.9", "vllm": "0.11.0"}
GOOD = Node("10.0.0.1", 8, HERE, 0.002, 0.001, True)


def found(*nodes: Node, silent: tuple[str, ...] = ()):
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
    said = found(GOOD, late, old, bare, silent=("10.0.0.5",))
    assert not any(c.ok for c in said.values())
    assert said["clocks of the nodes"].found == "10.0.0.2 -12.4 s"
    assert said["versions on the nodes"].found == "10.0.0.3: vllm 0.10.0 for 0.11.0; 10.0.0.4: vllm missing for 0.11.0"
    assert said["versions on the nodes"].required
    assert said["this directory"].found == "not seen from 10.0.0.4"
    assert said["Ray cluster"].found.endswith("no answer from 10.0.0.5")


def test_a_slow_answer_is_no_wrong_clock():
    assert found(replace(GOOD, ahead=3.0, doubt=2.5))["clocks of the nodes"].ok
    assert not found(replace(GOOD, ahead=3.0, doubt=1.5))["clocks of the nodes"].ok


def test_the_address_of_a_job_server_is_said():
    (check,) = examine("http://127.0.0.1:8265")
    assert check.ok and "submit the doctor" in check.found
