"""Read and check the registry of data sets that can be imported: `configs/datasets.yaml`.

The dataclasses have the keys of that file, whose head explains them; a new data set needs an entry, not code. No file
of a data set is opened. YAML reads `no` as false, `010` as 8 and `2024-01-01` as a date: such a name is refused, with
the advice to quote it, and never converted back to text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import MinLen
from pydantic import AfterValidator, BeforeValidator, Strict
from pydantic.dataclasses import dataclass

from tatar_dist.assets import CONFIGS
from tatar_dist.config.validate import (
    STRICT_KEYS,
    AtLeastZero,
    Finite,
    NotNegative,
    Text,
    near,
    read_yaml,
    shown,
    validated,
)
from tatar_dist.errors import UserError
from tatar_dist.types import Task

REGISTRY = CONFIGS / "datasets.yaml"
BLANK = "blank"  # a separator: any run of blanks

SplitName = Literal["train", "validation", "test"]


def _name(text: str) -> str:
    if text != text.strip() or not text.isprintable():
        raise ValueError(f"{shown(text)} is not a name: remove leading and trailing blanks and unprintable characters")
    return text


Name = Annotated[str, Strict(), MinLen(1), AfterValidator(_name)]


@dataclass(frozen=True)
class Range:
    """A declared raw scale. `imports.rows.to_score` maps it linearly to 0-100."""

    low: Finite
    high: Finite

    def __post_init__(self) -> None:
        if not 1e-12 <= self.high - self.low <= 1e12:  # far beyond any opinion scale; `points` must not overflow
            raise ValueError(f"[{self.low:g}, {self.high:g}] is not a scale; write [lowest, highest]")

    @property
    def points(self) -> float:
        """Return the score points per raw unit."""
        return 100.0 / (self.high - self.low)

    def __str__(self) -> str:
        return f"{self.low:.10g}–{self.high:.10g}"


def _ends(value: Any) -> dict[str, Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"must be [lowest, highest], is {shown(value)}")
    return {"low": value[0], "high": value[1]}


def _columns(value: Any) -> Any:
    """Map a list of names to None; header-less text already has a mapping of names to types."""
    if not isinstance(value, list):
        return value
    for column in value:
        if not isinstance(column, str):
            raise ValueError(f"{shown(column)} must be text; put it in quotes")
        if value.count(column) > 1:
            raise ValueError(f"{shown(column)} is given twice")
    return dict.fromkeys(value)


Scale = Annotated[Range, BeforeValidator(_ends)]
Kinds = Annotated[
    tuple[Literal["csv", "xlsx", "json", "jsonl", "text"], ...],
    BeforeValidator(lambda value: value if isinstance(value, list | tuple) else [value]),
    MinLen(1),
]
Columns = Annotated[dict[Name, Literal["text", "number", "integer"] | None], BeforeValidator(_columns), MinLen(1)]


@dataclass(frozen=True, config=STRICT_KEYS)
class StdColumn:
    column: Name
    range: Scale  # of the deviations, which may differ from that of the scores


@dataclass(frozen=True, config=STRICT_KEYS)
class SplitColumn:
    column: Name
    values: Annotated[dict[Name, SplitName], MinLen(1)]


@dataclass(kw_only=True, config=STRICT_KEYS)
class FileLayout:
    """Columns of an annotation file: `columns` is its signature, `image` etc. name some of them."""

    name: str = field(init=False, default="")  # its key in the registry
    kind: Kinds
    columns: Columns
    image: Name
    source: Text = ""
    separator: Literal[",", ";", "\t", "blank"] = ","
    better: Literal["higher", "lower"] = "higher"
    score: Name | None = None  # None: the mean of the votes
    worker: Name | None = None  # given: a row is one rating, averaged per image
    votes: dict[Name, Finite] = field(default_factory=dict)  # column -> value of such a vote
    votes_total: Name | None = None
    std: StdColumn | None = None
    image_pattern: Text = "{}"
    split: SplitColumn | None = None
    rationale: Name | None = None
    attributes: Name | None = None

    @property
    def lower_is_better(self) -> bool:
        return self.better == "lower"

    def _read(self) -> list[tuple[str, str]]:
        """Return (key, column) of the columns that an import reads."""
        keys = ("image", "score", "worker", "votes_total", "rationale", "attributes")
        named = {key: getattr(self, key) for key in keys}
        named |= {key: part.column for key, part in (("std", self.std), ("split", self.split)) if part}
        return [(key, column) for key, column in named.items() if column] + [("votes", c) for c in self.votes]

    def used(self) -> tuple[str, ...]:
        """Return the columns that an import reads, in the file's order."""
        named = {column for _, column in self._read()}
        return tuple(c for c in self.columns if c in named)

    def __post_init__(self) -> None:
        text, listed = "text" in self.kind, None in self.columns.values()
        pattern, pattern_fits = shown(self.image_pattern), re.fullmatch(r"[^{}]*\{\}[^{}]*", self.image_pattern)
        more = self.votes or self.std or not self.score
        for broken, problem in (
            (not self.score and not self.votes, "needs score (a column) or votes (columns and their values)"),
            (self.votes_total and not self.votes, "votes_total needs votes, the columns with shares of that total"),
            (len({f"{v:g}" for v in self.votes.values()}) < len(self.votes), "votes: two columns have one value"),
            (self.worker and more, "worker goes with score alone: votes and std are computed from the ratings"),
            (not pattern_fits, f"image_pattern {pattern} must hold {{}} once, where the image's name goes"),
            (text and len(self.kind) > 1, "kind text stands alone"),
            (text and listed, "columns of kind text must be a mapping of field names to text, number or integer"),
            (not text and not listed, "columns must be a list of names; a mapping goes with kind text"),
            (not text and self.separator != ",", "separator goes with kind text; the others have one of their own"),
        ):
            if broken:
                raise ValueError(problem)
        read = self._read()
        for key, column in read:
            if column not in self.columns:
                raise ValueError(f"{key} names {shown(column)}, not one of columns{near(column, self.columns)}")
            if [name for _, name in read].count(column) > 1:
                raise ValueError(f"column {column} has two meanings: use it for one key only")


