"""Plan a stage's processes and batch from the configuration alone: `--dry-run`, `plan`.

A checked `Config` and a stage give a `Plan`: learners (ZeRO-3 ranks, one GPU each), engines (x tensor parallel),
processes and the batch split. Nothing is loaded, and torch is not imported. Runs use the same `resolve`, so a dry run
matches the run. The global batch is part of the recipe: more ranks mean fewer forwards on each, never a larger batch.
Any number of ranks up to the rows of the batch can share it.

`cluster.learners: 0` and `rollout.engines: 0` mean "as many as fit":
    sft       every GPU a learner
    grpo      about half of the GPUs learners (a power of two), the others engines
    evaluate  every GPU for engines
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from tatar_dist.assets import looked_in
from tatar_dist.config.schema import ClusterConfig, Config, DataConfig, GRPOConfig
from tatar_dist.data.manifest import existing, read_manifest
from tatar_dist.errors import UserError
from tatar_dist.models import family
from tatar_dist.prompts.answer import Prompts
from tatar_dist.run.directory import check_output
from tatar_dist.run.tracking import check_trackers
from tatar_dist.types import TASKS

Stage = Literal["sft", "grpo", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Way = Literal["object_store", "nccl", "cuda_ipc"]  # of pushing weights

RATIO_KEYS = ("objective", "ratio", "clip_low", "clip_high", "clip_delta")  # of grpo; they act on the policy's ratio


@dataclass(frozen=True)
class Split:
    """Rows of one optimiser step (completions in GRPO) and the ranks that share them.

    micro_tokens: most tokens in one forward. How many forwards a step has depends on its tokens (learner/packing.py).
    """

    rows: int
    ranks: int
    micro_tokens: int


@dataclass(frozen=True)
class Plan:
    """Everything a stage starts. GPU counts: 0 on a CPU cluster. `split`: None without learners."""

    stage: Stage
    nodes: int
    gpus_per_node: int
    learners: int
    engines: int
    tensor_parallel: int
    split: Split | None
    samples: dict[str, int] | None  # training rows by task; None when a manifest is not there yet
    steps: int | None  # optimiser steps of the whole run; None when neither samples nor max_steps are known
    warmup_steps: int
    colocated: bool = False  # engines on the learners' GPUs
    push: Way | None = None  # how GRPO's weights reach the engines
    notes: tuple[str, ...] = ()

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def gpus_used(self) -> int:
        engines = self.engines * self.tensor_parallel
        used = max(self.learners, engines) if self.colocated else self.learners + engines
        return used if self.gpus_per_node else 0

    @property
    def processes(self) -> dict[str, int]:
        """Return processes by role. A tensor-parallel engine is one process per GPU."""
        counts = {
            "controller": 1,
            "learners": self.learners,
            "engines": self.engines * self.tensor_parallel,
            "reward": int(self.stage != "sft"),
        }
        return {role: n for role, n in counts.items() if n}

    def to_dict(self) -> dict[str, Any]:
        """Return the `--json` object."""
        return asdict(self) | {"gpus": self.gpus, "gpus_used": self.gpus_used, "processes": self.processes}


def resolve(config: Config, stage: Stage) -> Plan:
    """Return the plan of one stage.

    Raises:
        UserError: more learners than rows, too few GPUs, engines that do not fit a node or, colocated, the learners.
    """
    c, g, tp = config.cluster, config.grpo, config.rollout.tensor_parallel
    gpus = c.nodes * c.gpus_per_node
    if c.gpus_per_node and tp > c.gpus_per_node:
        raise UserError(f"rollout.tensor_parallel={tp}: an engine must fit a node, which has {c.gpus_per_node} GPUs")
    rows, budget, key = g.prompts_per_step * g.group_size, g.micro_tokens, "grpo.prompts_per_step x grpo.group_size"
    if stage == "sft":
        rows, budget, key = config.sft.global_batch, config.sft.micro_tokens, "sft.global_batch"
    learners, engines = _counts(config, stage, rows)
    colocated = c.placement == "colocated" and stage == "grpo"
    if colocated and (tp > 1 or engines > learners):
        raise UserError(
            f"cluster.placement=colocated puts one engine on a learner's GPU: {engines} engines of "
            f"rollout.tensor_parallel={tp} do not fit {learners} learners"
        )
    wanted = {"learners": learners, "engines": 0 if colocated else engines * tp}
    used = sum(wanted.values())
    if gpus and used > gpus:
        parts = " + ".join(f"{n} for {role}" for role, n in wanted.items() if n)
        raise UserError(
            f"{stage} needs {used} GPUs ({parts}), there are {gpus} "
            f"(cluster.nodes={c.nodes} x cluster.gpus_per_node={c.gpus_per_node})"
        )
    if gpus and engines > (room := _engine_room(c, 0 if colocated else learners, tp)):
        beside = f" beside {learners} learners (cluster.learner_placement={c.learner_placement})" if learners else ""
        raise UserError(
            f"rollout.tensor_parallel={tp}: an engine must fit a node, and {room} of {engines} engines do{beside}: "
            "lower rollout.engines, or change one of the others"
        )
    size, common = c.zero_hpz_partition_size, math.gcd(*by_node(c, learners))
    if common % size:
        counts = ", ".join(str(n) for n in by_node(c, learners) if n)
        raise UserError(
            f"cluster.zero_hpz_partition_size={size} does not divide the learners of every node ({counts}): "
            f"use a divisor of {common}"
        )
    if learners > rows:
        raise UserError(f"{key}={rows} rows are too few for {learners} learners: use cluster.learners={rows} or fewer")
    samples = None if stage == "evaluate" else count_samples(config.data)
    return Plan(
        stage=stage,
        nodes=c.nodes,
        gpus_per_node=c.gpus_per_node,
        learners=learners,
        engines=engines,
        tensor_parallel=tp if engines else 1,
        split=Split(rows, learners, budget) if learners else None,
        samples=samples,
        steps=_steps(config, stage, samples),
        warmup_steps=0 if stage == "evaluate" else getattr(config, stage).optim.warmup_steps,
        colocated=colocated,
        push=push_way(config) if stage == "grpo" else None,
        notes=tuple(_notes(config, stage, gpus - used if gpus else 0, engines, samples)),
    )


def push_way(config: Config) -> Way:
    """Return the way of pushing weights that `rollout.push` names, or that `auto` stands for."""
    if config.rollout.push != "auto":
        return config.rollout.push
    if not config.cluster.gpus_per_node:
        return "object_store"
    return "cuda_ipc" if config.cluster.placement == "colocated" else "nccl"


def _counts(config: Config, stage: Stage, rows: int) -> tuple[int, int]:
    """Return (learners, engines), resolving 0 = auto; 0 for a role that the stage does not have."""
    c, r = config.cluster, config.rollout
    gpus, tp = c.nodes * c.gpus_per_node, r.tensor_parallel
    learners, engines, shared = c.learners, r.engines, c.placement == "colocated"
    if stage == "sft":
        return learners or min(rows, gpus or c.nodes), 0
    if stage == "evaluate":
        return 0, engines or max(1, _engine_room(c, 0, tp) if gpus else c.nodes)
    if not learners:
        # On GPUs half of them; with few prompts the engines cannot use their half, but learners stay a power of two.
        left = gpus - engines * tp if engines else min(gpus // 2, gpus - tp)  # room for one engine at least
        room = max(1, (gpus if shared else left) if gpus else c.nodes)
        learners = 1 << (min(rows, room).bit_length() - 1)
    if not engines:
        room = learners if shared else max(1, _engine_room(c, learners, tp)) if gpus else c.nodes
        # A group is sampled by one engine whole: engines beyond the prompts of a step would never have work.
        engines = min(room, config.grpo.prompts_per_step)
    return learners, engines


def by_node(c: ClusterConfig, learners: int) -> list[int]:
    """Return the learners of each node; on CPUs, which Ray may fill in any way, as if on one."""
    n, g = c.nodes, c.gpus_per_node
    if c.learner_placement == "spread":
        return [len(range(i, learners, n)) for i in range(n)]
    return [min(g, max(0, learners - i * g)) for i in range(n)] if g else [learners]


def _engine_room(c: ClusterConfig, learners: int, tp: int) -> int:
    """Count the engines that fit beside learners, as each needs the GPUs of one node."""
    return sum((c.gpus_per_node - k) // tp for k in by_node(c, learners))


def _notes(config: Config, stage: Stage, idle: int, engines: int, samples: dict[str, int] | None) -> Iterable[str]:
    if idle:
        cure = {
            "sft": "raise sft.global_batch to use them",
            "grpo": "raise grpo.prompts_per_step, or set cluster.learners and rollout.engines, to use them",
            "evaluate": "raise rollout.engines to use them",
        }[stage]
        yield f"{idle} of {config.cluster.nodes * config.cluster.gpus_per_node} GPUs stay idle: {cure}"
    if stage == "grpo" and engines > config.grpo.prompts_per_step:
        yield f"rollout.engines={engines}, but a step has only {config.grpo.prompts_per_step} prompts: some never work"
    if stage == "grpo" and config.grpo.inner_iterations == 1:
        default, g = GRPOConfig(), config.grpo
        idle_keys = [k for k in RATIO_KEYS if getattr(g, k) != getattr(default, k)]
        if idle_keys:
            words = ", ".join(f"grpo.{k}={getattr(g, k)}" for k in idle_keys)
            yield f"no effect with grpo.inner_iterations=1, where the policy's ratio is always 1: {words}"
    share = config.data.iqa_fraction
    for task, wanted in (("iqa", share), ("iaa", 1 - share)):
        if samples and wanted and not samples[task]:
            yield f"no {task} samples, yet data.iqa_fraction={share}: the run would stop"


def count_samples(data: DataConfig) -> dict[str, int] | None:
    """Count the training rows of manifests by task; None: no manifests, or an unreadable one."""
    counts: dict[str, int] = dict.fromkeys(TASKS, 0)
    try:
        for name in data.train:
            for pool in read_manifest(Path(data.root) / name).of_split("train").pools:
                counts[pool.task] += pool.rows
    except UserError:
        return None  # a plan is an estimate; the run itself reports a broken manifest with its reason
    return counts if data.train else None


def _steps(config: Config, stage: Stage, samples: dict[str, int] | None) -> int | None:
    """Count steps as runs do: an epoch ends once the larger task, at its batch share, is seen."""
    if stage == "evaluate":
        return None
    s = config.sft if stage == "sft" else config.grpo
    if s.max_steps or samples is None:
        return s.max_steps
    per_step = config.sft.global_batch if stage == "sft" else config.grpo.prompts_per_step
    n_iqa = round(per_step * config.data.iqa_fraction)
    shares = {"iqa": n_iqa, "iaa": per_step - n_iqa}
    epoch = max(math.ceil(samples[task] / share) for task, share in shares.items() if share)
    return max(1, round(s.epochs * epoch))


def ray_commands(plan: Plan, stage_command: str) -> list[str]:
    """Return the shell lines that start Ray on `plan.nodes` machines, and then the stage.

    For one node only the stage. Under Slurm, `make STAGE NODES=n` does all of it.
    """
    if plan.nodes == 1:
        return [stage_command]
    return [
        "export RAY_AUTH_TOKEN_PATH=SHARED_FILE; source launch/ray_security.sh  # on every node: the token",
        "ray start --head --port=6379                        # on the first node",
        f"ray start --address=FIRST_NODE:6379 --block         # on each of the other {plan.nodes - 1} nodes",
        f"{stage_command} cluster.address=FIRST_NODE:6379",
    ]


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def as_table(plan: Plan) -> Any:
    """Return the plan as a rich table."""
    from rich.table import Table

    table = Table(title=f"{plan.stage}: what would run", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    hardware, per_learner, per_engine = f"{plan.nodes}, CPU only", "", ""
    if plan.gpus_per_node:
        hardware = f"{plan.nodes} x {plan.gpus_per_node} GPUs = {plan.gpus}, {plan.gpus_used} used"
        per_learner, per_engine = ", one GPU each", f", {_counted(plan.tensor_parallel, 'GPU')} each"
    if plan.colocated:
        per_engine = ", each with a learner" + (" on its GPU, asleep while that works" if plan.gpus_per_node else "")
    table.add_row("nodes", hardware)
    table.add_row("processes", ", ".join(_counted(n, role.removesuffix("s")) for role, n in plan.processes.items()))
    if plan.learners:
        table.add_row("learners", _counted(plan.learners, "ZeRO-3 rank") + per_learner)
    if plan.engines:
        table.add_row("engines", _counted(plan.engines, "vLLM engine") + per_engine)
    if plan.push:
        table.add_row("weights", f"pushed by {plan.push}")
    if s := plan.split:
        rows = f"{s.rows} {'completions' if plan.stage == 'grpo' else 'rows'} over {_counted(s.ranks, 'rank')}"
        samples = plan.samples and ", ".join(f"{n} {task}" for task, n in plan.samples.items())
        warmup = f", {plan.warmup_steps} of them warm-up" if plan.warmup_steps else ""
        if plan.steps is not None and plan.warmup_steps >= plan.steps:
            warmup = f", all in the warm-up of {plan.warmup_steps}: the learning rate stays below lr"
        table.add_row("batch", f"{rows}, at most {s.micro_tokens} tokens in one forward")
        table.add_row("samples", samples or "unknown: manifests not there yet")
        table.add_row("steps", f"{plan.steps}{warmup}" if plan.steps is not None else "depends on the manifests")
    for note in plan.notes:
        table.add_row("note", note)
    return table


def check_inputs(config: Config, stage: str) -> None:
    """Check the output path, trackers, manifests, prompts and model directory of `stage`.

    Raises:
        UserError: a path that does not exist, with the directory it was looked up in; a model directory without a model
            of `model.family`; a tracker that is not installed; a relative output in a Ray job.
    """
    check_output(config)
    check_trackers(config)
    root = None if config.data.image_root is None else Path(config.data.image_root)
    splits = ["test"] if stage == "evaluate" else ["train"]
    if stage == "sft" or (stage == "grpo" and config.grpo.eval_every):
        splits.append("validation")
    for split in splits:
        for name in getattr(config.data, split):
            manifest = existing(Path(config.data.root) / name)
            if root is not None and not root.is_dir() and "image_bytes" not in _columns(manifest):
                raise UserError(f"data.image_root={root}: no such directory{looked_in(root)}")
    most, r = config.data.max_prompt_tokens + config.rollout.max_new_tokens, config.rollout
    if stage != "sft" and most > r.max_model_len:
        raise UserError(
            f"rollout.max_model_len={r.max_model_len} is less than data.max_prompt_tokens="
            f"{config.data.max_prompt_tokens} and rollout.max_new_tokens={r.max_new_tokens} together: set it to {most}"
        )
    Prompts.load(config.data.prompts)
    family(config.model.family).check_directory(config.model.path, trained=stage != "evaluate")


def _columns(manifest: Path) -> list[str]:
    """Return a manifest's columns; ["image_bytes"] if unreadable (its reader will report why)."""
    try:
        return pq.read_schema(manifest).names
    except (pa.ArrowException, OSError):
        return ["image_bytes"]
