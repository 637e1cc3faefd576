"""Check all rows and decode all images of one or more manifests: `tatar-dist data validate`.

`validate` returns a `Validation`: problems by row (streamed to `M.problems.jsonl`), statistics of the pools, and which
rows a clean manifest would keep. Memory: 1.5 KB a row and what is in flight: two batches with about 8 MiB each of
embedded images, and decoded images of as many pixels as `_Room` allows (images.MAX_PIXELS gives the cost of a pixel).

Threads, not processes: Pillow releases the GIL while it decodes, threads start at once and need no pickling. The
main thread reads the next batch while the workers decode this one.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tatar_dist.data.checks.compare import compare
from tatar_dist.data.checks.validation import (
    Checked,
    Columns,
    PoolFacts,
    Problem,
    Validation,
    ValidationRows,
    batches,
    problem_log,
    reference_of,
    row_faults,
    rows_by_pool,
    values_of,
)
from tatar_dist.data.images import MAX_PIXELS, ImageFacts, inspect_image
from tatar_dist.data.manifest import file_bytes, image_path, open_parquet
from tatar_dist.data.schema import SCHEMA
from tatar_dist.errors import UserError
from tatar_dist.run.files import probe

WORKER_PIXELS = 25_000_000  # decoded at once per worker: the image of a usual camera

Item = memoryview | Path | None  # embedded bytes, a file, or a row that names neither
Looked = tuple[ImageFacts, bytes]  # and the 16-byte hash of the encoded bytes
_Batch = tuple[int, Columns, list["Future[Looked]"]]  # first row among all, light columns, image of each row


def validate(
    paths: Sequence[Path],
    output: Path | None = None,
    workers: int | None = None,
    watch: Callable[[int, int], None] = lambda done, total: None,
    images: Path | None = None,
    near: bool = True,
) -> Validation:
    """Check all rows and images; writes `M.problems.jsonl` beside each manifest, or in `output`.

    workers: decoding threads, by default one per core this process may use. watch(done, total): called as rows pass.
    images: base of image paths, instead of those stored in the manifests. near: look for near-duplicates across splits.
    Raises UserError for files that are not manifests, two of one name, or reports that cannot be written.
    """
    opened = [(p, *open_parquet(p, images)) for p in map(Path, paths)]
    names = Counter((output or p.parent, p.stem) for p, *_ in opened)
    if clash := [stem for (_, stem), n in names.items() if n > 1]:
        raise UserError(f"{clash[0]}: given twice, or two manifests of this name would write the same report")
    workers = workers or len(os.sched_getaffinity(0))
    total = sum(file.metadata.num_rows for _, file, *_ in opened)
    rows, checked = ValidationRows.of(total), []
    with ExitStack() as stack:
        first = 0
        for path, file, _, root in opened:
            for suffix in ("validate.md", "validate.png"):  # fail before hours of decoding
                probe((output or path.parent) / f"{path.stem}.{suffix}")
            log = stack.enter_context(problem_log((output or path.parent) / f"{path.stem}.problems.jsonl"))
            checked.append(Checked(path, root, file.metadata.num_rows, first, log))
            first += file.metadata.num_rows
        watch(0, total)
        room = _Room(max(MAX_PIXELS, workers * WORKER_PIXELS))
        pool = ThreadPoolExecutor(workers, "decode")
        stack.callback(pool.shutdown, cancel_futures=True)  # after an error or Ctrl-C, only what is being decoded ends
        for manifest, (path, file, *_) in zip(checked, opened, strict=True):
            submitted = _submitted(manifest, file, rows, lambda item: pool.submit(look_at, item, room.taken))
            try:
                with file:
                    for batch, _ in pairwise(chain(submitted, [None])):  # the workers have the next batch already
                        assert batch is not None
                        _record(manifest, rows, batch, lambda done: watch(done, total))
            except (pa.ArrowException, OSError) as e:
                raise UserError(f"{path}: damaged Parquet file: {str(e).splitlines()[0]}") from None
        for manifest in checked:
            for facts in manifest.pools.values():
                for code, message in facts.suspicions():
                    manifest.log.add(Problem(None, None, code, f"{facts.name}: {message}"))
        return compare(checked, rows, (lambda: watch(total, total)) if near else None)


class _Room:
    """Limit of pixels decoded at once: large images wait for each other, others only for these."""

    def __init__(self, pixels: int) -> None:
        self._free, self._changed = pixels, threading.Condition()

    @contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        """Wait until there is room. A large image waits at most for all small ones of two batches."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


