"""Why samples cannot be used, counted, so that a run that finds none says what to change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tatar_dist.errors import UserError
from tatar_dist.types import Sample

HOPELESS = 64  # rows without a single usable one among them


class TooLong(str):
    """The reason of a sample that is longer than the setting `key` allows. tokens: its length."""

    key: str
    tokens: int

    @classmethod
    def of(cls, what: str, tokens: int, key: str, limit: int) -> TooLong:
        reason = cls(f"{what} of {tokens} tokens is over {key}={limit}")
        reason.key, reason.tokens = key, tokens
        return reason


class Rejections:
    """Count of usable samples and of reasons why others are not."""

    def __init__(self) -> None:
        self._good = 0
        self._reasons: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._tokens: dict[str, int] = {}

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
                self._tokens[kind] = max(self._tokens.get(kind, 0), sample.tokens)
        if alone and not self._good and self._reasons.total() >= HOPELESS:
            raise UserError(f"none of the first {self._reasons.total()} rows can be used: {self}")

    def __str__(self) -> str:
        if not self._reasons:
            return "no row was read"
        (kind, count), total = self._reasons.most_common(1)[0], self._reasons.total()
        remedy = ""
        if kind in self._tokens:
            remedy = f"; {kind.removeprefix('over ')}={self._tokens[kind]} would take them"
        elif "No such file" in kind:
            remedy = "; data.image_root=DIRECTORY says where the pictures are"
        return f"{count} of {total} rejected rows for one reason: {self._first[kind]}{remedy}"
