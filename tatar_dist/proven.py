"""Where each path of the GPU side has been run: what `doctor` shows, and what a run says once at its start.

In: a config. Out: the paths it takes that nobody has run yet. Needs no package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tatar_dist.config import Config

HERE = "run here"  # on CPU, in this repository's tests
ONE_GPU = "run on one GPU"
NEVER = "written from the vLLM source, never run"


@dataclass(frozen=True)
class Path:
    """One way of doing something. `key`: the configuration that takes it."""

    name: str
    key: str
    status: str


PATHS = (
    Path("learners over gloo, engines on CPU", "cluster.gpus_per_node=0", HERE),
    Path("weight push through Ray's object store", "rollout.push=object_store", HERE),
    Path("learners over NCCL, engines on GPUs", "cluster.gpus_per_node>0", NEVER),
    Path("weight push through NCCL", "rollout.push=nccl", NEVER),
    Path("weight push through CUDA IPC", "rollout.push=cuda_ipc", NEVER),
    Path("engines that sleep on the learners' GPUs", "cluster.placement=colocated", NEVER),
    Path("tensor-parallel engines", "rollout.tensor_parallel>1", NEVER),
)


def unproven(config: Config) -> list[Path]:
    """The paths that `config` takes and that were never run."""
    c, r = config.cluster, config.rollout
    taken = {
        "cluster.gpus_per_node=0": c.gpus_per_node == 0,
        "cluster.gpus_per_node>0": c.gpus_per_node > 0,
        "rollout.push=object_store": r.push == "object_store",
        "rollout.push=nccl": r.push == "nccl",
        "rollout.push=cuda_ipc": r.push == "cuda_ipc",
        "cluster.placement=colocated": c.gpus_per_node > 0 and c.placement == "colocated",
        "rollout.tensor_parallel>1": r.tensor_parallel > 1,
    }
    return [p for p in PATHS if p.status == NEVER and taken[p.key]]


def warnings_for(config: Config) -> list[str]:
    """One line a path, for the start of a run."""
    return [
        f"{p.name} ({p.key}): {p.status}. The run checks itself before it trains; run tests/gpu on your nodes first."
        for p in unproven(config)
    ]
