"""GPUs that no run can use are one line and exit status 2, before a model is loaded: real Ray, a pretended driver."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import manifest_rows, model_words, png
from gpu_nodes import Nodes, gpu_nodes

from tatar_dist.data.writing import write_manifest

HOST = socket.gethostname()
A100 = {"name": "NVIDIA A100-SXM4-80GB", "capability": (8, 0)}
V100 = {"name": "Tesla V100-SXM2-32GB", "capability": (7, 0), "gib": 32}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with gpu_nodes(tmp_path_factory.mktemp("nodes")) as nodes:
        yield nodes


@pytest.fixture
def words(tmp_path: Path, model_untied: str, manifests: list[str]) -> dict[str, list[str]]:
    """What each command is called with."""
    rows = [{**row, "split": "test"} for row in manifest_rows("iqa", 2)]
    write_manifest(tmp_path / "test.parquet", rows)
    (tmp_path / "picture.png").write_bytes(png(1))
    model = [f"output={tmp_path / 'run'}", *model_words(model_untied)]
    data = [f"data.train=[{','.join(manifests)}]", f"data.test=[{tmp_path / 'test.parquet'}]"]
    gpus = ["cluster.nodes=2", "cluster.gpus_per_node=3", "cluster.learners=2", "rollout.engines=2"]
    stage = ["--config", "configs/demo.yaml", *model, *data, *gpus, "sft.max_steps=1", "sft.global_batch=4"]
    return {
        "sft": ["sft", *stage],
        "grpo": ["grpo", *stage, "rollout.push=nccl"],
        "evaluate": ["evaluate", *stage],
        "rationale": [
            *("rationale", "build", manifests[0], "--output", str(tmp_path / "rationales.parquet")),
            *(*model_words(model_untied), *gpus, "rationale.teacher.local=true"),
        ],
        "score": ["score", str(tmp_path / "picture.png"), "--model", model_untied],
        "serve": ["serve", "--model", model_untied, "--port", "0"],
    }


def test_ray_counts_the_pretended_gpus_and_every_node_tells_of_its_own(nodes: Nodes):
    nodes.give(0)
    nodes.give(1, **A100)
    drivers, resources, _ = nodes.ask("read")
    h100, a100 = ["NVIDIA H100 80GB HBM3", 80, [9, 0]], ["NVIDIA A100-SXM4-80GB", 80, [8, 0]]
    assert sorted(drivers) == [["580.65.06", [a100] * 2], ["580.65.06", [h100] * 4]]
    assert json.loads(resources) == {"GPU": 6.0, "accelerator_type:H100": 2.0}


@pytest.mark.parametrize(
    ("command", "node", "gpus", "line"),
    [
        ("sft", 1, V100, "GPU 0,1 (Tesla V100-SXM2-32GB) has compute capability 7.0, but 8.0 is needed: set CUDA"),
        ("grpo", 1, A100, "GPU 0,1 (NVIDIA A100-SXM4-80GB) is of another kind than the job's others (NVIDIA H100"),
        ("evaluate", 0, {"driver": "535.104.05"}, "driver 535.104.05 offers CUDA 12.2, but 13.0 is needed: install"),
        ("rationale", 0, {"others": {2: {"mig": True}}}, "GPU 2 (NVIDIA H100 80GB HBM3) is divided by MIG, but a"),
        ("score", 0, {"error": 18}, "the NVIDIA driver does not answer ("),
        ("serve", 0, V100, "GPU 0 (Tesla V100-SXM2-32GB) has compute capability 7.0"),
        ("sft", 1, {"gib": 1 / 64}, "the smallest GPU has 0.0 GiB, and weights, gradients, optimizer of each learner"),
    ],
)
def test_gpus_that_cannot_be_used_are_one_line_with_host_and_gpu(nodes: Nodes, words, command, node, gpus, line):
    nodes.give(1 - node)
    nodes.give(node, **gpus)
    status, _, errors = nodes.ask(*words[command])
    told = [error for error in errors if "never run" not in error]  # warnings of paths
    assert (status, len(told)) == (2, 1), errors
    assert told[0].startswith("tatar-dist: ") and line in told[0]
    assert f"{HOST}: " in told[0] or "smallest" in told[0]


def test_the_doctor_names_the_node_whose_gpus_differ(nodes: Nodes):
    nodes.give(0)
    nodes.give(1, **A100, driver="550.54.15")
    found = {check["name"]: check for check in nodes.ask("doctor")[0]}
    assert found["Ray cluster"]["found"] == "2 nodes, 6 GPUs"
    wrong = {name for name, check in found.items() if check["required"] and not check["ok"]}
    assert wrong == {"GPU driver of the nodes", "kinds of GPU of the nodes"}
    assert found["kinds of GPU of the nodes"]["found"].startswith(f"{HOST}: GPU 0,1 (NVIDIA A100-SXM4-80GB) is of")
