"""Import a data set's annotation files as one manifest: `tatar-dist data import`.

Scores are mapped to 0-100 by the declared range, never by their values. Writes a Parquet manifest and, if rows were
dropped, `M.dropped.jsonl` with a reason for each; returns the report that `--json` prints. `assemble` parses, checks
and splits; this module reads and writes files. An error before the manifest is written leaves nothing behind.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from tatar_dist.assets import looked_in
from tatar_dist.data.imports.assemble import Choices, Sources, assemble
from tatar_dist.data.imports.folder import ImageFolder
from tatar_dist.data.registry import Dataset
from tatar_dist.data.writing import write_manifest, write_table
from tatar_dist.errors import UserError
from tatar_dist.run.files import probe, write_whole, writing
from tatar_dist.types import SPLITS

EMBED_ROWS = 64  # rows whose image bytes are in memory at once, on the way to the writer


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
