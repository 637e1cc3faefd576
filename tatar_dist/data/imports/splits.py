"""Assign the rows of an import to train, validation and test.

The split comes from `--split`, the lists of `--split-list`, or the set's rule in `configs/datasets.yaml`. Returns one
split per row, the rule in words, and whether it is the official split. The rule hashes the image's name, or its
reference image's so that no reference crosses splits. It uses neither seed nor order: the same image falls into the
same split in every file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tatar_dist.data.imports.annotations import Bad, decode, parse
from tatar_dist.data.registry import Dataset
from tatar_dist.errors import UserError
from tatar_dist.types import SPLITS


class SplitList(NamedTuple):
    """Image names that a file assigns to a split."""

    split: str
    file: str
    names: frozenset[str]


@dataclass
class Splits:
    """One split per row ("" where bad), the rule in words; `official` is None where only the user can know."""

    split: list[str]
    rule: str
    official: bool | None
    bad: dict[int, Bad] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_split_list(spec: str, data: bytes, file: str, pattern: str, columns: Sequence[str]) -> SplitList:
    """Read the names of one `SPLIT=FILE`: a name a line, or a CSV or JSON list with an image column (one of `columns`).

    A name without an extension is completed by `pattern`, so that AVA's lists of numbers work. Raises UserError for an
    unknown split, an unreadable file, no names.
    """
    split = spec.partition("=")[0]
    if split not in SPLITS:
        raise UserError(f"--split-list {spec}: must be SPLIT=FILE with SPLIT one of {', '.join(SPLITS)}")
    text = decode(data, file, None)
    if text.lstrip()[:1] in ("[", "{"):
        rows = parse(data, file, None, [])
        if rows.bad:
            i = min(rows.bad)
            raise UserError(f"{rows.where(i)}: {rows.bad[i].text}")
        keys = [next((c for c in columns if isinstance(row.get(c), str)), "") for row in rows.rows]
        if "" in keys:
            raise UserError(f"{rows.where(keys.index(''))}: no image name; looked for the keys {', '.join(columns)}")
        names = [row[key] for row, key in zip(rows.rows, keys, strict=True)]
    else:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        header = [c.strip() for c in lines[0].split(",")] if lines else []
        column = next((c for c in columns if c in header), None)
        if column is None:
            names = lines
        else:
            try:
                read = [row for row in csv.reader(io.StringIO(text, newline="")) if any(v.strip() for v in row)][1:]
                names = [row[header.index(column)] for row in read]
            except (csv.Error, IndexError):
                raise UserError(f"{file}: a row has no column {column}, or the CSV is broken") from None
    names = [name.strip() for name in names]
    if not any(names):
        raise UserError(f"{file}: the list names no image")
    complete = (n if posixpath.splitext(n)[1] else pattern.replace("{}", n) for n in names if n)
    return SplitList(split, file, frozenset(complete))


def by_lists(images: Sequence[str], groups: Sequence[str], lists: Sequence[SplitList], dataset: Dataset) -> Splits:
    """Split rows by the user's lists; `groups` as in `by_rule`.

    With a list for train, images in no list are bad rows. With one for validation and none for train they are train.
    With lists for test alone, the set's rule divides them into train and validation, by its shares of these two.
    """
    found: dict[str, SplitList] = {}
    for each in lists:
        for name in each.names:
            other = found.setdefault(name, each)
            if other.split != each.split:
                raise UserError(f"image {name!r} is in {other.split}={other.file} and in {each.split}={each.file}")
    shares = _shares_of_others({each.split for each in lists}, dataset)
    rest = {group: _hashed(group, dataset.name, shares) for group in set(groups)} if shares else {}
    splits = [
        found[name].split if name in found else rest.get(group, "") for name, group in zip(images, groups, strict=True)
    ]
    bad = {i: Bad("in no split list", f"image {images[i]!r} is in none of the split lists") for i in _empty(splits)}
    told = ", ".join(f"{each.split} = {each.file}" for each in lists)
    how = f"; the others {_by_hash(dataset, shares)}" if len(shares) > 1 else "; all others train" if shares else ""
    result = Splits(splits, told + how, None, bad)
    if len(shares) > 1:
        result.notes.append(
            "validation is drawn by hash from the images outside the lists, which is not the official split; "
            "--split-list validation=FILE names your own"
        )
    there = set(images)
    for each in lists:
        absent = len(each.names - there)
        if absent == len(each.names):
            raise UserError(f"{each.file}: none of its {absent:,} names is an image of the annotations")
        if absent:
            result.notes.append(
                f"{absent:,} of the {len(each.names):,} names in {each.file} are not in the annotations"
            )
    return result


def _shares_of_others(listed: set[str], dataset: Dataset) -> dict[str, float]:
    """Return the shares by which the images outside the lists are split; empty if those images are bad rows."""
    if "train" in listed:
        return {}
    drawn = {name: dataset.split.fractions.get(name, 0.0) for name in ("train", "validation")}
    if "validation" in listed or min(drawn.values()) == 0:
        return {"train": 1.0}
    return {name: share / sum(drawn.values()) for name, share in drawn.items()}


def by_rule(groups: Sequence[str], dataset: Dataset) -> Splits:
    """Split rows by the set's rule. `groups`: what must not cross splits, a row's image or reference image."""
    rule = dataset.split
    chosen = {g: _hashed(g, dataset.name, rule.fractions) for g in set(groups)} | {g: "test" for g in rule.test}
    how = _by_hash(dataset, rule.fractions)
    if rule.test:
        how = f"test = {len(rule.test)} {rule.by} images of the published test list; the others {how}"
    return Splits([chosen[group] for group in groups], how, False)


def _by_hash(dataset: Dataset, shares: Mapping[str, float]) -> str:
    told = ", ".join(f"{name} {100 * share:.3g}%" for name, share in shares.items())
    return f"by hash of the {dataset.split.by}{'' if dataset.split.by == 'image' else ' image'}: {told}"


def _hashed(group: str, dataset: str, shares: Mapping[str, float]) -> str:
    """Return the split whose stretch of [0, 1) holds the hash of the group; `shares` add up to 1."""
    digest = hashlib.blake2b(f"{dataset}\0{group}".encode(), digest_size=8).digest()
    at = int.from_bytes(digest, "big") / 2.0**64
    for name, share in shares.items():
        at -= share
        if at < 0:
            return name
    return next(name for name, share in reversed(list(shares.items())) if share > 0)


def _empty(values: Sequence[str]) -> list[int]:
    return [i for i, value in enumerate(values) if not value]
