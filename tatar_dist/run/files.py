"""Files that appear whole or not at all. One that cannot be written is a `UserError`, before the work if possible.

In: a path. Out: `written_whole` gives a place beside it and renames at the end; `probe` only asks;
`sync` makes what was written last.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tatar_dist.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, an OSError becomes a UserError that says that `path` cannot be written, and why."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror or e}") from None


def probe(path: Path) -> None:
    """Raise UserError if a file at `path` could not be written: for outputs of hours of work. Leaves nothing behind."""
    with writing(path):
        if path.is_dir():
            raise UserError(f"{path}: cannot be written: is a directory")
        existing = next(p for p in path.absolute().parents if p.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass


def beside(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`; its directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """The place to write to; renamed to `path` when the block ends well. Raises UserError when it cannot be written."""
    with writing(path):
        place = beside(path)
        try:
            yield place
            os.replace(place, path)
        finally:
            place.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """fsync a file or directory, so that a rename never names data that a power cut can still lose."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
