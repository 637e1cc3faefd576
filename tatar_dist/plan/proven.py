"""Test coverage of each GPU code path, shown by `doctor` and as warnings when a run starts.

Lists the paths of a configuration that were never run; of those, which `tatar-dist gpu-check` has run on this machine.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tatar_dist.run import gpus, proofs

if TYPE_CHECKING:
    from tatar_dist.config.schema import Config
    from tatar_dist.plan.plan import Stage

HERE = "run here"  # on CPU, in this repository's tests
NEVER = "never run on a GPU"
LEGEND = f"A path is {HERE} (on CPU, by this repository's tests), run on this machine (gpu-check) or {NEVER}."


@dataclass(frozen=True)
class Path:
    """One code path.

    key: the configuration that selects it, in `stages`; parts: of gpu-check, which run it.
    """

    name: str
    key: str
    status: str
    stages: tuple[Stage, ...] = ("sft", "grpo", "evaluate")
    parts: tuple[str, ...] = ()


GPUS = ("packed", "zero3", "engine")
COVERAGE = (
    Path("learners over gloo, engines on CPU", "cluster.gpus_per_node=0", HERE),
    Path("weight push through Ray's object store", "rollout.push=object_store", HERE, ("grpo",)),
    Path("learners over NCCL, packed attention and engines on GPUs", "cluster.gpus_per_node>0", NEVER, parts=GPUS),
    Path("weight push through NCCL", "rollout.push=nccl", NEVER, ("grpo",), ("push-nccl",)),
    Path("weight push through CUDA IPC", "rollout.push=cuda_ipc", NEVER, ("grpo",), ("push-cuda-ipc",)),
    Path(
        "engines that sleep on the learners' GPUs",
        "cluster.placement=colocated",
        NEVER,
        ("grpo",),
        ("sleep", "push-cuda-ipc"),
    ),
    Path("adapters on GPUs", "model.lora_rank>0", NEVER, ("sft", "grpo")),
    Path("a node's copy of the weights (hpZ)", "cluster.zero_hpz_partition_size>1", NEVER, ("sft", "grpo")),
    Path("optimizer in the node's memory", "cluster.offload_optimizer=true", NEVER, ("sft", "grpo")),
    Path("engines with fp8 weights on GPUs", "rollout.quantization=fp8", NEVER, ("grpo", "evaluate")),
    Path("tensor-parallel engines", "rollout.tensor_parallel>1", NEVER, ("grpo", "evaluate"), ("engine-tp2",)),
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
        "cluster.zero_hpz_partition_size>1": gpus and config.cluster.zero_hpz_partition_size > 1,
        "cluster.offload_optimizer=true": gpus and config.cluster.offload_optimizer,
        "rollout.quantization=fp8": gpus and config.rollout.quantization == "fp8",
        "rollout.tensor_parallel>1": config.rollout.tensor_parallel > 1,
        f"rollout.push={push_way(config)}": True,
    }
    return [p for p in COVERAGE if p.status == NEVER and stage in p.stages and taken.get(p.key)]


def run_here(path: Path) -> str | None:
    """Return "run on this machine on …" if all parts of gpu-check that run `path` passed."""
    if not path.parts:
        return None
    # ImportError: no Ray, which brings the binding of NVML; the others: a cache directory that cannot be read, no home
    with suppress(ImportError, OSError, RuntimeError):
        if not proofs.file().exists():
            return None
        if record := proofs.find(path.parts, gpus.read_here()):
            return f"run on this machine on {record['date']} ({record['card']}, driver {record['driver']})"
    return None


def warnings_for(config: Config, stage: Stage) -> list[str]:
    """Return one line per unproven path, for the start of a run: when it ran, or a warning."""
    checked = "The run checks itself before it trains; run" if stage == "grpo" else "Run"
    never = f"{NEVER}. {checked} `tatar-dist gpu-check` on your nodes first"
    return [f"{p.name} ({p.key}): {run_here(p) or never}." for p in unproven(config, stage)]
