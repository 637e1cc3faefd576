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
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tatar_dist.errors import UserError
from tatar_dist.types import TASKS


@dataclass(frozen=True)
class EngineCosts:
    per_call: float = 0.0
    per_step: float = 0.0
    per_token: float = 0.0
    per_prompt: float = 0.0
    serial: float = 0.0


@dataclass(frozen=True)
class LearnerCosts:
    per_update: float = 0.0
    per_micro_batch: float = 0.0
    per_row: float = 0.0
    per_image: float = 0.0
    per_token: float = 0.0
    gather: float = 0.0
    gather_across_nodes: float | None = None
    serial: float = 0.0


@dataclass(frozen=True)
class RewardCosts:
    per_batch: float = 0.0
    per_completion: float = 0.0


@dataclass(frozen=True)
class PushCosts:
    per_push: float = 0.0
    per_gb: float = 0.0
    per_gb_receiver: float = 0.0


@dataclass(frozen=True)
class OtherCosts:
    per_step: float = 0.0
    per_completion: float = 0.0


@dataclass(frozen=True)
class StepCosts:
    """Costs of all parts of a step. `lengths`: completion lengths in tokens by task, one tuple per group."""

    lengths: Mapping[str, tuple[tuple[int, ...], ...]]
    engine: EngineCosts = field(default_factory=EngineCosts)
    learner: LearnerCosts = field(default_factory=LearnerCosts)
    reward: RewardCosts = field(default_factory=RewardCosts)
    push: PushCosts = field(default_factory=PushCosts)
    other: OtherCosts = field(default_factory=OtherCosts)
    checkpoint: float = 0.0  # seconds that training stands still for one
    switch: float = 0.0  # colocated: seconds of a step in which GPUs change hands, asleep to awake and back
    model_gb: float = 0.0  # bytes of a weight push to one engine, in 1e9
    parameters: float = 0.0  # 0 = unknown: memory is not checked
    gpu_gib: float = 80.0
    cores: int | None = None  # CPU: cores that all processes share; None = GPUs
    source: str = "times given by hand"
    notes: tuple[str, ...] = ()


SECTIONS = {
    "engine": EngineCosts,
    "learner": LearnerCosts,
    "reward": RewardCosts,
    "push": PushCosts,
    "other": OtherCosts,
}
T = TypeVar("T")


def read_costs(path: Path) -> StepCosts:
    """Read costs from a YAML (or JSON) file. Raises UserError naming file and key."""
    try:
        found = yaml.safe_load(path.read_text())
    except OSError as e:
        raise UserError(f"{path}: cannot read: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    if isinstance(found, dict) and isinstance(found.get("costs"), dict):
        found = found["costs"]  # the whole output of plan --simulate --json
    return _section(StepCosts, found, str(path))


def _section(cls: type[T], found: Any, where: str) -> T:
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected keys and values, such as {', '.join(f.name for f in fields(cls))}")  # type: ignore[arg-type]
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for key in found:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(sorted(known))}")
    if cls is StepCosts and "lengths" not in found:
        raise UserError(f"{where}: lengths is missing: completion lengths in tokens by task")
    return cls(**{key: _value(key, value, f"{where}: {key}") for key, value in found.items()})


def _value(key: str, value: Any, where: str) -> Any:
    if key in SECTIONS:
        return _section(SECTIONS[key], value, where)
    if key == "lengths":
        return _lengths(value, where)
    if key in ("source", "notes"):
        return str(value) if key == "source" else tuple(map(str, value if isinstance(value, list) else [value]))
    if value is None and key in ("cores", "gather_across_nodes"):
        return None
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)  # YAML reads 8e9, without a dot and a sign, as text
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise UserError(f"{where}: must be a number, 0 or more, found {value!r}")
    if key == "serial" and value > 1:
        raise UserError(f"{where}: a share, at most 1, found {value!r}")
    if key == "cores" and (value < 1 or value != int(value)):
        raise UserError(f"{where}: a whole number of CPU cores, or null on GPUs, found {value!r}")
    return value


def _lengths(value: Any, where: str) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Validate a list of groups by task, each a list of tokens; a flat list is one group."""
    if not isinstance(value, dict) or not value or set(value) - set(TASKS):
        raise UserError(f"{where}: expected completion lengths in tokens by task ({', '.join(TASKS)})")
    found = {}
    for task, groups in value.items():
        nested = groups if isinstance(groups, list) and groups and isinstance(groups[0], list) else [groups]
        for group in nested:
            good = isinstance(group, list) and group
            if not good or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in group):
                raise UserError(f"{where}: {task}: expected a list of lengths in tokens, whole numbers from 1")
        found[task] = tuple(tuple(group) for group in nested)
    return found
