"""The data sets that can be imported: what `configs/datasets.yaml` says, read and checked.

In: YAML files (later ones repeat or replace sets of earlier ones). Out: `Registry`, frozen records of sets and their
file formats. Nothing here opens a data set's file; a new set is a YAML entry, not code. An unknown key or name is a
`UserError` that names file, place and the nearest valid name.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tatar_dist.errors import UserError
from tatar_dist.records import TASKS

REGISTRY = Path(__file__).resolve().parents[2] / "configs" / "datasets.yaml"
KINDS = ("csv", "xlsx", "json", "jsonl", "text")
SPLITS = ("train", "validation", "test")
TYPES = ("text", "number", "integer")  # of a header-less file's fields
BLANK = "blank"  # any run of blanks separates


@dataclass(frozen=True)
class Range:
    """A declared raw scale; `map` of a raw value is its score on 0-100."""

    low: float
    high: float

    @property
    def points(self) -> float:
        """Score points per raw unit."""
        return 100.0 / (self.high - self.low)

    def __str__(self) -> str:
        return f"{self.low:.10g}–{self.high:.10g}"


@dataclass(frozen=True)
class Format:
    """One file layout of a set. `columns` is its signature; the other names are columns among them."""

    name: str
    kinds: tuple[str, ...]
    columns: tuple[str, ...]
    image: str
    range: Range
    source: str
    types: tuple[str, ...] | None = None  # of `columns`, header-less text only
    separator: str = ","
    lower_is_better: bool = False
    score: str | None = None  # None: the mean of the votes
    worker: str | None = None  # given: a row is one rating, averaged per image
    votes: tuple[tuple[str, float], ...] = ()  # (column, value of such a vote)
    votes_total: str | None = None
    std: str | None = None
    std_range: Range | None = None
    image_pattern: str = "{}"
    split: str | None = None
    split_values: Mapping[str, str] | None = None
    rationale: str | None = None
    attributes: str | None = None

    def used(self) -> tuple[str, ...]:
        """The columns an import reads, in the file's order."""
        named = {self.image, self.score, self.worker, self.votes_total, self.std, self.split}
        named |= {self.rationale, self.attributes} | {column for column, _ in self.votes}
        return tuple(c for c in self.columns if c in named)


@dataclass(frozen=True)
class Names:
    """What an image's name says: named groups `reference`, `type`, `level`; level of `levels` is the strength."""

    pattern: str
    distortions: Mapping[str, str]
    levels: int


@dataclass(frozen=True)
class SplitRule:
    """The rule when neither the file nor the user names a split: `test` groups first, the rest by hash of the group."""

    by: str  # image | reference
    fractions: Mapping[str, float]
    test: tuple[str, ...]
    official: str


@dataclass(frozen=True)
class Dataset:
    """A set: name as written everywhere, its task, published counts and formats by name."""

    name: str
    task: str
    in_domain: bool
    url: str
    terms: str
    counts: Mapping[str, int]
    split: SplitRule
    formats: Mapping[str, Format]
    lists: tuple[str, ...] = ()  # those of `formats` that every set has
    names: Names | None = None

    def format(self, name: str) -> Format:
        """Raises UserError for a name this set lacks, with the nearest one."""
        if name not in self.formats:
            raise UserError(f"--format {name}: {self.name} has no such format{_near(name, self.formats)}")
        return self.formats[name]


@dataclass(frozen=True)
class Registry:
    """All sets by name."""

    datasets: Mapping[str, Dataset]

    def find(self, name: str) -> Dataset:
        """By name, any case, with or without hyphens. Raises UserError with the nearest name."""
        plain = {_plain(n): n for n in self.datasets}
        if _plain(name) in plain:
            return self.datasets[plain[_plain(name)]]
        near = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.5)
        hint = f", did you mean {plain[near[0]]}?" if near else ""
        known = ", ".join(self.datasets)
        raise UserError(f"{name}: no such data set{hint} (known: {known}; more by --registry FILE)")


