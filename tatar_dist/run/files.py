"""Write files whole or not at all, sync, hash, lock; read JSON lines that a crash may cut.

`written_whole` yields a path beside the target and renames it at the end, `write_whole` does so with data in memory;
both let an OSError pass. `writing` around them turns it into a `UserError`, `probe` raises one before the work.
`write_files` writes the files of a checkpoint (or an export), whose hashes `first_damage` compares.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tatar_dist.errors import UserError

Files = dict[str, dict[str, Any]]  # as in state.json: {"model/config.json": {"bytes": …, "sha256": …}}
Job = tuple[str, Callable[[Path], None]]  # path below the checkpoint, what writes that file or directory

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_IN_WORDS = re.compile(r"no space left|disk quota exceeded|file too large|\bcode: (27|28|122)\b", re.IGNORECASE)
NEARLY_FULL = 1 << 20  # bytes free under which any failed write is put down to the disk


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that says that `path` cannot be written, and why."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {os.strerror(e.errno) if e.errno else e}") from None


def probe(path: Path) -> None:
    """Raise UserError if no file can be written at `path`, before hours of work. Leaves none."""
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
    """Yield a path to write to, which is renamed to `path` when the block ends without an error.

    An OSError of the written file names `path`: pyarrow's name no file.
    """
    place = beside(path)
    try:
        yield place
        os.replace(place, path)
    except OSError as e:
        if e.filename in (None, str(place), place):
            e.filename = str(path)
        raise
    finally:
        place.unlink(missing_ok=True)


def write_whole(path: Path, data: str | bytes) -> None:
    """Write `data` to `path`, text as UTF-8."""
    with written_whole(path) as place:
        place.write_bytes(data.encode() if isinstance(data, str) else data)


def sync(path: Path) -> None:
    """fsync a file or directory, so that a rename never names data a power cut can still lose."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(file: IO[str] | int, shared: bool = False) -> bool:
    """Lock an open file until it is closed; return False at once if another process holds it."""
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
        damaged: called with the number of each line that is not JSON, but not for the last without its end, which a
            crash cuts off, after others.
        tail: read only so many bytes, at the end of the file.
    """
    if not file.exists():
        return []
    with open(file, "rb") as f:
        if tail is not None:
            f.seek(max(0, f.seek(0, 2) - tail))
        text = f.read().decode(errors="replace")
    lines = text.splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if damaged and (number < len(lines) or not rows or text.endswith("\n")):
                damaged(number)
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def write_files(directory: Path, jobs: Iterable[Job]) -> Files:
    """Run the jobs below an existing `directory`, sync and hash; return size and hash by path.

    Raises:
        OSError: ENOSPC or EDQUOT for a full disk, whatever a library raised; FileNotFoundError if `directory` is gone
            or lies on a file system that this machine does not share.
    """
    files: Files = {}
    try:
        for name, job in jobs:
            path = directory / name
            path.parent.mkdir(exist_ok=True)  # no parents: a directory that was given up must not come back
            job(path)
            paths = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            files |= {p.relative_to(directory).as_posix(): seal(p) for p in paths}
    except Exception as e:
        if code := _full(e, directory):
            raise OSError(code, os.strerror(code), str(directory)) from e
        raise
    return files


def seal(path: Path) -> dict[str, Any]:
    """Sync a file and return its size and hash."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def first_damage(directory: Path, files: Files, hashes: bool) -> str | None:
    """Describe the first file that is not as written, or return None; `hashes`: compare all."""
    for name, written in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != written["bytes"]:
            return f"{name} has {size} bytes instead of {written['bytes']}"
    if not hashes:
        return None
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda name: sha256(directory / name), files)
        changed = [name for name, digest in zip(files, sums, strict=True) if digest != files[name]["sha256"]]
    return f"{changed[0]} has another sha256" if changed else None


def _full(error: BaseException, directory: Path) -> int | None:
    """Return ENOSPC or EDQUOT if `error` comes from a full disk."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in FULL:
            return chain.errno
        if FULL_IN_WORDS.search(str(chain)):
            return errno.ENOSPC
        chain = chain.__cause__ or chain.__context__
    return errno.ENOSPC if directory.is_dir() and shutil.disk_usage(directory).free < NEARLY_FULL else None
