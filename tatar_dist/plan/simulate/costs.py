"""Cost model of a GRPO step: seconds per unit of work of each part.

`StepCosts` are read from a YAML file (`plan --times`), fitted by measured.py or estimated by estimate.py. The JSON of
`plan --simulate --json` holds them in the same form under "costs"; as JSON is YAML, it can be saved and edited.

    engine      a call = per_call + per_step x decode steps + per_token x tokens + per_prompt x prompts
    learner     a step = per_update + micro-batches x (per_micro_batch + gather x (ranks - 1) / ranks)
                         + per_row x rows + per_image x images + per_token x completion tokens, of one rank
    reward      a batch = per_batch + per_completion x completions
    push        per_push + GB x (1 + 1 / buckets) x per_gb + GB x (receivers - 1) x per_gb_receiver
                receivers: nodes that have engines; on CPUs, engines
    other       rest of a step: per_step + per_completion x completions

`gather_across_nodes` replaces `gather` where the learners span nodes. On CPUs (`cores`) the costs are those of a
process with one thread; with t threads they are multiplied by `serial + (1 - serial) / t` (Amdahl).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le, MinLen
from pydantic import AfterValidator, BeforeValidator

from tatar_dist.config.validate import STRICT_KEYS, AtLeastOne, Finite, read_yaml, validated
from tatar_dist.types import TASKS

Cost = Annotated[Finite, Ge(0)]
Share = Annotated[Finite, Ge(0), Le(1)]
Group = Annotated[tuple[AtLeastOne, ...], MinLen(1)]


def _nested(groups: Any) -> Any:
    """Take a flat list of lengths as one group."""
    flat = isinstance(groups, list) and not (groups and isinstance(groups[0], list))
    return [groups] if flat else groups


def _task(name: str) -> str:
    if name not in TASKS:
        raise ValueError(f"must be one of {', '.join(TASKS)}")
    return name


Lengths = Annotated[
    Mapping[Annotated[str, AfterValidator(_task)], Annotated[tuple[Group, ...], BeforeValidator(_nested)]], MinLen(1)
]


@dataclass(frozen=True)
class EngineCosts:
    __pydantic_config__ = STRICT_KEYS

    per_call: Cost = 0.0
    per_step: Cost = 0.0
    per_token: Cost = 0.0
    per_prompt: Cost = 0.0
    serial: Share = 0.0


@dataclass(frozen=True)
class LearnerCosts:
    __pydantic_config__ = STRICT_KEYS

    per_update: Cost = 0.0
    per_micro_batch: Cost = 0.0
    per_row: Cost = 0.0
    per_image: Cost = 0.0
    per_token: Cost = 0.0
    gather: Cost = 0.0
    gather_across_nodes: Cost | None = None
    serial: Share = 0.0


@dataclass(frozen=True)
class RewardCosts:
    __pydantic_config__ = STRICT_KEYS

    per_batch: Cost = 0.0
    per_completion: Cost = 0.0


@dataclass(frozen=True)
class PushCosts:
    __pydantic_config__ = STRICT_KEYS

    per_push: Cost = 0.0
    per_gb: Cost = 0.0
    per_gb_receiver: Cost = 0.0


@dataclass(frozen=True)
class OtherCosts:
    __pydantic_config__ = STRICT_KEYS

    per_step: Cost = 0.0
    per_completion: Cost = 0.0


@dataclass(frozen=True)
class StepCosts:
    """Costs of all parts of a step. `lengths`: completion lengths in tokens by task, one tuple per group."""

    __pydantic_config__ = STRICT_KEYS

    lengths: Lengths
    engine: EngineCosts = field(default_factory=EngineCosts)
    learner: LearnerCosts = field(default_factory=LearnerCosts)
    reward: RewardCosts = field(default_factory=RewardCosts)
    push: PushCosts = field(default_factory=PushCosts)
    other: OtherCosts = field(default_factory=OtherCosts)
    checkpoint: Cost = 0.0  # seconds that training stands still for one
    switch: Cost = 0.0  # colocated: seconds of a step in which GPUs change hands, asleep to awake and back
    model_gb: Cost = 0.0  # bytes of a weight push to one engine, in 1e9
    parameters: Cost = 0.0  # 0 = unknown: memory is not checked
    gpu_gib: Cost = 80.0
    cores: AtLeastOne | None = None  # CPU: cores that all processes share; None = GPUs
    source: str = "times given by hand"
    notes: tuple[str, ...] = ()


def read_costs(path: Path) -> StepCosts:
    """Read costs from a YAML (or JSON) file. Raises UserError naming file and key."""
    tree = read_yaml(path, "file of costs")
    if isinstance(tree.get("costs"), dict):
        tree = tree["costs"]  # the whole output of plan --simulate --json
    return validated(StepCosts, tree, str(path))
