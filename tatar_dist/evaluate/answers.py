"""The answers of an evaluation, on disk as they come: a sample is asked once, however often the run is killed.

In: samples, lazily, and an engine pool. Out: for each sample and kind of asking (`greedy`, `sampled`) its completions.
Samples are dealt into engine calls by their place among all samples, whatever is answered already: a resumed
evaluation asks in the same batches as an undisturbed one, so that float rounding cannot make another table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tatar_dist.journal import Journal
from tatar_dist.records import Completion, Expected, Group, Prompt, Sample

KINDS = ("greedy", "sampled")
BATCH = 4  # engine calls are this many times the sequences that an engine works on at once, at most


def key_of(sample: Sample) -> str:
    return f"{sample.task}/{sample.dataset}/{sample.sample_id}"


def model_fingerprint(path: str) -> str:
    """Of a model directory: a hash of its config, of the names and sizes of its weight files and a mebibyte of each.

    A name that is no directory stands for itself.
    """
    directory = Path(path)
    if not directory.is_dir():
        return path
    found = hashlib.blake2b(digest_size=16)
    for file in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        with open(file, "rb") as f:
            size = file.stat().st_size
            f.seek(max(0, size - (1 << 20)))
            found.update(f"{file.name} {size} ".encode() + f.read())
    return found.hexdigest()


class Answers:
    """The journal of one evaluation. Use as a context manager. Raises UserError like `Journal`."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._journal = Journal(path, settings)
        self._lines: dict[tuple[str, str], dict[str, Any]] = {}

    def __enter__(self) -> Answers:
        self._journal.read(lambda line: self._lines.update({(line["kind"], line["key"]): line}))
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    @property
    def notice(self) -> str | None:
        """What a kill had torn, for the user."""
        return self._journal.cut

    def count(self, kind: str) -> int:
        return sum(k == kind for k, _ in self._lines)

    def has(self, kind: str, sample: Sample) -> bool:
        """Whether this very picture was answered; its file may have been replaced since."""
        line = self._lines.get((kind, key_of(sample)))
        return line is not None and line["image"] == _digest(sample)

    def get(self, kind: str, sample: Sample) -> tuple[Completion, ...]:
        """The completions of a sample that was answered. Raises KeyError for another."""
        said = self._lines[(kind, key_of(sample))]["said"]
        return tuple(
            Completion(
                c["text"],
                tuple(c["tokens"]),
                tuple(c["logprobs"]),
                c["finish"],
                Expected(*c["expected"]) if c["expected"] else None,
            )
            for c in said
        )

    def keep(self, kind: str, groups: Sequence[Group]) -> None:
        """Put the completions on disk."""
        lines = [
            {
                "kind": kind,
                "key": key_of(g.prompt.sample),
                "image": _digest(g.prompt.sample),
                "said": [
                    {
                        "text": c.text,
                        "tokens": c.token_ids,
                        "logprobs": [round(p, 6) for p in c.logprobs],
                        "finish": c.finish_reason,
                        "expected": [c.expected.mean, c.expected.sd, c.expected.mass] if c.expected else None,
                    }
                    for c in g.completions
                ],
            }
            for g in groups
        ]
        self._journal.write(*lines)
        self._lines |= {(kind, str(line["key"])): line for line in lines}


def batches(
    samples: Iterable[Sample], size: int, prompt: Callable[[Sample], Prompt], done: Callable[[Sample], bool]
) -> Iterator[list[Prompt]]:
    """Prompts of the samples that are not done, by engine call: `size` samples each, done ones counted."""
    call: list[Sample] = []
    for sample in samples:
        call.append(sample)
        if len(call) == size:
            if asked := [prompt(s) for s in call if not done(s)]:
                yield asked
            call = []
    if asked := [prompt(s) for s in call if not done(s)]:
        yield asked


def batch_size(samples: int, engines: int, max_num_seqs: int, n: int) -> int:
    """Samples of an engine call: a few times what an engine has room for, so that it seldom runs empty, but small
    enough that every engine gets a fair share of them."""
    room = max(1, max_num_seqs // n)
    return max(1, min(BATCH * room, -(-samples // (2 * engines))))


def without_image(sample: Sample) -> Sample:
    """What is kept of a sample once it was asked."""
    return replace(sample, image=b"")


def _digest(sample: Sample) -> str:
    return hashlib.blake2b(sample.image, digest_size=8).hexdigest()
