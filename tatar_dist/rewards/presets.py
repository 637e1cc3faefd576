"""Reward presets: YAML files of terms, and for each its weight, its tasks and its constants.

`load_preset("tatar")` reads tatar_dist/rewards/presets/tatar.yaml; a path to a YAML file of the same form works too.
A term of your own is a function named by its dotted path (rewards/custom.py):

    terms:
      brief: {function: my_rewards.brief, weight: 0.5, tasks: [iqa], words: 40}

`weights` and `params` (config keys reward.weights, reward.params) override single values; params are named
`{term}_{constant}`, for example thurstone_floor or length_margin; `rater_sd` is set for all terms that have it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tatar_dist.config.validate import STRICT_KEYS, near, read_yaml, validated
from tatar_dist.errors import UserError
from tatar_dist.rewards.custom import CustomTerm, custom_term
from tatar_dist.rewards.pairwise import PairwiseParams
from tatar_dist.rewards.terms import BinaryParams, CostParams, GaussianParams, LengthParams, Term
from tatar_dist.rewards.thurstone import ThurstoneParams
from tatar_dist.types import TASKS, Task

TERMS: dict[str, type[Term]] = {
    "gaussian": GaussianParams,
    "pairwise": PairwiseParams,
    "thurstone": ThurstoneParams,
    "binary": BinaryParams,
    "format": Term,
    "length": LengthParams,
    "cost": CostParams,
}
RANKING = ("pairwise", "thurstone")
SHARED = "rater_sd"
# columns of rollouts and parts of metric names, which a term of the user's may not hide
RESERVED = (
    *("step", "group_id", "index", "sample_id", "dataset", "task", "target", "score_std", "completion", "tokens"),
    *("finish_reason", "logprob_sum", "weight_version", "parsed", "reward", "advantage", "trained", "total"),
    *("agreement", "share", "share_parsed", "frac_zero_std", "replaced_groups", "dropped_groups", "unrankable_groups"),
)
PRESET_DIR = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Preset:
    """A reward: each term's weight, tasks and constants. `custom`: the user's terms."""

    __pydantic_config__ = STRICT_KEYS

    name: str
    gaussian: GaussianParams
    pairwise: PairwiseParams
    thurstone: ThurstoneParams
    binary: BinaryParams
    format: Term
    length: LengthParams
    cost: CostParams
    custom: dict[str, CustomTerm] = field(default_factory=dict)

    @property
    def terms(self) -> dict[str, Term]:
        """Return all terms by name: the built-in ones, then the user's."""
        return {term: getattr(self, term) for term in TERMS} | self.custom

    @property
    def weights(self) -> dict[str, float]:
        """Return the terms that the reward weighs, with their weights."""
        return {name: term.weight for name, term in self.terms.items() if term.weight != 0}

    @property
    def ranked_tasks(self) -> tuple[Task, ...]:
        """Return the tasks whose reward compares images: a batch must hold several of one data set."""
        ranking = [self.terms[name] for name in RANKING if name in self.weights]
        return tuple(task for task in TASKS if any(task in term.tasks for term in ranking))


@dataclass(frozen=True)
class _PresetFile:
    __pydantic_config__ = STRICT_KEYS

    terms: dict[str, dict[str, Any] | None]
    name: str | None = None


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package."""
    return sorted(p.stem for p in PRESET_DIR.glob("*.yaml"))


def load_preset(
    name_or_path: str, weights: Mapping[str, float] | None = None, params: Mapping[str, Any] | None = None
) -> Preset:
    """Read a preset by name or YAML path, apply overrides, check it.

    Raises:
        UserError: no such preset or file, broken YAML, an unknown term or constant, a value of the wrong type, a rule
            of a term violated (for example thurstone floor under tau).
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if name_or_path not in preset_names():
            known = near(name_or_path, preset_names())
            raise UserError(f"unknown reward preset {name_or_path!r}{known}, or give a YAML file")
        path = PRESET_DIR / f"{name_or_path}.yaml"
    where, weights, params = f"reward preset {name_or_path}", weights or {}, params or {}
    file = validated(_PresetFile, read_yaml(path, "reward preset"), where)
    # A term that the file leaves out is computed for audits only, a ranking for IAA alone.
    bodies: dict[str, dict[str, Any]] = {t: {"tasks": ["iaa"]} if t in RANKING else {} for t in TERMS}
    bodies |= {term: dict(body or {}) for term, body in file.terms.items()}
    users = [term for term, body in bodies.items() if "function" in body]
    _only(bodies, (*TERMS, *users), f"{where}: unknown term")
    _only(weights, bodies, f"{where}: reward.weights: unknown term")
    for term, weight in weights.items():
        bodies[term]["weight"] = weight
    keys = {t: bodies[t] if t in users else [f.name for f in fields(TERMS[t])] for t in bodies}
    constants = {f"{t}_{k}": (t, k) for t in keys for k in keys[t] if k not in ("weight", "tasks", "function")}
    _only(params, (*constants, SHARED), f"{where}: reward.params: unknown constant")
    for name, value in params.items():
        both = [place for place in constants.values() if place[1] == SHARED]
        for term, key in both if name == SHARED else [constants[name]]:
            bodies[term][key] = value
    custom = {}
    for term in users:
        if term in TERMS or term in RESERVED:
            raise UserError(f"{where}: terms.{term}: the name is taken, call a term of your own something else")
        if not term.isidentifier():  # it becomes a column and a part of metric names
            raise UserError(f"{where}: terms.{term}: may hold only letters, digits and _, and not start with a digit")
        custom[term] = custom_term(bodies.pop(term), f"{where}: terms.{term}")
    preset = validated(Preset, {**bodies, "name": file.name or path.stem, "custom": custom}, where)
    if preset.thurstone.floor is None and preset.name != "released":
        raise UserError(f"{where}: thurstone floor is null: only the preset named 'released' runs without one")
    if "thurstone_tau" in params and preset.thurstone.scale == "shared":
        raise UserError(
            f"{where}: thurstone_tau has no effect where thurstone's scale is shared: set thurstone_floor, "
            "the least scale of a pair, or thurstone_scale=tau"
        )
    if not preset.weights:
        raise UserError(f"{where}: every weight is 0")
    for term in TERMS:
        if (weight := preset.weights.get(term, 0)) < 0:
            raise UserError(
                f"{where}: weight {weight:g} of {term}: must be at least 0, or unreadable answers earn more"
            )
    return preset


def _only(given: Mapping[str, Any], known: Collection[str], problem: str) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"{problem} {key!r}{near(key, known)}")
