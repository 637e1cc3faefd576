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
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tatar_dist.assets import looked_in
from tatar_dist.data.imports.annotations import RawFile, read_annotations
from tatar_dist.data.imports.attributes import join, read_attributes
from tatar_dist.data.imports.folder import ImageFolder
from tatar_dist.data.imports.rows import Row, check_duplicates, check_paths, first_bad, judge, read_names, to_score
from tatar_dist.data.imports.splits import Splits, by_lists, by_rule, read_split_list
from tatar_dist.data.registry import Dataset, Format
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
    """Read, assemble, write `output` and, beside it, the dropped rows. Returns the report.

    Raises UserError as `assemble`, and for files that cannot be read or written.
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
            raise UserError(f"--output {output}: would overwrite the input {path}; name another file")
        if path.exists() and not path.is_file():  # a device would be replaced by the file
            raise UserError(f"--output {output}: {path} exists and is not a file; name another")
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
    """Build a table from bytes, without file access. `folder` None: images are not looked up.

    Raises UserError: a file is not recognised, a row is bad and `drop_bad` is False, or no row is left.
    """
    files = [read_annotations(data, name, dataset, choices.format, choices.encoding) for name, data in sources.files]
    if len({bool(f.format.worker) for f in files}) > 1:
        raise UserError("files of single ratings and files of mean scores cannot be one manifest: import each alone")
    parts = [judge(file) for file in files]
    rows = [row for part in parts for row in part]
    check_paths(rows, folder)
    read_names(rows, dataset)
    splits = _split(rows, files, dataset, sources, choices)
    check_duplicates(rows)
    kept = [row for row in rows if not row.bad]
    if not kept or (len(kept) < len(rows) and not choices.drop_bad):
        raise UserError(first_bad(rows, folder))
    images = _averaged(kept, files[0].format) if files[0].format.worker else kept
    if sources.attributes:
        splits.notes.append(_join_attributes(images, sources.attributes, choices.encoding))
    dropped = [{"at": row.at, "image": row.image or None} | row.bad._asdict() for row in rows if row.bad]
    report = {
        "dataset": dataset.name,
        "task": dataset.task,
        "in_domain": dataset.in_domain,
        "files": [_file_report(file, part) for file, part in zip(files, parts, strict=True)],
        "rows": len(rows),
        "kept": len(kept),
        "images": len(images),
        "dropped": dict(Counter(row["reason"] for row in dropped).most_common()),
        "images_checked": folder is not None,
        "split_rule": splits.rule,
        "split_official": splits.official,
        "official_split": dataset.split.official,
        "splits": {name: n for name in SPLITS if (n := sum(row.split == name for row in images))},
        "published": dict(dataset.counts),
        "score": _quantiles([row.score for row in images]),
        "notes": splits.notes,
    }
    return Imported(_table(images, dataset), report, dropped)


def _split(rows: list[Row], files: list[RawFile], dataset: Dataset, sources: Sources, choices: Choices) -> Splits:
    """Fill the rows' splits from the files' column, --split, --split-list or the set's rule."""
    if choices.split and sources.split_lists:
        raise UserError("--split and --split-list exclude each other")
    if choices.split and choices.split not in SPLITS:
        raise UserError(f"--split {choices.split}: must be one of {', '.join(SPLITS)}")
    columns = {file.format.split and file.format.split.column for file in files}
    if len(columns) > 1:
        raise UserError("files whose column says the split and other files cannot be one manifest: import each alone")
    (column,) = columns
    if column and (choices.split or sources.split_lists):
        raise UserError(f"{files[0].file}: its column {column} says the split; leave --split and lists out")
    if column:
        return Splits([], f"column {column} of the file", True)
    pending = [row for row in rows if not row.bad]
    images = [row.image for row in pending]
    groups = images if dataset.split.by == "image" else [row.group for row in pending]
    if choices.split:
        splits = Splits([choices.split] * len(images), f"all {choices.split}, by --split", None)
    elif sources.split_lists and images:
        image_columns = list(dict.fromkeys([*(file.format.image for file in files), "image"]))
        pattern = files[0].format.image_pattern
        lists = [read_split_list(*source, pattern, image_columns) for source in sources.split_lists]
        splits = by_lists(images, groups, lists, dataset)
    else:
        splits = by_rule(groups, dataset)
    for row, split in zip(pending, splits.split, strict=True):
        row.split = split
        if not split:
            row.reject("in no split list", f"image {row.image!r} is in none of the split lists")
    return splits


def _averaged(ratings: list[Row], fmt: Format) -> list[Row]:
    """Average ratings per image, in order of first appearance, with population deviation."""
    ratings_of: dict[str, list[Row]] = defaultdict(list)
    for row in ratings:
        ratings_of[row.path].append(row)
    values = sorted({row.raw for row in ratings})
    images = []
    for same in ratings_of.values():
        raw = np.array([row.raw for row in same])
        mean = raw.mean()
        counts = {f"{value:g}": int(np.sum(raw == value)) for value in values}
        images.append(
            replace(
                same[0],
                raw=float(mean),
                score=float(to_score(mean, fmt.range, fmt.lower_is_better)),
                std=float(raw.std() * fmt.range.points),
                meta=same[0].meta | {"counts": counts},
            )
        )
    return images


def _join_attributes(images: list[Row], source: tuple[str, bytes], encoding: str | None) -> str:
    """Add the texts of the file of --attributes to the rows; returns a note for the report."""
    file, data = source
    joined = join(read_attributes(data, file, encoding), [row.image for row in images])
    n = sum(texts is not None for texts in joined)
    if not n:
        raise UserError(f"{file}: none of its images is an image of the annotations")
    for row, texts in zip(images, joined, strict=True):
        if texts and row.attributes and texts != row.attributes:
            raise UserError(f"{file}: attributes of {row.image!r} differ from those in {row.at}: leave one of both out")
        row.attributes = texts or row.attributes
    return f"attributes of {file} joined to {n:,} of {len(images):,} images"


def _table(images: list[Row], dataset: Dataset) -> pa.Table:
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    return pa.table(
        {
            "sample_id": [f"{dataset.name}/{row.image}" for row in images],
            "dataset": pa.repeat(dataset.name, len(images)),
            "task": pa.repeat(dataset.task, len(images)),
            "image": [row.path for row in images],
            "score": [row.score for row in images],
            "score_raw": [row.raw for row in images],
            "score_std": pa.array([row.std for row in images], from_pandas=True),  # NaN is null
            "split": [row.split for row in images],
            "rationale": [row.rationale for row in images],
            "attributes": [encode(row.attributes) if row.attributes else None for row in images],
            "meta": [encode(row.meta) if row.meta else None for row in images],
        }
    )


def _file_report(file: RawFile, rows: list[Row]) -> dict[str, Any]:
    return {
        "file": file.file,
        "kind": file.kind,
        "format": file.format.name,
        "columns": list(file.format.used()),
        "source": file.format.source,
        "range": [file.format.range.low, file.format.range.high],
        "lower_is_better": file.format.lower_is_better,
        "rows": len(file),
        "raw": _quantiles([row.raw for row in rows if not row.bad]),
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    quantiles = np.quantile(values, QUANTILES)
    return {"n": len(values), **{f"q{q:g}": float(v) for q, v in zip(QUANTILES, quantiles, strict=True)}}