def look_at(item: Item, room: Callable[[int], AbstractContextManager[None]] = lambda pixels: nullcontext()) -> Looked:
    """Read, hash, decode an image; the hash is empty without bytes. `room`: see inspect_image."""
    if item is None:
        return ImageFacts(problem="no-image"), b""  # reported by row_faults
    try:
        data = file_bytes(item) if isinstance(item, Path) else item
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        return ImageFacts(problem="missing", message=f"{item}: {getattr(e, 'strerror', None) or e}"), b""
    facts = inspect_image(data, room)
    if not facts.problem and "extreme-aspect" in facts.notes:
        message = f"{facts.width} x {facts.height} pixels: longer than 200 times its shorter side"
        facts = replace(facts, problem="extreme-aspect", message=message)
    return facts, hashlib.blake2b(data, digest_size=16).digest()


def _submitted(
    manifest: Checked, file: pq.ParquetFile, rows: ValidationRows, submit: Callable[[Item], Future[Looked]]
) -> Iterator[_Batch]:
    """Check the light columns of each batch and submit its images to the workers."""
    start = manifest.first
    for table in batches(file, SCHEMA.names):
        embedded = table.column("image_bytes").combine_chunks()
        values = {n: values_of(table.column(n)) for n in SCHEMA.names if n != "image_bytes"}
        columns: Columns = {n: texts for n, (texts, _) in values.items()}
        columns["image_bytes"] = embedded.is_valid().to_pylist()
        for i in values["image"][1]:
            columns["image"][i] = None  # not a file name; reported as bad-text
        items: list[Item] = [
            memoryview(embedded[i].as_buffer()) if there else image_path(manifest.root, name) if name else None
            for i, (there, name) in enumerate(zip(columns["image_bytes"], columns["image"], strict=True))
        ]
        futures = [submit(item) for item in items]
        manifest.files += sum(isinstance(item, Path) for item in items)
        not_text = (
            (i, "bad-text", f"column {n}: {texts[i]!r} is not UTF-8") for n, (texts, bad) in values.items() for i in bad
        )
        for i, code, message in chain(not_text, row_faults(columns, manifest.root)):
            manifest.log.add(Problem(start - manifest.first + i, columns["sample_id"][i], code, message))
            rows.unusable[start + i] = True
        _note_rows(manifest, rows, start, columns)
        yield start, columns, futures
        start += len(table)


def _note_rows(manifest: Checked, rows: ValidationRows, start: int, columns: Columns) -> None:
    """Store hashes of ids and references, and update the statistics of the pools in a batch."""
    manifest.ids.add(columns["sample_id"])
    for i, meta in enumerate(columns["meta"]):
        if reference := reference_of(meta):
            rows.reference[start + i] = hash((columns["dataset"][i], reference)) or 1
    for key, positions in rows_by_pool(columns).items():
        if key not in rows.pools:
            rows.pools.append(key)
        code = rows.pools.index(key)
        rows.pool[start + np.array(positions)] = code
        dataset, task, split = map(str, key)  # a key may hold None
        manifest.pools.setdefault(code, PoolFacts(dataset, task, split)).add(columns, positions)


def _record(manifest: Checked, rows: ValidationRows, batch: _Batch, watch: Callable[[int], None]) -> None:
    """Wait for the images of a batch and record the results."""
    start, columns, futures = batch
    for row, (future, sample) in enumerate(zip(futures, columns["sample_id"], strict=True), start):
        facts, digest = future.result()
        if facts.problem is None:
            rows.picture[row] = np.frombuffer(digest, np.uint64)
            rows.thumbnail[row] = np.frombuffer(facts.thumbnail, np.uint8)
        else:
            rows.unusable[row] = True
            if facts.problem != "no-image":
                manifest.log.add(Problem(row - manifest.first, sample, facts.problem, facts.message))
        manifest.absent += facts.problem == "missing" and not digest
        manifest.notes.update(facts.notes)
        manifest.formats.update([facts.format] if facts.format else [])
        watch(row + 1)
