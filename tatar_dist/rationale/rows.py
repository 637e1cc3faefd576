"""Rows of a manifest as questions need them, streamed in order; images and whole rows one at a time.

In: a manifest. Out: `Row`s without images in bounded memory, a fingerprint of all of them, single rows for asking and
writing. A Parquet file is not safe to share between threads: whoever reads here is one thread at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq

from tatar_dist.data.manifest import Manifest, read_manifest
from tatar_dist.errors import UserError
from tatar_dist.rationale.questions import Row
from tatar_dist.records import Sample, Task

_COLUMNS = ("sample_id", "dataset", "task", "score", "rationale", "attributes")


def _attributes(text: str | None, path: Path, number: int) -> dict[str, str]:
    if not text:
        return {}
    try:
        found = json.loads(text)
    except ValueError as e:
        raise UserError(f"{path}: row {number}, column attributes: not JSON: {e}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: row {number}, column attributes: must be a JSON object")
    return {name: value for name, value in found.items() if isinstance(value, str)}


class Rows:
    """The first `limit` rows of a manifest (None = all)."""

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self.manifest: Manifest = read_manifest(path)  # checks ids, tasks and scores
        self.path, self.count = path, min(len(self.manifest), limit or len(self.manifest))
        if not self.count:
            raise UserError(f"{path}: holds no rows")
        # of all rows, whatever the limit: a journal is continued under a larger one
        self.tasks: set[Task] = {cast(Task, pool.task) for pool in self.manifest.pools}

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Row]:
        """The rows in order, without images."""
        return islice(self._all(), self.count)

    def _all(self) -> Iterator[Row]:
        number = 0
        with pq.ParquetFile(self.path) as file:
            present = [name for name in _COLUMNS if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=4096, columns=present):
                for values in batch.to_pylist():
                    yield Row(
                        number,
                        values["sample_id"],
                        values["dataset"],
                        values["task"],
                        float(values["score"]),
                        values.get("rationale"),
                        _attributes(values.get("attributes"), self.path, number),
                    )
                    number += 1

    def fingerprint(self, rationales: bool) -> str:
        """Hash of what is asked about every row of the manifest, images apart; a journal belongs to one."""
        digest = hashlib.blake2b(digest_size=12)
        for row in self._all():
            text = row.rationale if rationales else None
            digest.update(json.dumps([row.sample_id, row.task, row.score, row.attributes, text]).encode() + b"\n")
        return digest.hexdigest()

    @property
    def image_root(self) -> Path:
        """Where the manifest's image paths start; the output stays with it, wherever it lies."""
        return self.manifest.image_root

    @staticmethod
    def row_of(values: dict[str, Any], number: int) -> Row:
        """A question's row from all columns of a manifest's row."""
        texts = {name: value for name, value in values["attributes"].items() if isinstance(value, str)}
        ids = (values["sample_id"], values["dataset"], values["task"])
        return Row(number, *ids, float(values["score"]), values["rationale"], texts)

    def get(self, number: int) -> tuple[Row, Sample]:
        """One row with its encoded image. Raises UnreadableImage when the image file cannot be read."""
        values = self.manifest.row(number)  # once: reading a row costs more than the rest
        row = self.row_of(values, number)
        image = self.manifest.image(values, number)
        return row, Sample(row.sample_id, row.dataset, row.task, image, row.score, row.rationale, values["split"])
