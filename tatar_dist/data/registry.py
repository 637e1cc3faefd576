"""Read and check the registry of data sets that can be imported: `configs/datasets.yaml`.

`read_registry` takes further YAML files, of which later ones add or replace data sets, and returns a `Registry` of
frozen records. No file of a data set is opened; a new data set needs a YAML entry, not code. An unknown key or name
raises `UserError` naming file, place and the nearest valid name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tatar_dist.assets import CONFIGS
from tatar_dist.config.validate import near, read_yaml, shown
from tatar_dist.data import yaml_entries as entries
from tatar_dist.errors import UserError
from tatar_dist.types import SPLITS, TASKS

REGISTRY = CONFIGS / "datasets.yaml"
KINDS = ("csv", "xlsx", "json", "jsonl", "text")
TYPES = ("text", "number", "integer")  # of a header-less file's fields
BLANK = "blank"  # any run of blanks separates
SPLIT = {"by": "image", "fractions": {"train": 0.7, "validation": 0.1, "test": 0.2}}  # default rule of a set


@dataclass(frozen=True)
class Range:
    """A declared raw scale. `imports.scores.to_score` maps it linearly to 0-100."""

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
    """Layout of one annotation file. `columns` is its signature; `image`, `score` and so on name columns among them."""

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
        """Return the columns that an import reads, in the file's order."""
        named = {self.image, self.score, self.worker, self.votes_total, self.std, self.split}
        named |= {self.rationale, self.attributes} | {column for column, _ in self.votes}
        return tuple(c for c in self.columns if c in named)


@dataclass(frozen=True)
class Names:
    """Parts of an image's name: `pattern` has groups `reference`, `type`, `level`; level / `levels` is the strength."""

    pattern: str
    distortions: Mapping[str, str]
    levels: int


@dataclass(frozen=True)
class SplitRule:
    """Rule for rows without a split from file or user: `test` groups first, the rest by hash of the group."""

    by: str  # image | reference
    fractions: Mapping[str, float]
    test: tuple[str, ...]
    official: str


@dataclass(frozen=True)
class Dataset:
    """A data set: its name as written everywhere, its task, published counts and formats by name."""

    name: str
    task: str
    in_domain: bool
    url: str
    terms: str
    counts: Mapping[str, int]
    split: SplitRule
    formats: Mapping[str, Format]
    lists: tuple[str, ...] = ()  # those of `formats` that come from list_formats
    names: Names | None = None

    def format(self, name: str) -> Format:
        """Return a format by name. Raises UserError for an unknown name, with the nearest one."""
        if name not in self.formats:
            raise UserError(f"--format {name}: {self.name} has no such format{near(name, self.formats)}")
        return self.formats[name]


@dataclass(frozen=True)
class Registry:
    """All data sets by name."""

    datasets: Mapping[str, Dataset]

    def find(self, name: str) -> Dataset:
        """Find a data set by name, ignoring case, blanks, `-` and `_`. Raises UserError with the nearest name."""
        plain = {_plain(n): n for n in self.datasets}
        if _plain(name) in plain:
            return self.datasets[plain[_plain(name)]]
        close = difflib.get_close_matches(_plain(name), plain, n=1, cutoff=0.5)
        hint = f", did you mean {plain[close[0]]}?" if close else ""
        known = ", ".join(self.datasets)
        raise UserError(f"{name}: no such data set{hint} (known: {known}; more by --registry FILE)")


def read_registry(files: Sequence[Path] = ()) -> Registry:
    """Read `configs/datasets.yaml`, then `files`, whose data sets are added or replace those of the same name.

    Raises:
        UserError: file missing or not YAML, and by place: unknown or missing key, wrong type, unknown column, a
            column with two meanings, a range that is not a scale.
    """
    sets: dict[str, Dataset] = {}
    lists: dict[str, Any] = {}
    for path in (REGISTRY, *files):
        tree = read_yaml(Path(path), "registry")
        entries.only_keys(tree, ("list_formats", "datasets"), f"{path}")
        lists |= _lists(tree, f"{path}")
        mine: dict[str, str] = {}
        for name, entry in entries.mapping(tree, "datasets", f"{path}").items():
            if mine.setdefault(_plain(name), name) != name:
                raise UserError(
                    f"{path}: {name} and {mine[_plain(name)]} are one name, in any case and without hyphens"
                )
            plain = {_plain(n): n for n in sets}
            sets.pop(plain.get(_plain(name), ""), None)
            sets[name] = _dataset(name, entry, lists, f"{path}: {name}")
    return Registry(sets)


_FORMAT_KEYS = (
    *("kind", "columns", "image", "score", "worker", "votes", "votes_total", "range", "better", "std", "source"),
    *("image_pattern", "separator", "split", "rationale", "attributes"),
)


