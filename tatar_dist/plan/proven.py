"""Test coverage of each GPU code path, shown by `doctor` and as warnings when a run starts.

Lists the paths of a configuration that were never run. Imports only the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tatar_dist.config.schema import Config
    from tatar_dist.plan.plan import Stage

HERE = "run here"  # on CPU, in this repository's tests
ONE_GPU = "run on one GPU"
NEVER = "written from the vLLM source, never run"
LEGEND = f"A path is {HERE} (on CPU, by this repository's tests), {ONE_GPU} (tests/gpu), or {NEVER}."


@dataclass(frozen=True)
class Path:
    """One code path. `key`: the configuration that selects it, in `stages`."""

    name: str
    key: str
    status: str
    stages: tuple[Stage, ...] = ("sft", "grpo", "evaluate")


COVERAGE = (
    Path("learners over gloo, engines on CPU", "cluster.gpus_per_node=0", HERE),
    Path("weight push through Ray's object store", "rollout.push=object_store", HERE, ("grpo",)),
    Path("learners over NCCL, packed attention and engines on GPUs", "cluster.gpus_per_node>0", NEVER),
    Path("weight push through NCCL", "rollout.push=nccl", NEVER, ("grpo",)),
    Path("weight push through CUDA IPC", "rollout.push=cuda_ipc", NEVER, ("grpo",)),
    Path("engines that sleep on the learners' GPUs", "cluster.placement=colocated", NEVER, ("grpo",)),
    Path("adapters on GPUs", "model.lora_rank>0", NEVER, ("sft", "grpo")),
    Path("tensor-parallel engines", "rollout.tensor_parallel>1", NEVER, ("grpo", "evaluate")),
)


def unproven(config: Config, stage: Stage = "grpo") -> list[Path]:
    """Return the paths that `config` selects in `stage` and that were never run."""
    from tatar_dist.plan.plan import push_way  # `doctor` reads the list also where pyarrow is missing

    gpus = config.cluster.gpus_per_node > 0
    taken = {
        "cluster.gpus_per_node=0": not gpus,
        "cluster.gpus_per_node>0": gpus,
        "cluster.placement=colocated": gpus and config.cluster.placement == "colocated",
        "model.lora_rank>0": gpus and config.model.lora_rank > 0,
        "rollout.tensor_parallel>1": config.rollout.tensor_parallel > 1,
        f"rollout.push={push_way(config)}": True,
    }
    return [p for p in COVERAGE if p.status == NEVER and stage in p.stages and taken.get(p.key)]


def warnings_for(config: Config, stage: Stage) -> list[str]:
    """Return one warning per unproven path, for the start of a run."""
    checked = "The run checks itself before it trains; run" if stage == "grpo" else "Run"
    return [
        f"{p.name} ({p.key}): {p.status}. {checked} tests/gpu on your nodes first." for p in unproven(config, stage)
    ]
