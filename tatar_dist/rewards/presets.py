"""Reward presets: which terms run on which task, with which weight and constants, as YAML files one can read and copy.

`load_preset("tatar")` reads tatar_dist/rewards/presets/tatar.yaml; a path to a YAML file of the same form works too.
A term of your own is a function named by its dotted path (rewards/custom.py):

    terms:
      brief: {function: my_rewards.brief, weight: 0.5, tasks: [iqa], words: 40}

`weights` and `params` (config keys reward.weights, reward.params) override single values; params are named
`{term}_{constant}`, for example thurstone_floor or length_margin. Unknown names fail with the nearest one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tatar_dist.assets import looked_in
from tatar_dist.config.validate import near, read_yaml
from tatar_dist.errors import UserError
from tatar_dist.rewards.custom import CustomTerm, custom_term
from tatar_dist.rewards.gaussian import GaussianParams
from tatar_dist.rewards.pairwise import PairwiseParams
from tatar_dist.rewards.terms import BinaryParams, LengthParams
from tatar_dist.rewards.thurstone import ThurstoneParams
from tatar_dist.types import TASKS, Task

TERMS = ("gaussian", "pairwise", "thurstone", "binary", "format", "length")
SECTIONS: dict[str, type] = {
    "gaussian": GaussianParams,
    "pairwise": PairwiseParams,
    "thurstone": ThurstoneParams,
    "binary": BinaryParams,
    "length": LengthParams,
}
# columns of rollouts and parts of metric names, which a term of the user's may not hide
RESERVED = (
    *("step", "group_id", "index", "sample_id", "dataset", "task", "target", "completion", "tokens", "finish_reason"),
    *("logprob_sum", "weight_version", "parsed", "reward", "advantage", "trained", "total", "agreement"),
    *("frac_zero_std", "replaced_groups", "dropped_groups", "unrankable_groups"),
)
PRESET_DIR = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Preset:
    """A reward: for each term its weight, the tasks it applies to, and its constants."""

    name: str
    weights: dict[str, float]
    tasks: dict[str, tuple[str, ...]]
    gaussian: GaussianParams = field(default_factory=GaussianParams)
    pairwise: PairwiseParams = field(default_factory=PairwiseParams)
    thurstone: ThurstoneParams = field(default_factory=ThurstoneParams)
    binary: BinaryParams = field(default_factory=BinaryParams)
    length: LengthParams = field(default_factory=LengthParams)
    custom: dict[str, CustomTerm] = field(default_factory=dict)

    @property
    def terms(self) -> tuple[str, ...]:
        """Every term this preset knows: the built-in ones, then the user's."""
        return (*TERMS, *self.custom)

    def weight(self, term: str) -> float:
        return self.weights.get(term, 0.0)

    @property
    def active(self) -> tuple[str, ...]:
        """The terms that the reward weighs."""
        return tuple(t for t in self.terms if self.weight(t) != 0)

    @property
    def ranked_tasks(self) -> tuple[Task, ...]:
        """The tasks whose reward compares images, so that a batch must hold several of one data set."""
        ranking = [t for t in ("pairwise", "thurstone") if self.weight(t) != 0]
        return tuple(task for task in TASKS if any(task in self.tasks[term] for term in ranking))

    def check(self) -> None:
        """Raises UserError for constants that cannot work."""
        for section in (self.gaussian, self.pairwise, self.thurstone, self.binary, self.length):
            section.check()
        if self.thurstone.floor is None and self.name != "released":
            raise UserError("thurstone floor is null: only the preset named 'released' runs without one")
        if not self.active:
            raise UserError(f"preset {self.name!r}: every weight is 0")


def preset_names() -> list[str]:
    """The presets that come with the package."""
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
            raise UserError(
                f"unknown reward preset {name_or_path!r}{near(name_or_path, preset_names())}, or give a YAML file"
            )
        path = PRESET_DIR / f"{name_or_path}.yaml"
    elif not path.is_file():
        raise UserError(f"{path}: no such preset file{looked_in(path)}")
    loaded = read_yaml(path, "reward preset")
    try:
        preset = _with_overrides(_preset_of(loaded, path.stem), weights or {}, params or {})
        preset.check()
    except UserError as e:
        raise UserError(f"reward preset {name_or_path}: {e}") from None
    return preset


