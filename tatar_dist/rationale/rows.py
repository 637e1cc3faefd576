"""Read a manifest for questions, and prepare its images for an endpoint.

Rows are streamed in order without their images; whole rows are read one at a time, from one thread, because a Parquet
file must not be shared between threads. `Asker` is the base of asking.py and local.py.
"""

from __future__ import annotations

import base64
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from PIL import Image

from tatar_dist.data.images import decode_image
from tatar_dist.data.manifest import Manifest, read_manifest
from tatar_dist.data.schema import json_object
from tatar_dist.errors import UserError
from tatar_dist.rationale.checks import Reason
from tatar_dist.rationale.ledger import Ledger, LedgerEntry
from tatar_dist.rationale.questions import QuestionRow
from tatar_dist.run.journal import Journal
from tatar_dist.types import Sample, Task

_COLUMNS = ("sample_id", "dataset", "task", "score", "split", "rationale", "attributes")
IMAGES_TRIED = 16  # images that a run reads before it gives up a manifest of which none can be read
SENT_AS_IS = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}
MAX_BYTES = 8 << 20  # larger files are encoded anew: endpoints refuse bodies of tens of MB
JPEG_QUALITY = 92  # higher than what any teacher can tell apart, and no visible blocks of our own
PATCH = 28  # Qwen-VL's image token covers 28 x 28 pixels; other models count fewer tokens for the same image


class RationaleRows:
    """Rows of a manifest for a run: the first `limit` (None: all) of the `splits` (empty: all).

    Args:
        image_root: base directory of image paths, overriding the manifest's.
        written: keep only rows that have a rationale.

    Raises UserError if no row is left.
    """

    def __init__(
        self,
        path: Path,
        splits: Sequence[str] = (),
        limit: int | None = None,
        image_root: str | None = None,
        written: bool = False,
    ) -> None:
        self.manifest: Manifest = read_manifest(path, image_root)  # checks ids, tasks and scores
        self.path, self.splits, self.limit, self.written = path, tuple(splits), limit, written
        pools = [pool for pool in self.manifest.pools if not splits or pool.split in splits]
        if not pools:
            present = ", ".join(sorted({str(pool.split) for pool in self.manifest.pools})) or "none"
            wanted = " or ".join(splits) or "any"
            raise UserError(f"{path}: holds no rows of split {wanted}, only of {present}: see rationale.splits")
        # of all rows, whatever the limit: a journal is continued under a larger one
        self.tasks: set[Task] = {cast(Task, pool.task) for pool in pools}
        self.count = sum(1 for _ in self) if written else min(sum(p.rows for p in pools), limit or len(self.manifest))
        if not self.count:
            raise UserError(f"{path}: no row has a rationale to judge; `tatar-dist rationale build` writes them")

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[QuestionRow]:
        """Yield the rows in order, without images. `number` is the row index in the manifest."""
        return islice(self._all(), self.limit)

    def _all(self) -> Iterator[QuestionRow]:
        for start, table in self.manifest.tables(_COLUMNS):
            for number, values in enumerate(table.to_pylist(), start):
                if (self.splits and values["split"] not in self.splits) or (self.written and not values["rationale"]):
                    continue
                try:
                    attributes = json_object(values["attributes"] or "{}")
                except ValueError as e:
                    raise UserError(f"{self.path}: row {number}, column attributes: {e}") from None
                yield self.row_of({**values, "attributes": attributes}, number)

    @staticmethod
    def row_of(values: dict[str, Any], number: int) -> QuestionRow:
        """Make a `QuestionRow` from a manifest row's columns, omitting attributes that are no text."""
        texts = {name: value for name, value in values["attributes"].items() if isinstance(value, str)}
        ids = (values["sample_id"], values["dataset"], values["task"])
        return QuestionRow(number, *ids, float(values["score"]), values["rationale"], texts)

    def get(self, number: int) -> tuple[QuestionRow, Sample]:
        """Read one row with its encoded image. Raises UnreadableImage if the file cannot be read."""
        values = self.manifest.row(number)  # once: reading a row costs more than the rest
        row = self.row_of(values, number)
        image = self.manifest.image(values, number)
        return row, Sample(row.sample_id, row.dataset, row.task, image, row.score, row.rationale, values["split"])


@dataclass
class Asker(ABC):
    """Base class of what asks about a ledger's open rows: at endpoints, or on our own engines.

    Args:
        say: receives messages for the user.
        progress: called as answers come.
        stopping: whether the user has requested a stop.
    """

    ledger: Ledger
    rows: RationaleRows
    journal: Journal
    say: Callable[[str], None]
    progress: Callable[[], None]
    stopping: Callable[[], bool]
    budget_spent = False

    def __post_init__(self) -> None:
        self.question = self.ledger.question
        self._first = list(islice(self.ledger.todo(), IMAGES_TRIED))

    @abstractmethod
    def run(self) -> bool:
        """Ask until every row is settled or the user stops. Returns whether the budget ended it."""

    def reject_unreadable(self, entry: LedgerEntry, problem: str) -> None:
        """Reject a row with unreadable image. Raises UserError if the first `IMAGES_TRIED` all are."""
        self.ledger.reject(entry, Reason("image-unreadable", problem))
        first = [reason.code for entry in self._first for reason in entry.before]
        if first == ["image-unreadable"] * IMAGES_TRIED and not self.ledger.tokens:
            manifest = self.rows.manifest
            raise UserError(
                f"{manifest.path}: none of the first {IMAGES_TRIED} images can be read (the last: {problem}); check "
                f"the manifest, or set data.image_root, from which image paths start (now {manifest.image_root})"
            )


@dataclass(frozen=True)
class Picture:
    """An image as it is sent."""

    url: str  # a data URL
    tokens: int  # upper estimate, for budgets and rate limits


def picture(data: bytes, max_pixels: int, where: str) -> Picture:
    """Encode an image for a request. Raises UnreadableImage, naming `where`, if undecodable."""
    decoded = decode_image(data, where)  # always: a teacher must not be asked about an image that training cannot read
    mime = next((m for magic, m in SENT_AS_IS.items() if data.startswith(magic)), None)
    with Image.open(io.BytesIO(data)) as image:
        upright = image.getexif().get(0x0112, 1) in (0, 1)
        plain = image.mode in ("RGB", "L") and not getattr(image, "is_animated", False)
    width, height = decoded.size
    if width * height > max_pixels:
        scale = (max_pixels / (width * height)) ** 0.5
        width, height = max(1, int(width * scale)), max(1, int(height * scale))  # rounded down: never over the bound
        decoded, mime = decoded.resize((width, height), Image.Resampling.BICUBIC), None
    if not (mime and upright and plain and len(data) <= MAX_BYTES):
        out = io.BytesIO()
        decoded.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        data, mime = out.getvalue(), "image/jpeg"
    tokens = math.ceil(width / PATCH) * math.ceil(height / PATCH) + 4
    return Picture(f"data:{mime};base64,{base64.b64encode(data).decode()}", tokens)
