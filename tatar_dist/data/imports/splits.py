"""Assign the rows of an import to train, validation and test.

The split comes from `--split`, the lists of `--split-list`, or the set's rule in `configs/datasets.yaml`. Returns one
split per row, the rule in words, and whether it is the official split. The rule hashes the image's name, or its
reference image's so that no reference crosses splits. It uses neither seed nor order: the same image falls into the
same split in every file.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tatar_dist.data.imports.annotations import decode, parse
from tatar_dist.data.registry import Dataset
from tatar_dist.errors import UserError


class SplitList(NamedTuple):
    """Image names that a file assigns to a split."""

    split: str
    file: str
    names: frozenset[str]


@dataclass
class Splits:
    """One split per row ("" if bad), the rule in words; `official` None: only the user knows."""

    split: list[str]
    rule: str
    official: bool | None
    notes: list[str] = field(default_factory=list)


def read_split_list(split: str, file: str, data: bytes, pattern: str, columns: Sequence[str]) -> SplitList:
    """Read the image names of one `SPLIT=FILE`.

    The file has one name per line, or is a CSV or JSON list with the image name in one of `columns`. A name without an
    extension replaces the `{}` in `pattern`, so that AVA's lists of numbers work.
    Raises UserError for an unreadable file, a row without a name, or a list without names.
    """
    names = decode(data, file, None).split("\n")
    header = [name.strip() for name in next(filter(str.strip, names), "").split(",")]
    if header[0][:1] in ("[", "{") or not set(columns).isdisjoint(header):
        parsed = parse(data, file, None, [])
        parsed.check()
        names = []
        for row, at in zip(parsed.rows, parsed.at, strict=True):
            values = row if isinstance(row, dict) else dict(zip(parsed.header, row, strict=False))
            name = next((values[c] for c in columns if isinstance(values.get(c), str)), None)
            if name is None:
                raise UserError(f"{at}: no image name; looked for {', '.join(columns)}")
            names.append(name)
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UserError(f"{file}: the list names no image")
    complete = (n if posixpath.splitext(n)[1] else pattern.replace("{}", n) for n in names)
    return SplitList(split, file, frozenset(complete))


def by_lists(images: Sequence[str], groups: Sequence[str], lists: Sequence[SplitList], dataset: Dataset) -> Splits:
    """Split rows by the user's lists; `groups` as in `by_rule`.

    With a list for train, images in no list are bad rows. With one for validation and none for train they are train.
    With lists for test alone, the set's rule divides them into train and validation, by its shares of these two.
    """
    list_of: dict[str, SplitList] = {}
    annotated = set(images)
    notes = []
    for split_list in lists:
        for name in split_list.names:
            other = list_of.setdefault(name, split_list)
            if other.split != split_list.split:
                here, there = (f"{x.split}={x.file}" for x in (split_list, other))
                raise UserError(f"image {name!r} is in {there} and in {here}")
        absent, total = len(split_list.names - annotated), len(split_list.names)
        if absent == total:
            raise UserError(f"{split_list.file}: none of its {absent:,} names is an image in the annotations")
        if absent:
            notes.append(f"{absent:,} of the {total:,} names in {split_list.file} are not in the annotations")
    shares = _shares_of_others({x.split for x in lists}, dataset)
    splits = []
    for image, group in zip(images, groups, strict=True):
        if image in list_of:
            splits.append(list_of[image].split)
        else:
            splits.append(_hashed(group, dataset.name, shares) if shares else "")
    rule = ", ".join(f"{x.split} = {x.file}" for x in lists)
    if len(shares) > 1:
        rule += f"; the others {_by_hash(dataset, shares)}"
        notes.insert(
            0,
            "validation is drawn by hash from the images outside the lists, which is not the official split; "
            "--split-list validation=FILE names your own",
        )
    elif shares:
        rule += "; all others train"
    return Splits(splits, rule, None, notes)


def _shares_of_others(listed: set[str], dataset: Dataset) -> dict[str, float]:
    """Return the split shares of images outside the lists; empty if those images are bad rows."""
    if "train" in listed:
        return {}
    drawn = {name: dataset.split.fractions.get(name, 0.0) for name in ("train", "validation")}
    if "validation" in listed or min(drawn.values()) == 0:
        return {"train": 1.0}
    return {name: share / sum(drawn.values()) for name, share in drawn.items()}


def by_rule(groups: Sequence[str], dataset: Dataset) -> Splits:
    """Split rows by the set's rule; `groups` (image or reference per row) do not cross splits."""
    rule = dataset.split
    shares: dict[str, float] = dict(rule.fractions.items())
    chosen = {g: _hashed(g, dataset.name, shares) for g in set(groups)} | {g: "test" for g in rule.test}
    how = _by_hash(dataset, shares)
    if rule.test:
        how = f"test = {len(rule.test)} {rule.by} images of the published test list; the others {how}"
    return Splits([chosen[group] for group in groups], how, False)


def _by_hash(dataset: Dataset, shares: Mapping[str, float]) -> str:
    percentages = ", ".join(f"{name} {100 * share:.3g}%" for name, share in shares.items())
    return f"by hash of the {dataset.split.by}{'' if dataset.split.by == 'image' else ' image'}: {percentages}"


def _hashed(group: str, dataset: str, shares: Mapping[str, float]) -> str:
    """Return the split whose part of [0, 1) contains the hash of the group; `shares` sum to 1."""
    digest = hashlib.blake2b(f"{dataset}\0{group}".encode(), digest_size=8).digest()
    at = int.from_bytes(digest, "big") / 2.0**64
    for name, share in shares.items():
        at -= share
        if at < 0:
            return name
    return next(name for name, share in reversed(list(shares.items())) if share > 0)
