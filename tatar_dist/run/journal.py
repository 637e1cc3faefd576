"""The journal of a run that asks models (rationales, evaluation): answers are durable before the next question.

A file of JSON lines beside the output, append-only, with a checksum on each line; a run reads back what a killed one
left. Concurrent slots share one fsync (group commit), so that durability costs a few milliseconds at any concurrency. A
lock on the file keeps two runs from writing one output.

    {"sum": "89abcdef", "line": {"journal": 2, "settings": {...}}}      the first line: what the run asks
    {"sum": "01234567", "line": {"sample_id": "a", "attempt": 0, "text": "...", ...}}
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tatar_dist.errors import UserError
from tatar_dist.run.files import sync

VERSION = 2
_BEGINNING = b'{"sum":"'


def encode(line: Mapping[str, Any]) -> bytes:
    """One line of the file. The checksum is the CRC-32 of the inner object as it stands in the file."""
    body = json.dumps(line, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return b'{"sum":"%08x","line":%s}\n' % (zlib.crc32(body.encode()), body.encode())


def decode(raw: bytes) -> dict[str, Any] | None:
    """The dict of one line, or None for a line that was torn or altered."""
    if not (raw.startswith(_BEGINNING) and raw.endswith(b"}\n") and raw[16:25] == b'","line":'):
        return None
    body = raw[25:-2]
    if b"%08x" % zlib.crc32(body) != raw[8:16]:
        return None
    try:
        line = json.loads(body)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            shown = f"was {before.get(key)!r}, is {now.get(key)!r}"
            return f"{key} {shown if len(shown) < 160 else 'has changed'}"
    return None


class Journal:
    """Opens (and locks) the journal; `read` hands back the lines of earlier runs. Use as a context manager.

    Raises:
        UserError: another process holds it, it is no journal, it is damaged before its end, or it was written under
            other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as e:
            raise UserError(f"{path}: cannot write there: {e.strerror}") from e
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise UserError(f"{path}: another process is writing this output") from None
        self._settings = settings
        self._pending: list[tuple[bytes, asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None
        self._writer = ThreadPoolExecutor(1, "journal")
        self._broken: OSError | None = None
        self.cut: str | None = None  # after `read`: what had to be cut from the end, for the user

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._writer.shutdown()
        os.close(self._file)

    def read(self, take: Callable[[dict[str, Any]], None]) -> int:
        """Hand every line of earlier runs to `take`, cut a torn end, write the first line if there is none.

        Returns the number of lines taken.
        """
        good = count = 0
        bad: int | None = None
        with open(self.path, "rb") as f:
            for number, raw in enumerate(f, 1):
                line = decode(raw)
                if line is None:
                    bad = bad or number
                    continue
                if bad is not None:
                    raise UserError(
                        f"{self.path}:{bad}: this line is damaged and later ones are not; delete the line to ask its "
                        "sample again"
                    )
                good += len(raw)
                if number == 1:
                    self._check_first(line)
                else:
                    take(line)
                    count += 1
        if bad is not None:
            self._cut_end(good)
        if not good:
            self.write({"journal": VERSION, "settings": dict(self._settings)})
            sync(self.path.parent)
        return count

    def _cut_end(self, good: int) -> None:
        """Cut what follows the last whole line. A kill tears one commit; whatever it tore is kept beside."""
        with open(self.path, "rb") as f:
            f.seek(good)
            rest = f.read()
        torn = rest.count(b"\n") + (not rest.endswith(b"\n"))
        if not good and (torn > 1 or rest.endswith(b"\n") or not rest.startswith(_BEGINNING[: len(rest)])):
            raise UserError(f"{self.path}: is no journal; choose another --output, or move the file away")
        self.cut = f"{self.path}: its last line was torn by a kill and is cut"
        if torn > 1 or rest.endswith(b"\n"):
            kept = self.path.with_name(f"{self.path.name}.damaged")
            with open(kept, "ab") as f:
                f.write(rest)
                os.fsync(f.fileno())
            self.cut = f"{self.path}: its last {torn} lines are damaged and cut, their samples asked again; see {kept}"
        os.ftruncate(self._file, good)

    def _check_first(self, line: Mapping[str, Any]) -> None:
        if line.get("journal") != VERSION or not isinstance(line.get("settings"), dict):
            raise UserError(f"{self.path}: not a journal of this version; move it away to begin anew")
        settings = json.loads(json.dumps(dict(self._settings)))  # as it would be read back: tuples are lists
        if difference := _difference(line["settings"], settings):
            raise UserError(
                f"{self.path}: was written under other settings ({difference}): set them back, choose another "
                "--output, or delete the journal to begin anew"
            )

    def write(self, *lines: Mapping[str, Any]) -> None:
        """Append lines and return when all are on disk. For callers outside the event loop."""
        self._commit([encode(line) for line in lines])

    async def append(self, line: Mapping[str, Any]) -> None:
        """Append one line; returns when it is on disk. Raises what writing raises, ENOSPC for example."""
        await asyncio.shield(self.hand_in(line))

    def hand_in(self, line: Mapping[str, Any]) -> asyncio.Future[None]:
        """Append one line with the next commit. What writing raises is in the future, and met by every later line."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.add_done_callback(lambda f: f.cancelled() or f.exception())  # nobody need await it
        self._pending.append((encode(line), done))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.get_running_loop().create_task(self._flush())
        return done

    async def settled(self) -> None:
        """Wait until everything handed in so far is on disk."""
        if self._flusher is not None:
            await asyncio.shield(self._flusher)

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                if self._broken is not None:
                    raise self._broken  # a line may be half written: nothing may follow it
                await loop.run_in_executor(self._writer, self._commit, [raw for raw, _ in batch])
            except OSError as e:
                self._broken = e
                for _, done in batch:
                    if not done.done():
                        done.set_exception(e)
                continue
            for _, done in batch:
                if not done.done():
                    done.set_result(None)

    def _commit(self, lines: list[bytes]) -> None:
        data = memoryview(b"".join(lines))
        while data:
            data = data[os.write(self._file, data) :]
        os.fdatasync(self._file)
