"""Journal the answers of a run that asks models (rationales, evaluation), to resume it.

An append-only file of JSON lines beside the output, each with a checksum. An answer is on disk before its slot asks
again. Concurrent slots share one fsync (group commit). A lock on the file keeps two runs from writing one output.

    {"sum": "89abcdef", "line": {"journal": 2, "settings": {...}}}      the first line: what the run asks
    {"sum": "01234567", "line": {"sample_id": "a", "attempt": 0, "text": "...", ...}}
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from tatar_dist.errors import UserError
from tatar_dist.run.files import lock, sync

VERSION = 2
_BEGINNING = b'{"sum":"'
_LINE = re.compile(rb'\{"sum":"([0-9a-f]{8})","line":(\{.*\})\}\n')


def encode(line: Mapping[str, Any]) -> bytes:
    """Return one line of the file, with the CRC-32 of the inner object as it stands there."""
    body = json.dumps(line, allow_nan=False, separators=(",", ":")).encode()
    return b'{"sum":"%08x","line":%s}\n' % (zlib.crc32(body), body)


def decode(raw: bytes) -> dict[str, Any] | None:
    """Return the inner object of one line, or None for a line that was torn or altered."""
    line = _LINE.fullmatch(raw)
    if line is None or int(line[1], 16) != zlib.crc32(line[2]):
        return None
    content: dict[str, Any] = json.loads(line[2])
    return content


class Journal:
    """Open and lock the journal; `read` hands back lines of earlier runs. A context manager.

    Attributes:
        cut: after `read`, a message about damaged lines that were cut from the end, or None.

    Raises:
        UserError: another process holds it, it is no journal, it is damaged before its end, or it was written under
            other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self._settings = path, dict(settings)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as e:
            raise UserError(f"{path}: cannot write there: {e.strerror}") from e
        if not lock(self._file):
            os.close(self._file)
            raise UserError(f"{path}: another process is writing this output")
        self.cut: str | None = None
        self._pending: list[bytes] = []
        self._committing = asyncio.Lock()
        self._writer = ThreadPoolExecutor(1, "journal")
        self._broken: OSError | None = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._writer.shutdown()
        os.close(self._file)

    def read(self, take: Callable[[dict[str, Any]], None]) -> None:
        """Hand every line of earlier runs to `take`, cut a torn end, write a missing first line."""
        good = 0  # bytes up to the end of the last intact line
        bad: int | None = None
        with open(self.path, "rb") as f:
            for number, raw in enumerate(f, 1):
                line = decode(raw)
                if line is None:
                    bad = bad or number
                elif bad is not None:
                    raise UserError(
                        f"{self.path}:{bad}: this line is damaged and later ones are not; delete the line to ask its "
                        "sample again"
                    )
                else:
                    good += len(raw)
                    if number == 1:
                        self._check_first(line)
                    else:
                        take(line)
        if bad is not None:
            self._cut_end(good)
        if not good:
            self.write({"journal": VERSION, "settings": self._settings})
            sync(self.path.parent)

    def _cut_end(self, good: int) -> None:
        """Cut what follows the last intact line; if that is more than a partial line, save it first."""
        with open(self.path, "rb") as f:
            f.seek(good)
            rest = f.read()
        if not good and (b"\n" in rest or not rest.startswith(_BEGINNING[: len(rest)])):
            raise UserError(f"{self.path}: not a journal; choose another --output, or move the file away")
        self.cut = f"{self.path}: its last line was torn by a kill and is cut"
        if b"\n" in rest:
            kept = self.path.with_name(f"{self.path.name}.damaged")
            with open(kept, "ab") as f:
                f.write(rest)
            sync(kept)
            torn = len(rest.splitlines())
            self.cut = f"{self.path}: its last {torn} lines are damaged and cut, their samples asked again; see {kept}"
        os.ftruncate(self._file, good)

    def _check_first(self, line: Mapping[str, Any]) -> None:
        if line.get("journal") != VERSION:
            raise UserError(f"{self.path}: not a journal of this version; move it away to begin anew")
        before, now = line["settings"], json.loads(json.dumps(self._settings))  # as read back: tuples are lists
        for key in sorted({*before, *now}):
            if before.get(key) != now.get(key):
                change = f"was {before.get(key)!r}, is {now.get(key)!r}"
                raise UserError(
                    f"{self.path}: was written under other settings ({key} "
                    f"{change if len(change) < 160 else 'has changed'}): set them back, choose another --output, or "
                    "delete the journal to begin anew"
                )

    def write(self, *lines: Mapping[str, Any]) -> None:
        """Append lines and return when all are on disk. For callers outside the event loop."""
        self._commit([encode(line) for line in lines])

    async def append(self, line: Mapping[str, Any]) -> None:
        """Append one line; returns when it is on disk. Raises what writing raises, such as ENOSPC."""
        await asyncio.shield(self.hand_in(line))

    def hand_in(self, line: Mapping[str, Any]) -> asyncio.Task[None]:
        """Append one line with the next commit. The task raises what writing raises, awaited or not."""
        self._pending.append(encode(line))
        task = asyncio.get_running_loop().create_task(self._flush())
        task.add_done_callback(lambda t: t.cancelled() or t.exception())
        return task

    async def settled(self) -> None:
        """Wait until everything handed in so far is on disk, or writing has failed."""
        with suppress(OSError):
            await self._flush()

    async def _flush(self) -> None:
        """Commit all pending lines, one call at a time; an earlier call may have taken them all."""
        async with self._committing:
            lines, self._pending = self._pending, []
            if lines or self._broken:
                await asyncio.get_running_loop().run_in_executor(self._writer, self._commit, lines)

    def _commit(self, lines: list[bytes]) -> None:
        if self._broken is not None:
            raise self._broken  # a line may be half written: nothing may follow it
        try:
            data = memoryview(b"".join(lines))
            while data:
                data = data[os.write(self._file, data) :]
            os.fdatasync(self._file)
        except OSError as e:
            e.filename, self._broken = str(self.path), e
            raise
