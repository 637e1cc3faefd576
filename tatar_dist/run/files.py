"""Write files whole or not at all, and read JSON lines that a crash may have cut off.

`written_whole` yields a path beside the target and renames it at the end, `write_whole` does so with data in memory;
both let an OSError pass. `writing` around them turns it into a `UserError`, `probe` raises one before the work, and
`sync` makes a file durable.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tatar_dist.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that says that `path` cannot be written, and why."""
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
    """Return where a file is written before it is renamed to `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which is renamed to `path` when the block ends without an error."""
    place = beside(path)
    try:
        yield place
        os.replace(place, path)
    finally:
        place.unlink(missing_ok=True)


def write_whole(path: Path, data: str | bytes) -> None:
    """Write `data` to `path`, text as UTF-8."""
    with written_whole(path) as place:
        place.write_bytes(data.encode() if isinstance(data, str) else data)


def sync(path: Path) -> None:
    """fsync a file or directory, so that a rename never names data that a power cut can still lose."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(file: IO[str] | int, shared: bool = False) -> bool:
    """Lock an open file until it is closed, without waiting; return False if another process holds the lock."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def json_lines(
    file: Path, damaged: Callable[[int], None] | None = None, tail: int | None = None
) -> list[dict[str, Any]]:
    """Read the JSON objects of `file`, one a line; none where there is no file.

    Lines that hold something else are left out.

    Args:
        damaged: called with the number of each line that is not JSON, but not for the last: a crash may cut it off.
        tail: read only so many bytes, at the end of the file.
    """
    if not file.exists():
        return []
    with open(file, "rb") as f:
        if tail is not None:
            f.seek(max(0, f.seek(0, 2) - tail))
        lines = f.read().decode(errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if damaged and number < len(lines):
                damaged(number)
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
