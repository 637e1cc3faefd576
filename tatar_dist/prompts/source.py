"""Turn samples into prompts and training rows; quarantine samples that cannot be used.

A sample whose image cannot be read, whose prompt is too long, or that has no supervised target where one is needed, is
quarantined once, replaced by the next of its data set, and never drawn again. Nothing is truncated. Runs in the
controller; images stay encoded bytes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from tatar_dist.config.schema import Config, DataConfig
from tatar_dist.data.images import UnreadableImage, decode_image, image_size
from tatar_dist.data.manifest import Manifest, read_manifest
from tatar_dist.data.pool_cursor import Ref
from tatar_dist.data.sampler import PromptSampler
from tatar_dist.errors import UserError
from tatar_dist.prompts.answer import answer_text
from tatar_dist.prompts.render import PromptTexts
from tatar_dist.prompts.unusable import Rejections, TooLong
from tatar_dist.run.directory import PROMPTS, RunDirectory
from tatar_dist.types import LearnerRow, Prompt, Sample

CHECK_THREADS = 8  # decoding releases the GIL
WINDOW = 64  # held-out rows that are read and checked at a time


def read_manifests(data: DataConfig, split: str) -> list[Manifest]:
    """Read the manifests of data.SPLIT, paths below data.root, each with its rows of that split.

    A manifest that holds only one other split is accepted for validation and test, with a note on stderr: metrics of
    training data may be wanted. Raises UserError without a manifest, or for any other with no row of the split.
    """
    paths = getattr(data, split)
    if not paths:
        raise UserError(f"data.{split} is empty: name at least one Parquet manifest")
    return [_of_split(read_manifest(Path(data.root) / p, data.image_root), split) for p in paths]


def _of_split(manifest: Manifest, split: str) -> Manifest:
    part, others = manifest.of_split(split), ", ".join(sorted({p.split for p in manifest.pools})) or "no"
    if part.pools or not manifest.pools:
        return part
    if split == "train" or "," in others:
        raise UserError(f"{manifest.path}: column split: holds {others} rows only, data.{split} reads {split} rows")
    print(f"tatar-dist: {manifest.path} has no {split} rows: data.{split} takes its {others} rows", file=sys.stderr)
    return manifest


def _windows(rows: Iterable[int]) -> Iterator[tuple[int, ...]]:
    rows = iter(rows)
    while window := tuple(islice(rows, WINDOW)):
        yield window


def spread(manifests: Sequence[Manifest], dataset: str) -> list[tuple[int, str, int]]:
    """Order a data set's (manifest, task, row) so that any first ones span its scores.

    Rows are sorted by score, ties at random with a fixed seed, and taken by the van der Corput sequence in base 2: the
    lowest, the middle, the quarters, the eighths. So a set that is sorted by source or by score gives a fair sample.
    """
    places: list[tuple[int, str, int]] = []
    scores: list[np.ndarray] = []
    for m, manifest in enumerate(manifests):
        known = np.concatenate([t["score"].to_numpy(zero_copy_only=False) for _, t in manifest.tables(["score"])])
        for pool in (p for p in manifest.pools if p.dataset == dataset):
            rows = list(pool)
            places += [(m, pool.task, row) for row in rows]
            scores.append(known[rows].astype(float))
    n = len(places)
    by_score = np.lexsort((np.random.default_rng(0).permutation(n), np.concatenate(scores)))
    bits = max(1, (n - 1).bit_length())
    index = np.arange(n)
    reversed_bits = sum(((index >> b) & 1) << (bits - 1 - b) for b in range(bits))
    return [places[i] for i in by_score[np.argsort(reversed_bits)]]


class PromptSource:
    """Render prompts for the model of `config`; quarantined samples are recorded in `run`.

    `missing` counts, by (data set, task), the samples that `held_out` could not use; an evaluation reports them.
    `unusable` counts the reasons; methods that read samples raise UserError if the first 64 cannot be used.
    """

    def __init__(self, config: Config, run: RunDirectory, texts: PromptTexts | None = None) -> None:
        self.config, self.run = config, run
        self.missing: Counter[tuple[str, str]] = Counter()
        self.unusable = Rejections()
        self.texts = texts or PromptTexts(config)
        self.backbone = self.texts.backbone
        run.records[PROMPTS] = self.texts.wording.to_yaml()  # an exported model takes its wording from here

    def problem(self, sample: Sample, supervised: bool = False) -> str | None:
        """Return why a sample cannot be used, as a prompt or as a supervised row, or None if it can."""
        try:
            tokens = self.texts.tokens_with(decode_image(sample.image, sample.sample_id).size, sample.task)
            if isinstance(tokens, str):
                return tokens
            if not supervised:
                return None
            if not (sample.rationale or "").strip() and not getattr(self.config.sft.thought_dropout, sample.task):
                return "no rationale"
            tokens += len(self.sft_row(sample).completion_ids)
        except (UnreadableImage, UserError) as e:  # UserError: a tag of the answer format in the rationale
            return str(e)
        limit = self.config.sft.max_tokens
        return TooLong.of("prompt and answer", tokens, "sft.max_tokens", limit) if tokens > limit else None

    def samples(self, sampler: PromptSampler, n: int) -> list[Sample]:
        """Return the sampler's next n samples, all usable; the others are quarantined and replaced."""
        refs = sampler.next_batch(n)
        samples = self._checked(sampler.get, refs, sampler.supervised)
        for i in range(n):
            while isinstance(problem := samples[i], str):
                self._quarantine(sampler, refs[i], problem)
                try:
                    refs[i] = sampler.replace(refs[i], refs)
                except UserError as e:
                    raise UserError(f"{e}; {self.unusable}") from None
                (samples[i],) = self._checked(sampler.get, [refs[i]], sampler.supervised)
        return [sample for sample in samples if isinstance(sample, Sample)]

    def _quarantine(self, sampler: PromptSampler, ref: Ref, problem: str) -> None:
        self.run.quarantine(sampler.sample_id(ref), str(sampler.manifests[ref[0]].path), problem)

    def held_out(
        self,
        manifests: Sequence[Manifest],
        per_dataset: int | None,
        supervised: bool = False,
        known: Callable[[Sample], bool] = lambda sample: False,
    ) -> Iterator[Sample]:
        """Yield each data set's usable samples in manifest order, or `per_dataset` by `spread`.

        Rows are read lazily, pool by pool; a sample with `known` true counts as usable without a check of its image.
        """
        datasets = dict.fromkeys(p.dataset for m in manifests for p in m.pools)
        how = (supervised, known, len(datasets) == 1)
        if per_dataset is None:
            for manifest, pool in ((m, p) for m in manifests for p in m.pools):
                for rows in _windows(pool):
                    yield from self._usable(manifest, pool.dataset, pool.task, rows, *how)
            return
        for dataset in datasets:
            order, left = iter(spread(manifests, dataset)), per_dataset
            while left and (places := sorted(islice(order, left))):  # more than once if some cannot be used
                for (m, task), group in groupby(places, key=lambda place: place[:2]):
                    for rows in _windows(row for *_, row in group):
                        for sample in self._usable(manifests[m], dataset, task, rows, *how):
                            left -= 1
                            yield sample

    def _usable(
        self,
        manifest: Manifest,
        dataset: str,
        task: str,
        rows: Sequence[int],
        supervised: bool,
        known: Callable[[Sample], bool],
        alone: bool,
    ) -> Iterator[Sample]:
        """Yield the samples of these rows that can be used; quarantine and count the others."""
        for row, sample in zip(rows, self._checked(manifest.get, rows, supervised, known, alone), strict=True):
            if isinstance(sample, str):
                self.run.quarantine(manifest.sample_id(row), str(manifest.path), sample)
                self.missing[dataset, task] += 1
            else:
                yield sample

    def _checked(
        self,
        get: Callable[[Any], Sample],
        places: Sequence[Ref] | Sequence[int],
        supervised: bool,
        known: Callable[[Sample], bool] = lambda sample: False,
        alone: bool = True,
    ) -> list[Sample | str]:
        """Return the samples that `get` reads at these places, or the reason why one cannot be used."""

        def read(place: Ref | int) -> Sample | str:
            try:
                return get(place)
            except UnreadableImage as e:
                return str(e)

        def check(sample: Sample | str) -> Sample | str:
            if isinstance(sample, str) or known(sample):
                return sample
            return self.problem(sample, supervised) or sample

        samples = [read(place) for place in places]  # one thread: a Parquet file is not safe to share
        with ThreadPoolExecutor(CHECK_THREADS) as threads:
            checked = list(threads.map(check, samples))
        self.unusable.note(checked, alone)
        return checked

    def held_out_prompts(self) -> list[Prompt]:
        """Return prompts of `data.eval_limit` validation samples per data set; [] if no manifest."""
        if not self.config.data.validation:
            return []
        manifests = read_manifests(self.config.data, "validation")
        samples = self.held_out(manifests, self.config.data.eval_limit)
        return [self.prompt(s, f"eval/{s.dataset}/{s.sample_id}") for s in samples]

    def prompt(self, sample: Sample, group_id: str) -> Prompt:
        return Prompt(sample, self.texts.text[sample.task], group_id)

    def batch(self, sampler: PromptSampler, n: int, step: int) -> list[Prompt]:
        """Return the next n prompts; their group ids sort by data set and sample id within the step."""
        samples = sorted(self.samples(sampler, n), key=lambda s: (s.dataset, s.sample_id))
        return [self.prompt(s, f"{step:06d}/{s.dataset}/{s.sample_id}") for s in samples]

    def more(
        self, like: Sequence[Prompt], asked: Sequence[Prompt], sampler: PromptSampler, step: int
    ) -> dict[str, Prompt]:
        """Draw new prompts, none in `asked`, to replace `like`.

        Returns {group id of one of `like`: a prompt of its data set}, without those whose data set has none left.
        """
        avoid = {(p.sample.dataset, p.sample.sample_id) for p in asked}
        prompts: dict[str, Prompt] = {}
        for prompt in like:
            ref = sampler.another(prompt.sample.dataset, avoid)
            while ref is not None:
                avoid.add((prompt.sample.dataset, sampler.sample_id(ref)))
                (sample,) = self._checked(sampler.get, [ref], supervised=False)
                if isinstance(sample, Sample):
                    group_id = f"{step:06d}/{sample.dataset}/{sample.sample_id}"
                    prompts[prompt.group_id] = self.prompt(sample, group_id)
                    break
                self._quarantine(sampler, ref, sample)
                sampler.exclude(ref)
                ref = sampler.another(prompt.sample.dataset, avoid)
        return prompts

    def sft_row(self, sample: Sample) -> LearnerRow:
        """Return a sample's supervised row: rationale if any, score (two decimals), end of turn."""
        answer = answer_text((sample.rationale or "").strip() or None, sample.score)
        ids = self.backbone.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return LearnerRow(
            image_id=f"{sample.dataset}/{sample.sample_id}",
            image=sample.image,
            prompt_text=self.texts.text[sample.task],
            completion_ids=(*ids, self.backbone.end_of_turn()),
            task=sample.task,
            prompt_tokens=self.texts.tokens[sample.task] + self.backbone.image_tokens(*image_size(sample.image)),
        )
