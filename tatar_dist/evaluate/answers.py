"""Journal of an evaluation's answers, written as engine calls return; no sample asked twice.

Takes a lazy stream of samples and an engine pool; keeps completions per sample and kind (`greedy`, `sampled`,
`direct`). Samples are assigned to calls by their position among all samples, answered or not, and a call is run as a
whole or not at all. With the same engines, a resumed evaluation thus uses the batches of an uninterrupted one, and
rounding does not change the table. (Bitwise equality under engine failures needs `rollout.deterministic`.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, TypeVar

from tatar_dist.data.images import image_size
from tatar_dist.errors import UserError
from tatar_dist.run.journal import Journal
from tatar_dist.types import Completion, Expected, Group, Prompt, Sample

T = TypeVar("T")
BATCH = 2  # engine calls are this many times the sequences that an engine works on at once, at most
MOST_PIXELS = 1 << 29  # of a call, decoded: 2 GiB
SAMPLES_OF_A_FILE, SAMPLE_BYTES = 64, 1 << 16  # what a fingerprint reads of a weight file


def key_of(sample: Sample) -> str:
    return f"{sample.task}/{sample.dataset}/{sample.sample_id}"


def model_fingerprint(path: str) -> str:
    """Hash a model directory; return a `path` that is not a directory unchanged.

    Covers the name and size of config.json and of every *.safetensors file, and up to 64 KiB of each at each of 64
    evenly spaced offsets. Raises OSError if config.json is missing.
    """
    directory = Path(path)
    if not directory.is_dir():
        return path
    digest = hashlib.blake2b(digest_size=16)
    for file in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        with open(file, "rb") as f:
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            for place in range(SAMPLES_OF_A_FILE):
                f.seek(max(0, (size - SAMPLE_BYTES) * place // (SAMPLES_OF_A_FILE - 1)))
                digest.update(f.read(SAMPLE_BYTES))
    return digest.hexdigest()


class AnswerJournal(Journal):
    """Journal of one evaluation, a context manager that reads earlier answers on entry."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(path, settings)
        self._lines: dict[tuple[str, str], dict[str, Any]] = {}

    def __enter__(self) -> AnswerJournal:
        try:
            self.read(lambda line: self._lines.update({(line["kind"], line["key"]): line}))
        except BaseException:
            self.close()
            raise
        return self

    def count(self, kind: str) -> int:
        return sum(k == kind for k, _ in self._lines)

    def has(self, kind: str, sample: Sample) -> bool:
        """Return whether the sample was answered with these image bytes; its file may have changed."""
        line = self._lines.get((kind, key_of(sample)))
        return line is not None and line["image"] == _digest(sample)

    def get(self, kind: str, sample: Sample) -> tuple[Completion, ...]:
        """Return the completions of an answered sample. Raises KeyError for an unanswered one.
        Only the number of tokens and the sum of log-probabilities are kept: all token ids are 0."""
        return tuple(
            Completion(
                c["text"], (0,) * c["tokens"], (c["logprob"],), c["finish"], c["expected"] and Expected(*c["expected"])
            )
            for c in self._lines[(kind, key_of(sample))]["said"]
        )

    def keep(self, kind: str, groups: Sequence[Group]) -> None:
        """Write the completions to the journal."""
        lines = [
            {
                "kind": kind,
                "key": key_of(g.prompt.sample),
                "image": _digest(g.prompt.sample),
                "said": [
                    {
                        "text": c.text,
                        "tokens": len(c.token_ids),
                        "logprob": round(sum(c.logprobs), 6),
                        "finish": c.finish_reason,
                        "expected": c.expected and astuple(c.expected),
                    }
                    for c in g.completions
                ],
            }
            for g in groups
        ]
        self.write(*lines)
        self._lines |= {(kind, str(line["key"])): line for line in lines}


def batches_by_pixels(
    items: Iterable[T], size: int, pixels: Callable[[T], int], most: int = MOST_PIXELS
) -> Iterator[list[T]]:
    """Yield lists of at most `size` items and `most` pixels in total, a larger item by itself.

    An engine decodes all images of a call before it starts, at 4 bytes per pixel, and vLLM keeps the processed inputs.
    """
    call: list[T] = []
    total = 0
    for item in items:
        size_of_item = pixels(item)
        if call and (len(call) == size or total + size_of_item > most):
            yield call
            call, total = [], 0
        call.append(item)
        total += size_of_item
    if call:
        yield call


def batches(
    samples: Iterable[Sample], size: int, prompt: Callable[[Sample], Prompt], done: Callable[[Sample], bool]
) -> Iterator[list[Prompt]]:
    """Yield prompts by call: `size` samples, fewer if images are large; skip answered calls."""
    for call in batches_by_pixels(samples, size, _pixels):
        if not all(map(done, call)):
            yield [prompt(s) for s in call]


def _pixels(sample: Sample) -> int:
    width, height = image_size(sample.image)
    return width * height


def distinct(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Yield the samples. Raises UserError for a repeated key: one answer would count for both."""
    seen: set[str] = set()
    for sample in samples:
        if (key := key_of(sample)) in seen:
            raise UserError(
                f"data.test: {sample.task} {sample.dataset}/{sample.sample_id} comes twice: give manifests that "
                "do not share samples, or data sets of different names"
            )
        seen.add(key)
        yield sample


def batch_size(samples: int, engines: int, max_num_seqs: int, n: int) -> int:
    """Return the number of samples per engine call.
    At most BATCH times an engine's capacity, so that it seldom runs empty, but few enough for every engine to get a
    share."""
    room = max(1, max_num_seqs // n)
    return max(1, min(BATCH * room, -(-samples // (2 * engines))))


def _digest(sample: Sample) -> str:
    return hashlib.blake2b(sample.image, digest_size=8).hexdigest()
