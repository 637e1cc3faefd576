"""Import a data set's annotation files as one manifest: `tatar-dist data import`.

Scores are mapped to 0-100 by the declared range, never by their values. `run_import` reads the files and writes a
Parquet manifest and, if rows were dropped, `M.dropped.jsonl` with a reason for each; an error before the manifest is
written leaves nothing behind. `assemble` makes the table from the files' bytes: it checks and splits the rows and
averages single ratings. A bad row is an error that names FILE:LINE and counts the others; with `drop_bad` it is dropped
with its reason. rows = kept + dropped, always.
"""

from __future__ import annotations

import gc
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tatar_dist.assets import looked_in
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
from tatar_dist.data.writing import write_manifest, write_table
from tatar_dist.errors import UserError
from tatar_dist.run.files import probe, write_whole, writing
from tatar_dist.types import SPLITS

EMBED_ROWS = 64  # rows whose image bytes are in memory at once, on the way to the writer
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


def run_import(
    dataset: Dataset,
    annotations: Sequence[Path],
    images: Path,
    output: Path,
    choices: Choices,
    split_lists: Sequence[str] = (),
    attributes: Path | None = None,
    check_images: bool = True,
    embed: bool = False,
) -> dict[str, Any]:
    """Read, assemble, write `output` and, beside it, the list of dropped rows. Returns the report.

    Raises:
        UserError: as `assemble`, and for files that cannot be read or written.
    """
    if embed and not check_images:
        raise UserError("--embed reads the images: leave --no-check-images out")
    probe(output)
    dropped_file = output.with_suffix(".dropped.jsonl")
    probe(dropped_file)
    lists = []
    for spec in split_lists:
        split, equals, name = spec.partition("=")
        if split not in SPLITS or not equals:
            raise UserError(f"--split-list {spec}: must be SPLIT=FILE with SPLIT one of {', '.join(SPLITS)}")
        lists.append((split, Path(name)))
    inputs = {os.path.realpath(p) for p in (*annotations, *(p for _, p in lists), *filter(None, [attributes]))}
    for path in (output, dropped_file):
        if os.path.realpath(path) in inputs:
            raise UserError(f"--output {output}: would overwrite {path}, which is read; name another file")
        if path.exists() and not path.is_file():  # a device would be replaced by the file
            raise UserError(f"--output {output}: {path} is there and no file; name another")
    sources = Sources(
        files=tuple((str(path), _read(path, "--annotations")) for path in annotations),
        split_lists=tuple((split, str(path), _read(path, "--split-list")) for split, path in lists),
        attributes=(str(attributes), _read(attributes, "--attributes")) if attributes else None,
    )
    folder = ImageFolder(images) if check_images else None
    gc.disable()  # millions of small objects without cycles: walking them took AVA 1.4 of 5.1 s
    try:
        imported = assemble(sources, dataset, choices, folder)
    finally:
        gc.enable()
    root = Path(os.path.abspath(images))
    with writing(output):
        if embed:
            write_manifest(output, _with_bytes(imported.table, root), image_root=root)
        else:
            write_table(output, imported.table, image_root=root)
        if imported.dropped:
            write_whole(dropped_file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in imported.dropped))
        else:  # the list of an earlier import would mislead
            dropped_file.unlink(missing_ok=True)
    paths = {"manifest": str(output), "dropped_file": str(dropped_file) if imported.dropped else None}
    return paths | {"embedded": embed} | imported.report


def _read(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        where = looked_in(path) if isinstance(e, FileNotFoundError) else ""
        raise UserError(f"{option} {path}: cannot read it: {e.strerror or e}{where}") from None


def _with_bytes(table: pa.Table, root: Path) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=EMBED_ROWS):
        for row in batch.to_pylist():
            try:
                yield row | {"image_bytes": (root / row["image"]).read_bytes()}
            except OSError as e:
                raise UserError(f"image {row['image']!r}: cannot read it: {e.strerror or e}") from None


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
