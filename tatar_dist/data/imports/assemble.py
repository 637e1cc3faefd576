"""Assemble annotation files into one Arrow table; rows are cross-checked and split.

Takes the files as bytes, the set's entry in the registry and the listed images directory. Returns `Imported`: the
manifest's table, the report (a dict) and the dropped rows. Accesses no file. A bad row is an error that names FILE:LINE
and counts the others; with `drop_bad` it is dropped with its reason. rows = kept + dropped, always.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tatar_dist.data.imports.annotations import read_annotations
from tatar_dist.data.imports.attributes import join, read_attributes
from tatar_dist.data.imports.folder import ImageFolder
from tatar_dist.data.imports.rows import (
    AllRows,
    check_duplicates,
    check_paths,
    counts_format,
    first_bad,
    gather,
    read_names,
)
from tatar_dist.data.imports.scores import ImportedScores, judge, to_score
from tatar_dist.data.imports.splits import SplitList, Splits, by_lists, by_rule, read_split_list
from tatar_dist.data.registry import Dataset
from tatar_dist.errors import UserError
from tatar_dist.types import SPLITS

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Sources:
    """Files to import, as bytes with the names that messages use."""

    files: tuple[tuple[str, bytes], ...]
    split_lists: tuple[tuple[str, str, bytes], ...] = ()  # ("test=F", "F", bytes)
    attributes: tuple[str, bytes] | None = None


@dataclass(frozen=True)
class Choices:
    """The user's choices: the command's options of the same names."""

    format: str | None = None
    encoding: str | None = None
    split: str | None = None
    drop_bad: bool = False


@dataclass
class Imported:
    """The manifest's rows, the report, and the dropped rows (`at`, `image`, `reason`, `text`)."""

    table: pa.Table
    report: dict[str, Any]
    dropped: list[dict[str, Any]]


def assemble(sources: Sources, dataset: Dataset, choices: Choices, folder: ImageFolder | None = None) -> Imported:
    """Build the manifest's table from bytes, without file access. `folder` None: images are not looked up.

    Raises:
        UserError: a file that cannot be read or recognised; without `drop_bad` the first bad row, with the number of
            others; no row left.
    """
    files = [
        judge(read_annotations(data, name, dataset, choices.format, choices.encoding)) for name, data in sources.files
    ]
    if len({bool(f.format.worker) for f in files}) > 1:
        raise UserError("files of single ratings and files of mean scores cannot be one manifest: import each alone")
    rows = gather(files)
    check_paths(rows, folder)
    read_names(rows, dataset)
    splits = _split(rows, dataset, sources, choices)
    check_duplicates(rows)
    total = len(rows.given)
    if rows.bad and not choices.drop_bad:
        raise UserError(first_bad(rows, folder))
    if len(rows.bad) == total:
        raise UserError(f"{first_bad(rows, folder, hint=False)}; none of the {total:,} rows is left")
    keep = np.flatnonzero(rows.alive())
    ratings = bool(files[0].format.worker)
    columns = _averaged(rows, keep) if ratings else _columns(rows, keep)
    notes = list(splits.notes)
    if sources.attributes:
        notes.append(_join_attributes(columns, sources.attributes, choices.encoding))
    table = _table(columns, dataset)
    dropped = [
        {"at": rows.where(i), "image": rows.given[i] or None, "reason": b.reason, "text": b.text}
        for i, b in sorted(rows.bad.items())
    ]
    report = {
        "dataset": dataset.name,
        "task": dataset.task,
        "in_domain": dataset.in_domain,
        "files": _file_reports(rows),
        "rows": total,
        "kept": len(keep),
        "images": table.num_rows,
        "dropped": dict(Counter(b.reason for b in rows.bad.values()).most_common()),
        "images_checked": folder is not None,
        "split_rule": splits.rule,
        "split_official": splits.official,
        "official_split": dataset.split.official,
        "splits": _ordered(Counter(columns["split"])),
        "published": dict(dataset.counts),
        "score": _quantiles(columns["score"]),
        "notes": notes,
    }
    return Imported(table, report, dropped)


def _split(rows: AllRows, dataset: Dataset, sources: Sources, choices: Choices) -> Splits:
    """Fill rows.split from the file's own column, else --split, else --split-list, else the set's rule."""
    if choices.split and sources.split_lists:
        raise UserError("--split and --split-list exclude each other")
    if choices.split and choices.split not in SPLITS:
        raise UserError(f"--split {choices.split}: must be one of {', '.join(SPLITS)}")
    own = [f for f in rows.files if f.format.split]
    for file in own:
        if choices.split or sources.split_lists:
            raise UserError(f"{file.file}: its column {file.format.split} says the split; leave --split and lists out")
    told = Splits([], "; ".join(sorted({f"column {f.format.split} of the file" for f in own})), True)
    if len(own) == len(rows.files):
        return told
    has = np.concatenate([np.full(len(f), f.format.split is None) for f in rows.files])
    open_rows = [int(i) for i in np.flatnonzero(has & rows.alive())]
    names = [rows.given[i] for i in open_rows]
    groups = names if dataset.split.by == "image" else [rows.group[i] for i in open_rows]
    if choices.split:
        found = Splits([choices.split] * len(names), f"all {choices.split}, by --split", None)
    elif sources.split_lists and names:
        found = by_lists(names, groups, _lists(sources, rows.files), dataset)
    else:
        found = by_rule(groups, dataset)
    rows.split = list(rows.split)
    for k, i in enumerate(open_rows):
        rows.split[i] = found.split[k]
        if k in found.bad:
            rows.bad.setdefault(i, found.bad[k])
    if own:
        found.rule, found.official = f"{told.rule}; of the other files: {found.rule}", found.official and None
    return found


