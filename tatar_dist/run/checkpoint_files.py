"""Write, sync, hash and check the files of a checkpoint; no torch, no Ray."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tatar_dist.run.files import sync

Files = dict[str, dict[str, Any]]  # as in state.json: {"model/config.json": {"bytes": …, "sha256": …}}
Job = tuple[str, Callable[[Path], None]]  # path below the checkpoint, what writes that file or directory

FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_IN_WORDS = re.compile(r"no space left|disk quota exceeded|\bcode: (28|122)\b", re.IGNORECASE)  # torch, safetensors
NEARLY_FULL = 1 << 20  # bytes free under which any failed write is put down to the disk


def write(directory: Path, jobs: Iterable[Job]) -> Files:
    """Run the jobs below an existing `directory`, sync and hash what each wrote; return size and hash by path.

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
    """Describe the first file that is not as it was written, or return None; `hashes`: read and compare all."""
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
