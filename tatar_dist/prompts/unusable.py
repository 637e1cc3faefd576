"""Why samples cannot be used, counted, so that a run that finds none says what to change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tatar_dist.errors import UserError
from tatar_dist.types import Sample

HOPELESS = 64  # rows without a single usable one among them


class TooLong(str):
    """The reason of a sample over `key` in tokens. pixels: max_pixels that would do, or 0."""

    key: str
    tokens: int
    pixels: int

    @classmethod
    def of(cls, what: str, tokens: int, key: str, limit: int, pixels: int = 0) -> TooLong:
        reason = cls(f"{what} of {tokens} tokens is over {key}={limit}")
        reason.key, reason.tokens, reason.pixels = key, tokens, pixels
        return reason


class Rejections:
    """Count of usable samples and of reasons why others are not."""

    def __init__(self) -> None:
        self._good = 0
        self._reasons: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._longest: dict[str, TooLong] = {}

    def note(self, samples: Sequence[Sample | str], alone: bool) -> None:
        """Count samples and reasons. Raises UserError if `alone` and no sample was ever seen.

        alone: no other data set follows that may have usable rows.
        """
        for sample in samples:
            if isinstance(sample, Sample):
                self._good += 1
                continue
            kind = f"over {sample.key}" if isinstance(sample, TooLong) else sample.rsplit(": ", 1)[-1]
            self._reasons[kind] += 1
            self._first.setdefault(kind, sample)
            if isinstance(sample, TooLong):
                self._longest[kind] = max(self._longest.get(kind, sample), sample, key=lambda reason: reason.tokens)
        if alone and not self._good and self._reasons.total() >= HOPELESS:
            raise UserError(f"none of the first {self._reasons.total()} rows can be used: {self}")

    def __str__(self) -> str:
        if not self._reasons:
            return "no row was read"
        (kind, count), total = self._reasons.most_common(1)[0], self._reasons.total()
        remedy = ""
        if longest := self._longest.get(kind):
            scaled = f", or model.max_pixels={longest.pixels}, which scales them down" * (longest.pixels > 0)
            remedy = f"; {longest.key}={longest.tokens} would take them{scaled}"
        elif "No such file" in kind:
            remedy = "; data.image_root=DIRECTORY says where the pictures are"
        return f"{count} of {total} rejected rows for one reason: {self._first[kind]}{remedy}"
