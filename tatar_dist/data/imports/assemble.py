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
    ImportRows,
    check_duplicates,
    check_paths,
    concatenate,
    first_bad,
    read_names,
)
from tatar_dist.data.imports.scores import counts_by_value, judge, to_score
from tatar_dist.data.imports.splits import Splits, by_lists, by_rule, read_split_list
from tatar_dist.data.registry import Dataset
from tatar_dist.errors import UserError
from tatar_dist.types import SPLITS

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class Sources:
    """Files to import, as bytes with the names that messages use."""

    files: tuple[tuple[str, bytes], ...]
    split_lists: tuple[tuple[str, str, bytes], ...] = ()  # ("test", "F", bytes)
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
    files = [read_annotations(data, name, dataset, choices.format, choices.encoding) for name, data in sources.files]
    if len({bool(f.format.worker) for f in files}) > 1:
        raise UserError("files of single ratings and files of mean scores cannot be one manifest: import each alone")
    rows = concatenate([judge(file) for file in files])
    check_paths(rows, folder)
    read_names(rows, dataset)
    splits = _split(rows, dataset, sources, choices)
    check_duplicates(rows)
    total = len(rows)
    if rows.bad and not choices.drop_bad:
        raise UserError(first_bad(rows, folder))
    if len(rows.bad) == total:
        raise UserError(f"{first_bad(rows, folder, hint=False)}; none of the {total:,} rows is left")
    keep = np.flatnonzero(rows.alive())
    ratings = bool(files[0].format.worker)
    columns = _averaged(rows, keep) if ratings else _columns(rows, keep)
    notes = splits.notes
    if sources.attributes:
        notes.append(_join_attributes(columns, sources.attributes, choices.encoding))
    table = _table(columns, dataset)
    dropped = [
        {"at": rows.at[i], "image": rows.image[i] or None} | bad._asdict() for i, bad in sorted(rows.bad.items())
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
        "splits": {name: n for name in SPLITS if (n := columns["split"].count(name))},
        "published": dict(dataset.counts),
        "score": _quantiles(columns["score"]),
        "notes": notes,
    }
    return Imported(table, report, dropped)


def _split(rows: ImportRows, dataset: Dataset, sources: Sources, choices: Choices) -> Splits:
    """Fill rows.split from the file's own column, else --split, else --split-list, else the set's rule."""
    if choices.split and sources.split_lists:
        raise UserError("--split and --split-list exclude each other")
    if choices.split and choices.split not in SPLITS:
        raise UserError(f"--split {choices.split}: must be one of {', '.join(SPLITS)}")
    column = rows.files[0].format.split
    if any(f.format.split != column for f in rows.files):
        raise UserError("files whose column says the split and other files cannot be one manifest: import each alone")
    if column and (choices.split or sources.split_lists):
        raise UserError(f"{rows.files[0].file}: its column {column} says the split; leave --split and lists out")
    if column:
        return Splits([], f"column {column} of the file", True)
    pending = np.flatnonzero(rows.alive()).tolist()
    images = [rows.image[i] for i in pending]
    groups = images if dataset.split.by == "image" else [rows.group[i] for i in pending]
    if choices.split:
        splits = Splits([choices.split] * len(images), f"all {choices.split}, by --split", None)
    elif sources.split_lists and images:
        image_columns = list(dict.fromkeys([*(f.format.image for f in rows.files), "image"]))
        pattern = rows.files[0].format.image_pattern
        lists = [read_split_list(*source, pattern, image_columns) for source in sources.split_lists]
        splits = by_lists(images, groups, lists, dataset)
    else:
        splits = by_rule(groups, dataset)
    for i, split in zip(pending, splits.split, strict=True):
        rows.split[i] = split
        if not split:
            rows.reject(i, "in no split list", f"image {rows.image[i]!r} is in none of the split lists")
    return splits


def _columns(rows: ImportRows, keep: np.ndarray) -> dict[str, Any]:
    columns: dict[str, Any] = {"score": rows.score[keep], "score_raw": rows.raw[keep], "score_std": rows.std[keep]}
    for name in ("image", "path", "split", "rationale", "attributes", "meta"):
        values = getattr(rows, name)
        columns[name] = [values[i] for i in keep.tolist()]
    return columns


def _averaged(rows: ImportRows, keep: np.ndarray) -> dict[str, Any]:
    """Average ratings per image, in order of first appearance; the deviation is the population's."""
    place: dict[str, int] = {}
    ids = np.array([place.setdefault(rows.path[i], len(place)) for i in keep.tolist()])
    columns = _columns(rows, keep[np.unique(ids, return_index=True)[1]])
    raw, n = rows.raw[keep], np.bincount(ids)
    mean = np.bincount(ids, raw) / n
    fmt = rows.files[0].format
    columns["score_raw"] = mean
    columns["score"] = to_score(mean, fmt.range, fmt.lower_is_better)
    columns["score_std"] = np.sqrt(np.bincount(ids, (raw - mean[ids]) ** 2) / n) * fmt.range.points
    values = np.unique(raw)
    counts = np.zeros((len(n), len(values)), dtype=np.int64)
    np.add.at(counts, (ids, np.searchsorted(values, raw)), 1)
    counted = counts_by_value(values, counts)
    columns["meta"] = [meta | {"counts": c} for meta, c in zip(columns["meta"], counted, strict=True)]
    return columns


def _join_attributes(columns: dict[str, Any], source: tuple[str, bytes], encoding: str | None) -> str:
    """Add the texts of the file of --attributes to the rows; returns a note for the report."""
    file, data = source
    joined = join(read_attributes(data, file, encoding), columns["image"])
    n = sum(texts is not None for texts in joined)
    if not n:
        raise UserError(f"{file}: none of its images is an image of the annotations")
    pairs = list(zip(joined, columns["attributes"], strict=True))
    if any(texts and annotated and texts != annotated for texts, annotated in pairs):
        raise UserError(f"{file}: an image's attributes differ from those in the annotations: leave one of both out")
    columns["attributes"] = [texts or annotated for texts, annotated in pairs]
    return f"attributes of {file} joined to {n:,} of {len(joined):,} images"


def _table(columns: dict[str, Any], dataset: Dataset) -> pa.Table:
    n = len(columns["image"])
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    objects = {name: [encode(value) if value else None for value in columns[name]] for name in ("attributes", "meta")}
    return pa.table(
        {
            "sample_id": [f"{dataset.name}/{name}" for name in columns["image"]],
            "dataset": pa.repeat(dataset.name, n),
            "task": pa.repeat(dataset.task, n),
            "image": columns["path"],
            "score": columns["score"],
            "score_raw": columns["score_raw"],
            "score_std": pa.array(columns["score_std"], from_pandas=True),  # NaN is null
            "split": columns["split"],
            "rationale": columns["rationale"],
            **objects,
        }
    )


def _file_reports(rows: ImportRows) -> list[dict[str, Any]]:
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
    quantiles = np.quantile(values, QUANTILES)
    return {"n": len(values), **{f"q{q:g}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)}}