def _preset_of(loaded: dict[str, Any], default_name: str) -> Preset:
    if not isinstance(loaded.get("terms"), dict):
        raise UserError("expected the keys name and terms")
    _only(loaded, ("name", "terms"), "key")
    own = [t for t, body in loaded["terms"].items() if isinstance(body, dict) and "function" in body]
    _only(loaded["terms"], (*TERMS, *own), "term")
    weights: dict[str, float] = {}
    tasks: dict[str, tuple[str, ...]] = {}
    sections: dict[str, Any] = {}
    custom: dict[str, CustomTerm] = {}
    for term, body in loaded["terms"].items():
        if not isinstance(body or {}, dict):
            raise UserError(f"terms.{term}: expected constants such as {{weight: 1}}")
        body = dict(body or {})
        weights[term] = _number(f"terms.{term}.weight", body.pop("weight", 0.0))
        raw = body.pop("tasks", list(TASKS))
        if not isinstance(raw, list) or not raw or any(t not in TASKS for t in raw):
            raise UserError(f"terms.{term}.tasks={raw!r}: must be a list of {', '.join(TASKS)}")
        tasks[term] = tuple(raw)
        if term in own:
            custom[term] = custom_term(term, body.pop("function"), body, taken=(*TERMS, *RESERVED))
        elif term == "format":
            _only(body, (), "constant of format")
        else:
            sections[term] = _section(term, SECTIONS[term](), body)
    for term in TERMS:
        tasks.setdefault(term, ("iaa",) if term in ("pairwise", "thurstone") else TASKS)
    return Preset(str(loaded.get("name", default_name)), weights, tasks, **sections, custom=custom)


def _section(term: str, base: Any, values: Mapping[str, Any]) -> Any:
    """`base` with `values` put in, each converted to the type of the constant's default."""
    _only(values, [f.name for f in fields(base)], f"constant of {term}")
    changed: dict[str, Any] = {}
    for key, value in values.items():
        kind = type(getattr(base, key))
        where = f"{term} {key}"
        if kind is bool:
            if not isinstance(value, bool):
                raise UserError(f"{where}={value!r}: must be true or false")
            changed[key] = value
        elif kind is str:
            changed[key] = str(value)
        else:  # float, or null where the dataclass allows it (the gates and the floor)
            optional = "None" in str(base.__dataclass_fields__[key].type)
            changed[key] = None if value is None and optional else _number(where, value)
    return replace(base, **changed)


def _with_overrides(preset: Preset, weights: Mapping[str, float], params: Mapping[str, Any]) -> Preset:
    _only(weights, preset.terms, "term in reward.weights")
    known = {f"{t}_{f.name}": (t, f.name) for t in TERMS if t != "format" for f in fields(getattr(preset, t))}
    known |= {f"{t}_{key}": (t, key) for t, own in preset.custom.items() for key in own.constants}
    _only(params, list(known), "constant in reward.params")
    merged = {**preset.weights, **{t: _number(f"reward.weights.{t}", w) for t, w in weights.items()}}
    preset = replace(preset, weights=merged)
    for name, value in params.items():
        term, key = known[name]
        if term in preset.custom:
            changed = preset.custom[term].with_constant(key, value)
            preset = replace(preset, custom={**preset.custom, term: changed})
        else:
            preset = replace(preset, **{term: _section(term, getattr(preset, term), {key: value})})
    return preset


def _number(where: str, value: Any) -> float:
    # YAML 1.1 reads 1e-6 as a text, so texts that are numbers count as numbers.
    try:
        number = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}={value!r}: must be a finite number")
    return number


def _only(given: Mapping[str, Any], known: list[str] | tuple[str, ...], what: str) -> None:
    for key in given:
        if key not in known:
            raise UserError(f"unknown {what} {key!r}{near(key, known)}")