def read_registry(files: Sequence[Path] = ()) -> Registry:
    """The checkout's registry, then `files`, whose sets are added or replace those of the same name.

    Raises:
        UserError: file missing or not YAML, and by place: unknown or missing key, wrong type, unknown column.
    """
    sets: dict[str, Dataset] = {}
    lists: dict[str, Any] = {}
    for path in (REGISTRY, *files):
        tree = _read_yaml(Path(path))
        _keys(tree, ("list_formats", "datasets"), f"{path}")
        lists |= _mapping(tree, "list_formats", f"{path}")
        for name, entry in _mapping(tree, "datasets", f"{path}").items():
            plain = {_plain(n): n for n in sets}
            sets.pop(plain.get(_plain(str(name)), ""), None)
            sets[str(name)] = _dataset(str(name), entry, lists, f"{path}: {name}")
    return Registry(sets)


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice: the second would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as e:
        raise UserError(f"{path}: cannot read the registry: {e.strerror or e}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: the registry is not UTF-8") from None
    except (yaml.YAMLError, RecursionError) as e:
        raise UserError(f"{path}: not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a registry is a mapping with the key datasets")
    return tree


def _dataset(name: str, entry: Any, lists: Mapping[str, Any], where: str) -> Dataset:
    known = ("task", "in_domain", "url", "terms", "counts", "list_range", "names", "split", "formats")
    _keys(entry, known, where)
    task = _choice(_need(entry, "task", where), TASKS, f"{where}: task")
    in_domain = _need(entry, "in_domain", where)
    if not isinstance(in_domain, bool):
        raise UserError(f"{where}: in_domain must be true or false, is {in_domain!r}")
    counts = _mapping(entry, "counts", where)
    _keys(counts, ("total", *SPLITS), f"{where}: counts")
    for key, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise UserError(f"{where}: counts: {key} must be a whole number, is {count!r}")
    formats = {str(k): v for k, v in _mapping(entry, "formats", where).items()}
    shared: dict[str, Any] = {}
    if "list_range" in entry:
        # A list in another task's form is not this set's: its rationale keys differ.
        mine = {k: v for k, v in lists.items() if isinstance(v, dict) and v.get("task") in (None, task)}
        shared = {k: {a: b for a, b in v.items() if a != "task"} for k, v in mine.items()}
        formats = {**{k: {**v, "range": entry["list_range"]} for k, v in shared.items()}, **formats}
    if not formats:
        raise UserError(f"{where}: needs a format, or list_range for the usual lists")
    read = {k: _format(k, v, f"{where}: format {k}") for k, v in formats.items()}
    names = _names(entry["names"], f"{where}: names") if "names" in entry else None
    split = _split_rule(_need(entry, "split", where), names, f"{where}: split")
    url, terms = str(_need(entry, "url", where)), str(_need(entry, "terms", where))
    return Dataset(name, task, in_domain, url, terms, counts, split, read, tuple(shared), names)


_FORMAT_KEYS = (
    *("kind", "columns", "image", "score", "worker", "votes", "votes_total", "range", "better", "std", "source"),
    *("image_pattern", "separator", "split", "rationale", "attributes"),
)


def _format(name: str, entry: Any, where: str) -> Format:
    _keys(entry, _FORMAT_KEYS, where)
    kinds = _need(entry, "kind", where)
    kinds = tuple(_choice(k, KINDS, f"{where}: kind") for k in (kinds if isinstance(kinds, list) else [kinds]))
    columns = _need(entry, "columns", where)
    types = None
    if "text" in kinds:
        if not isinstance(columns, dict) or len(kinds) > 1:
            raise UserError(f"{where}: columns of kind text must be a mapping of field names to {', '.join(TYPES)}")
        types = tuple(_choice(t, TYPES, f"{where}: columns: {c}") for c, t in columns.items())
    elif not isinstance(columns, list):
        raise UserError(f"{where}: columns must be a list of names")
    columns = tuple(str(c) for c in columns)
    if not columns or len(set(columns)) < len(columns):
        raise UserError(f"{where}: columns must be names, none of them twice")

    def column(of: Mapping[str, Any], key: str, at: str) -> str:
        if str(of[key]) not in columns:
            raise UserError(f"{at}: {key} names {of[key]!r}, which is not among columns{_near(of[key], columns)}")
        return str(of[key])

    def optional(key: str) -> str | None:
        return column(entry, key, where) if key in entry else None

    votes = _mapping(entry, "votes", where)
    for key, value in votes.items():
        column({"votes": key}, "votes", where)
        _number(value, f"{where}: votes: {key}")
    std, split = _mapping(entry, "std", where), _mapping(entry, "split", where)
    _need(entry, "image", where)
    if "score" not in entry and not votes:
        raise UserError(f"{where}: needs score (a column) or votes (columns and their values)")
    if "worker" in entry and (votes or std or "score" not in entry):
        raise UserError(f"{where}: worker goes with score alone: votes and std are computed from the ratings")
    if std:
        _keys(std, ("column", "range"), f"{where}: std")
    if split:
        _keys(split, ("column", "values"), f"{where}: split")
        for key, value in _mapping(split, "values", f"{where}: split").items():
            _choice(value, SPLITS, f"{where}: split: values: {key}")
    pattern = str(entry.get("image_pattern", "{}"))
    if pattern.count("{}") != 1 or pattern.count("{") != 1 or pattern.count("}") != 1:
        raise UserError(f"{where}: image_pattern {pattern!r} must hold {{}} once, where the image's name goes")
    return Format(
        name=name,
        kinds=kinds,
        columns=columns,
        image=column(entry, "image", where),
        range=_range(_need(entry, "range", where), f"{where}: range"),
        source=str(_need(entry, "source", where)),
        types=types,
        separator=_choice(entry.get("separator", ","), (",", ";", "\t", BLANK), f"{where}: separator"),
        lower_is_better=_choice(entry.get("better", "higher"), ("higher", "lower"), f"{where}: better") == "lower",
        score=optional("score"),
        worker=optional("worker"),
        votes=tuple((str(k), float(v)) for k, v in votes.items()),
        votes_total=optional("votes_total"),
        std=column(std, "column", f"{where}: std") if std else None,
        std_range=_range(_need(std, "range", f"{where}: std"), f"{where}: std: range") if std else None,
        image_pattern=pattern,
        split=column(split, "column", f"{where}: split") if split else None,
        split_values={str(k): v for k, v in _need(split, "values", f"{where}: split").items()} if split else None,
        rationale=optional("rationale"),
        attributes=optional("attributes"),
    )