@dataclass(kw_only=True, config=STRICT_KEYS)
class Format(FileLayout):
    """Layout of one annotation file whose scores lie on `range`."""

    range: Scale

    def __post_init__(self) -> None:
        super().__post_init__()
        for column, value in self.votes.items():
            if not self.score and not self.range.low <= value <= self.range.high:
                raise ValueError(f"votes: {column}: {value:g} is outside the range {self.range}")


@dataclass(kw_only=True, config=STRICT_KEYS)
class ListFormat(FileLayout):
    """Layout of lists that every set of `task` (None: any) with a `list_range` may come as."""

    task: Task | None = None

    def on(self, scale: Range, where: str) -> Format:
        """Return the format for a set's `list_range`. Raises UserError for votes outside of it."""
        layout = {key: value for key, value in vars(self).items() if key not in ("name", "task")}
        return validated(Format, layout | {"range": [scale.low, scale.high]}, where)


@dataclass(frozen=True, config=STRICT_KEYS)
class Names:
    """Parts of an image name: groups `reference`, `type`, `level`; strength: level / `levels`."""

    pattern: Text
    distortions: dict[Name, Name] = field(default_factory=dict)
    levels: AtLeastZero = 0

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.pattern, re.ASCII).groupindex
        except (re.error, ValueError, OverflowError, RecursionError) as e:
            raise ValueError(f"pattern is not a regular expression: {' '.join(str(e).split())}") from None
        if "reference" not in groups:
            raise ValueError("pattern needs a group (?P<reference>…)")
        if self.distortions and not ({"type", "level"} <= set(groups) and self.levels):
            raise ValueError("distortions need groups type and level in pattern, and levels (a whole number)")


