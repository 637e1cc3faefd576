"""Cost model of a GRPO step: seconds per unit of work of each part.

`StepCosts` are read from a YAML file (`plan --times`), fitted by measured.py or made by estimate.py. The JSON of
`plan --simulate --json` holds them in the same form under "costs"; as JSON is YAML, it can be saved and edited.

    engine      a call = per_call + per_step x decode steps + per_token x tokens + per_prompt x prompts
    learner     a step = per_update + micro-batches x (per_micro_batch + gather x (ranks - 1) / ranks)
                         + per_row x rows + per_image x images + per_token x completion tokens, of one rank,
                         + per_shard / ranks - overlap x the smaller of the gathers and the work on rows
    reward      a batch = per_batch + per_completion x completions
    push        per_push + GB x (1 + 1 / buckets) x per_gb + GB x (receivers - 1) x per_gb_receiver
                receivers: nodes that have engines; on CPUs, engines. push_colocated: where engines share learners' GPUs
    other       rest of a step: per_step + per_completion x completions

`gather_across_nodes` replaces `gather` where the learners span nodes, `per_gb_across_nodes` `per_gb` where the step's
GPUs do. On CPUs (`cores`) the costs are those of a process with one thread; with t threads they are multiplied by
`serial + (1 - serial) / t` (Amdahl).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le, MinLen

from tatar_dist.config.schema import Config
from tatar_dist.config.validate import STRICT_KEYS, AtLeastOne, Finite, read_yaml, validated
from tatar_dist.models.costs import TOKEN_PIXELS
from tatar_dist.plan.simulate import CardName
from tatar_dist.types import Task

TEXT_TOKENS, PIXELS = 200, 1024 * 768  # a prompt's text; an image of KonIQ-10k

Cost = Annotated[Finite, Ge(0)]
Share = Annotated[Finite, Ge(0), Le(1)]
Group = Annotated[tuple[AtLeastOne, ...], MinLen(1)]
Lengths = Annotated[Mapping[Task, Annotated[tuple[Group, ...], MinLen(1)]], MinLen(1)]


@dataclass(frozen=True)
class EngineCosts:
    per_call: Cost = 0.0
    per_step: Cost = 0.0
    per_token: Cost = 0.0
    per_prompt: Cost = 0.0
    serial: Share = 0.0


@dataclass(frozen=True)
class LearnerCosts:
    per_update: Cost = 0.0
    per_micro_batch: Cost = 0.0
    per_row: Cost = 0.0
    per_image: Cost = 0.0
    per_token: Cost = 0.0
    gather: Cost = 0.0
    gather_across_nodes: Cost | None = None
    serial: Share = 0.0
    per_shard: Cost = 0.0
    overlap: Share = 0.0


@dataclass(frozen=True)
class RewardCosts:
    per_batch: Cost = 0.0
    per_completion: Cost = 0.0


@dataclass(frozen=True)
class PushCosts:
    per_push: Cost = 0.0
    per_gb: Cost = 0.0
    per_gb_receiver: Cost = 0.0
    per_gb_across_nodes: Cost | None = None


@dataclass(frozen=True)
class OtherCosts:
    per_step: Cost = 0.0
    per_completion: Cost = 0.0


@dataclass(frozen=True)
class StepCosts:
    """Costs of all parts of a step. `lengths`: completion tokens by task, one tuple per group."""

    __pydantic_config__ = STRICT_KEYS  # of the parts, too

    lengths: Lengths
    engine: EngineCosts = EngineCosts()
    learner: LearnerCosts = LearnerCosts()
    reward: RewardCosts = RewardCosts()
    push: PushCosts = PushCosts()
    push_colocated: PushCosts | None = None  # None: the same
    other: OtherCosts = OtherCosts()
    checkpoint: Cost = 0.0  # seconds that training stands still for one
    switch: Cost = 0.0  # colocated: seconds of a step in which GPUs change hands, asleep to awake and back
    model_gb: Cost = 0.0  # bytes of a weight push to one engine, in 1e9
    parameters: Cost = 0.0  # 0 = unknown: memory is not checked
    gpu_gib: Cost = 80.0
    card: CardName | None = None  # of an estimate; with nics, network cards of a node
    nics: AtLeastOne | None = None
    cores: AtLeastOne | None = None  # CPU: cores that all processes share; None = GPUs
    source: str = "times given by hand"
    notes: tuple[str, ...] = ()


def read_costs(path: Path) -> StepCosts:
    """Read costs from a YAML (or JSON) file. Raises UserError naming file and key."""
    tree = read_yaml(path, "file of costs")
    if isinstance(tree.get("costs"), dict):
        tree = tree["costs"]  # the whole output of plan --simulate --json
    return validated(StepCosts, tree, str(path))


def prompt_tokens(config: Config) -> int:
    """Return the tokens of a prompt with an image of KonIQ-10k's size, within configured limits."""
    m = config.model
    return TEXT_TOKENS + min(m.max_pixels, max(m.min_pixels, PIXELS)) // TOKEN_PIXELS