def _names(entry: Any, where: str) -> Names:
    _keys(entry, ("pattern", "levels", "distortions"), where)
    try:
        groups = re.compile(str(_need(entry, "pattern", where))).groupindex
    except re.error as e:
        raise UserError(f"{where}: pattern is no regular expression: {e}") from None
    if "reference" not in groups:
        raise UserError(f"{where}: pattern needs a group (?P<reference>…)")
    distortions, levels = _mapping(entry, "distortions", where), entry.get("levels", 1)
    if distortions and not ({"type", "level"} <= set(groups) and isinstance(levels, int) and levels >= 1):
        raise UserError(f"{where}: distortions need groups type and level in pattern, and levels (a whole number)")
    return Names(str(entry["pattern"]), {str(k): str(v) for k, v in distortions.items()}, levels)


def _split_rule(entry: Any, names: Names | None, where: str) -> SplitRule:
    _keys(entry, ("by", "fractions", "test", "official"), where)
    by = _choice(_need(entry, "by", where), ("image", "reference"), f"{where}: by")
    if by == "reference" and names is None:
        raise UserError(f"{where}: by reference needs names with a pattern")
    fractions = _mapping(entry, "fractions", where)
    _keys(fractions, SPLITS, f"{where}: fractions")
    values = [_number(v, f"{where}: fractions: {k}") for k, v in fractions.items()]
    if min(values, default=-1) < 0 or abs(sum(values) - 1) > 1e-9:
        raise UserError(f"{where}: fractions must be shares that add up to 1")
    test = tuple(str(g) for g in entry.get("test", []))
    return SplitRule(by, {k: float(v) for k, v in fractions.items()}, test, str(_need(entry, "official", where)))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


def _near(name: Any, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else f" (known: {', '.join(known)})"


def _keys(entry: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be a mapping with keys among {', '.join(known)}")
    for key in entry:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{_near(key, known)}")


def _need(entry: Mapping[str, Any], key: str, where: str) -> Any:
    if entry.get(key) is None:
        raise UserError(f"{where}: key {key} is missing")
    return entry[key]


def _mapping(entry: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = entry.get(key, {})
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key} must be a mapping, is {value!r}")
    return value


def _choice(value: Any, allowed: Sequence[str], where: str) -> str:
    if value not in allowed:
        raise UserError(f"{where} is {value!r}, must be one of {', '.join(map(repr, allowed))}")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where} must be a number, is {value!r}")
    return float(value)


def _range(value: Any, where: str) -> Range:
    if not isinstance(value, list) or len(value) != 2:
        raise UserError(f"{where} must be [lowest, highest], is {value!r}")
    low, high = (_number(v, where) for v in value)
    if not low < high:
        raise UserError(f"{where}: {low:g} is not below {high:g}")
    return Range(low, high)