@dataclass(frozen=True, config=STRICT_KEYS)
class SplitRule:
    """Rule for rows without a given split: `test` groups first, the rest by hash of the group."""

    by: Literal["image", "reference"]
    fractions: dict[SplitName, NotNegative]
    test: tuple[Name, ...] = ()
    official: Text = ""

    def __post_init__(self) -> None:
        if abs(sum(self.fractions.values()) - 1) > 1e-9:
            raise ValueError("fractions must be shares that add up to 1")


@dataclass(kw_only=True, config=STRICT_KEYS)
class Dataset:
    """A data set: its task, published counts and formats by name."""

    name: str = field(init=False, default="")  # as written everywhere
    task: Task
    in_domain: bool = False
    url: Text = ""
    terms: Text = ""
    counts: dict[Literal["total", "train", "validation", "test"], AtLeastZero] = field(default_factory=dict)
    list_range: Scale | None = None  # given: the set may come as the list formats, too
    names: Names | None = None
    split: SplitRule = SplitRule("image", {"train": 0.7, "validation": 0.1, "test": 0.2})
    formats: dict[Name, Format] = field(default_factory=dict)
    lists: tuple[str, ...] = field(init=False, default=())  # those of `formats` that come from list_formats

    def __post_init__(self) -> None:
        if self.split.by == "reference" and not self.names:
            raise ValueError("split: by reference needs names with a pattern")

    def format(self, name: str) -> Format:
        """Return a format by name. Raises UserError for an unknown name, with the nearest one."""
        if name not in self.formats:
            raise UserError(f"--format {name}: {self.name} has no such format{near(name, self.formats)}")
        return self.formats[name]


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).casefold()


@dataclass(frozen=True, config=STRICT_KEYS)
class _Entries:
    """The keys of a registry file."""

    datasets: dict[Name, Dataset] = field(default_factory=dict)
    list_formats: dict[Name, ListFormat] = field(default_factory=dict)


@dataclass(frozen=True)
class Registry:
    """All data sets by name."""

    datasets: Mapping[str, Dataset]

    def find(self, name: str) -> Dataset:
        """Find a data set, ignoring case, blanks, `-`, `_`. Raises UserError with the nearest name."""
        for known, dataset in self.datasets.items():
            if _plain(known) == _plain(name):
                return dataset
        raise UserError(f"{name}: no such data set{near(name, self.datasets)}; more by --registry FILE")


def read_registry(files: Sequence[Path] = ()) -> Registry:
    """Read `configs/datasets.yaml`, then `files`, which add data sets or replace namesakes.

    Raises:
        UserError: a file that is missing or not YAML, or an entry that is wrong, with file and key path.
    """
    datasets: dict[str, Dataset] = {}  # by plain name
    lists: dict[str, ListFormat] = {}
    for path in (REGISTRY, *files):
        entries = validated(_Entries, read_yaml(Path(path), "registry"), str(path))
        lists |= entries.list_formats
        names: dict[str, str] = {}
        for name, dataset in entries.datasets.items():
            if (twin := names.setdefault(_plain(name), name)) != name:
                raise UserError(f"{path}: datasets: {twin} and {name} are one name, in any case and without hyphens")
            if dataset.list_range:
                mine = {key: layout for key, layout in lists.items() if layout.task in (None, dataset.task)}
                where = f"{path}: datasets.{name}: list format"
                shared = {key: layout.on(dataset.list_range, f"{where} {key}") for key, layout in mine.items()}
                dataset.lists, dataset.formats = tuple(shared), shared | dataset.formats
            if not dataset.formats:
                raise UserError(f"{path}: datasets.{name}: needs a format, or list_range for the usual lists")
            dataset.name = name
            for key, fmt in dataset.formats.items():
                fmt.name = key
            datasets[_plain(name)] = dataset
    return Registry({dataset.name: dataset for dataset in datasets.values()})