def _lists(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the list formats. Their values are checked with each data set that uses them, which gives the range."""
    found = entries.mapping(tree, "list_formats", where)
    for name, entry in found.items():
        at = f"{where}: list format {name}"
        entries.only_keys(entry, ("task", *(k for k in _FORMAT_KEYS if k != "range")), at)
        if "task" in entry:
            entries.choice(entry["task"], TASKS, f"{at}: task")
    return found


def _dataset(name: str, entry: Any, lists: Mapping[str, Any], where: str) -> Dataset:
    known = ("task", "in_domain", "url", "terms", "counts", "list_range", "names", "split", "formats")
    entries.only_keys(entry, known, where)
    task = entries.choice(entries.need(entry, "task", where), TASKS, f"{where}: task")
    in_domain = entries.flag(entry.get("in_domain", False), f"{where}: in_domain")
    counts = entries.mapping(entry, "counts", where)
    entries.only_keys(counts, ("total", *SPLITS), f"{where}: counts")
    for key, count in counts.items():
        entries.whole(count, 0, f"{where}: counts: {key}")
    formats = entries.mapping(entry, "formats", where)
    shared: dict[str, Any] = {}
    if "list_range" in entry:
        _range(entry["list_range"], f"{where}: list_range")
        # Skip list formats of the other task: their rationale keys differ.
        mine = {k: v for k, v in lists.items() if v.get("task") in (None, task)}
        shared = {k: {a: b for a, b in v.items() if a != "task"} for k, v in mine.items()}
        formats = {**{k: {**v, "range": entry["list_range"]} for k, v in shared.items()}, **formats}
    if not formats:
        raise UserError(f"{where}: needs a format, or list_range for the usual lists")
    read = {k: _format(k, v, f"{where}: format {k}") for k, v in formats.items()}
    names = _names(entry["names"], f"{where}: names") if "names" in entry else None
    split = _split_rule(entry.get("split", SPLIT), names, f"{where}: split")
    url, terms = (_said(entry, k, where) for k in ("url", "terms"))
    return Dataset(name, task, in_domain, url, terms, counts, split, read, tuple(shared), names)


def _format(name: str, entry: Any, where: str) -> Format:
    entries.only_keys(entry, _FORMAT_KEYS, where)
    kinds, columns, types = _layout(entry, where)

    def column(of: Mapping[str, Any], key: str, at: str) -> str:
        named = entries.need(of, key, at)
        if named not in columns:
            told = near(named, columns)
            raise UserError(f"{at}: {key} names {shown(named)}, which is not among columns{told}")
        return named

    def optional(key: str) -> str | None:
        return column(entry, key, where) if key in entry else None

    def pair(key: str, other: str) -> dict[str, Any]:
        at = f"{where}: {key}"
        found = entries.mapping(entry, key, where)
        if key in entry:
            entries.only_keys(found, ("column", other), at)
            column(found, "column", at)
            entries.need(found, other, at)
        return found

    scale = _range(entries.need(entry, "range", where), f"{where}: range")
    votes, std, split = _votes(entry, scale, where), pair("std", "range"), pair("split", "values")
    for key in votes:
        column({"votes": key}, "votes", where)
    values = entries.mapping(split, "values", f"{where}: split")
    for key, value in values.items():
        entries.choice(value, SPLITS, f"{where}: split: values: {key}")
    if split and not values:
        raise UserError(f"{where}: split: values is empty")
    if "worker" in entry and (votes or std or "score" not in entry):
        raise UserError(f"{where}: worker goes with score alone: votes and std are computed from the ratings")
    pattern = entries.text(entry.get("image_pattern", "{}"), f"{where}: image_pattern")
    if pattern.count("{}") != 1 or pattern.count("{") != 1 or pattern.count("}") != 1:
        told = shown(pattern)
        raise UserError(f"{where}: image_pattern {told} must hold {{}} once, where the image's name goes")
    made = Format(
        name=name,
        kinds=kinds,
        columns=columns,
        image=column(entry, "image", where),
        range=scale,
        source=_said(entry, "source", where),
        types=types,
        separator=entries.choice(entry.get("separator", ","), (",", ";", "\t", BLANK), f"{where}: separator"),
        lower_is_better=entries.choice(entry.get("better", "higher"), ("higher", "lower"), f"{where}: better")
        == "lower",
        score=optional("score"),
        worker=optional("worker"),
        votes=tuple(votes.items()),
        votes_total=optional("votes_total"),
        std=std.get("column"),
        std_range=_range(std["range"], f"{where}: std: range") if std else None,
        image_pattern=pattern,
        split=split.get("column"),
        split_values=values if split else None,
        rationale=optional("rationale"),
        attributes=optional("attributes"),
    )
    meant = [c for c in (made.image, made.score, made.worker, made.votes_total, made.std, made.split) if c]
    meant += [c for c in (made.rationale, made.attributes, *votes) if c]
    if len(set(meant)) < len(meant):
        twice = next(c for c in meant if meant.count(c) > 1)
        raise UserError(f"{where}: column {twice} has two meanings: use it for one key only")
    return made


def _layout(entry: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...] | None]:
    """Return kinds, columns, and the columns' types for header-less text."""
    kinds = entries.need(entry, "kind", where)
    kinds = tuple(entries.choice(k, KINDS, f"{where}: kind") for k in (kinds if isinstance(kinds, list) else [kinds]))
    columns, types = entries.need(entry, "columns", where), None
    if not kinds or not columns:
        raise UserError(f"{where}: {'columns' if kinds else 'kind'} is empty")
    if "text" in kinds:
        if not isinstance(columns, dict) or len(kinds) > 1:
            raise UserError(f"{where}: columns of kind text must be a mapping of field names to {', '.join(TYPES)}")
        types = tuple(entries.choice(t, TYPES, f"{where}: columns: {shown(c)}") for c, t in columns.items())
    elif "separator" in entry:
        raise UserError(f"{where}: separator goes with kind text; the others have one of their own")
    return kinds, entries.names(list(columns) if types else columns, f"{where}: columns"), types


def _votes(entry: Mapping[str, Any], scale: Range, where: str) -> dict[str, float]:
    """Return vote columns and their values, which must lie on the scale if their mean is the score."""
    given = entries.mapping(entry, "votes", where)
    votes = {key: entries.number(value, f"{where}: votes: {key}") for key, value in given.items()}
    if "score" not in entry and not votes:
        raise UserError(f"{where}: needs score (a column) or votes (columns and their values)")
    if "votes_total" in entry and not votes:
        raise UserError(f"{where}: votes_total needs votes, the columns that hold shares of that total")
    if len({f"{value:g}" for value in votes.values()}) < len(votes):
        raise UserError(f"{where}: votes: two columns have one value")
    for key, value in votes.items():
        if "score" not in entry and not scale.low <= value <= scale.high:
            raise UserError(f"{where}: votes: {key}: {value:g} is outside the range {scale}")
    return votes


def _names(entry: Any, where: str) -> Names:
    entries.only_keys(entry, ("pattern", "levels", "distortions"), where)
    pattern = entries.text(entries.need(entry, "pattern", where), f"{where}: pattern")
    try:
        groups = re.compile(pattern, re.ASCII).groupindex
    except (re.error, ValueError, OverflowError, RecursionError) as e:
        raise UserError(f"{where}: pattern is no regular expression: {' '.join(str(e).split())}") from None
    if "reference" not in groups:
        raise UserError(f"{where}: pattern needs a group (?P<reference>…)")
    distortions = entries.mapping(entry, "distortions", where)
    for key, family in distortions.items():
        entries.name(family, f"{where}: distortions: {key}")
    levels = entries.whole(entry.get("levels", 1), 1, f"{where}: levels")
    if distortions and not ({"type", "level"} <= set(groups) and "levels" in entry):
        raise UserError(f"{where}: distortions need groups type and level in pattern, and levels (a whole number)")
    return Names(pattern, distortions, levels)


def _split_rule(entry: Any, names: Names | None, where: str) -> SplitRule:
    entries.only_keys(entry, ("by", "fractions", "test", "official"), where)
    by = entries.choice(entries.need(entry, "by", where), ("image", "reference"), f"{where}: by")
    if by == "reference" and names is None:
        raise UserError(f"{where}: by reference needs names with a pattern")
    fractions = entries.mapping(entry, "fractions", where)
    entries.only_keys(fractions, SPLITS, f"{where}: fractions")
    shares = {k: entries.number(v, f"{where}: fractions: {k}") for k, v in fractions.items()}
    if min(shares.values(), default=-1) < 0 or abs(sum(shares.values()) - 1) > 1e-9:
        raise UserError(f"{where}: fractions must be shares that add up to 1")
    test = entries.names(entry.get("test", []), f"{where}: test")
    official = _said(entry, "official", where)
    return SplitRule(by, shares, test, official)


def _said(entry: Mapping[str, Any], key: str, where: str) -> str:
    """Return a text that gives the source of something; "" if the entry has none."""
    return entries.text(entry[key], f"{where}: {key}") if key in entry else ""


def _range(value: Any, where: str) -> Range:
    if not isinstance(value, list) or len(value) != 2:
        raise UserError(f"{where} must be [lowest, highest], is {shown(value)}")
    low, high = (entries.number(v, where) for v in value)
    if not low < high:
        raise UserError(f"{where}: {low:g} is not below {high:g}")
    if not 1e-12 <= high - low <= 1e12:  # far beyond any opinion scale; `points` must not overflow
        raise UserError(f"{where}: from {low:g} to {high:g} is no scale")
    return Range(low, high)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()