def _lists(sources: Sources, files: list[ImportedScores]) -> list[SplitList]:
    columns = list(dict.fromkeys([*(f.format.image for f in files), "image"]))
    pattern = files[0].format.image_pattern
    return [read_split_list(spec, data, name, pattern, columns) for spec, name, data in sources.split_lists]


def _columns(rows: AllRows, keep: np.ndarray) -> dict[str, Any]:
    pick = keep.tolist()
    return {
        "given": [rows.given[i] for i in pick],
        "image": [rows.path[i] for i in pick],
        "score": rows.score[keep],
        "score_raw": rows.raw[keep],
        "score_std": rows.std[keep],
        "split": [rows.split[i] for i in pick],
        "rationale": [rows.rationale[i] for i in pick],
        "attributes": [rows.attributes[i] for i in pick],
        "meta": [",".join(filter(None, (rows.names[i], rows.counts[i]))) for i in pick],
    }


def _averaged(rows: AllRows, keep: np.ndarray) -> dict[str, Any]:
    """Average ratings per image, in order of first appearance; the deviation is the population's."""
    place: dict[str, int] = {}
    ids = np.array([place.setdefault(rows.path[i], len(place)) for i in keep.tolist()])
    first = keep[np.unique(ids, return_index=True)[1]]
    found = _columns(rows, first)
    raw, n = rows.raw[keep], np.bincount(ids)
    found["score_raw"] = mean = np.bincount(ids, raw) / n
    fmt = rows.files[0].format
    found["score"] = to_score(mean, fmt.range, fmt.lower_is_better)
    found["score_std"] = np.sqrt(np.bincount(ids, (raw - mean[ids]) ** 2) / n) * fmt.range.points
    values = np.unique(raw)
    table = np.zeros((len(n), len(values)), dtype=np.int64)
    np.add.at(table, (ids, np.searchsorted(values, raw)), 1)
    shape = counts_format(values)
    counts = [shape % tuple(row) for row in table.tolist()]
    found["meta"] = [",".join(filter(None, pair)) for pair in zip(found["meta"], counts, strict=True)]
    return found


def _join_attributes(columns: dict[str, Any], source: tuple[str, bytes], encoding: str | None) -> str:
    file, data = source
    found = join(read_attributes(data, file, encoding), columns["given"])
    n = sum(texts is not None for texts in found)
    if not n:
        raise UserError(f"{file}: none of its images is an image of the annotations")
    own = columns["attributes"]
    if any(texts and mine and texts != mine for texts, mine in zip(found, own, strict=True)):
        raise UserError(f"{file}: an image's attributes differ from those in the annotations: leave one of both out")
    columns["attributes"] = [texts or mine for texts, mine in zip(found, own, strict=True)]
    return f"attributes of {file} joined to {n:,} of {len(found):,} images"


def _table(columns: dict[str, Any], dataset: Dataset) -> pa.Table:
    n = len(columns["image"])
    std = columns["score_std"]
    attributes = [json.dumps(a, ensure_ascii=False) if a else None for a in columns["attributes"]]
    return pa.table(
        {
            "sample_id": [f"{dataset.name}/{name}" for name in columns["given"]],
            "dataset": pa.repeat(dataset.name, n),
            "task": pa.repeat(dataset.task, n),
            "image": columns["image"],
            "score": columns["score"],
            "score_raw": columns["score_raw"],
            "score_std": pa.array(std, mask=np.isnan(std)),
            "split": columns["split"],
            "rationale": pa.array(columns["rationale"], pa.string()),
            "attributes": pa.array(attributes, pa.string()),
            "meta": pa.array([f"{{{m}}}" if m else None for m in columns["meta"]], pa.string()),
        }
    )


def _file_reports(rows: AllRows) -> list[dict[str, Any]]:
    reports, start, alive = [], 0, rows.alive()
    for file in rows.files:
        part = slice(start, start := start + len(file))
        reports.append(
            {
                "file": file.file,
                "kind": file.kind,
                "format": file.format.name,
                "columns": list(file.format.used()),
                "source": file.format.source,
                "range": [file.format.range.low, file.format.range.high],
                "lower_is_better": file.format.lower_is_better,
                "rows": len(file),
                "raw": _quantiles(rows.raw[part][alive[part]]),
            }
        )
    return reports


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.quantile(values, QUANTILES)
    return {"n": len(values), **{f"q{q:g}": float(v) for q, v in zip(QUANTILES, found, strict=True)}}


def _ordered(counts: Counter[str]) -> dict[str, int]:
    return {name: counts[name] for name in SPLITS if counts[name]}
