"""Scores for pictures, from Python and from the command line: one engine in this process, no Ray.

    from tatar_dist import Scorer
    for score in Scorer("models/scorer").score(["photo.jpg", picture, data], task="both"):
        print(score.image, score.task, score.score, score.rationale)

In: a model directory of ours (a checkpoint's or an exported one) and pictures: paths, encoded bytes, or Pillow images.
Out: a `Score` for each picture and task, in order, as batches come back. The prompts, the picture sizes and the dtype
are those that the directory says the model was trained with. A picture that cannot be read is a `Score` with `error`;
the others are scored.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tatar_dist import CONFIGS
from tatar_dist.config import Config, load_config
from tatar_dist.errors import UserError
from tatar_dist.prompts import SCORE_MAX, SCORE_MIN, parse, think_text
from tatar_dist.records import TASKS, Completion, Prompt, Sample, Task
from tatar_dist.rollout.environment import COMMON_ENV, engine_environment

if TYPE_CHECKING:
    pass

Picture = "str | os.PathLike[str] | bytes | Image | tuple[str, bytes]"
BATCH = 4  # pictures of an engine call, as a multiple of what the engine works on at once
# modules of tatar_dist.backbones, each named as the model_type of its config.json
FAMILIES = ("qwen2_5_vl", "qwen3_vl")
PIXELS = ((256 * 28 * 28, 1280 * 28 * 28), ("shortest_edge", "longest_edge"))  # where a directory says nothing


@dataclass(frozen=True)
class Score:
    """What a model says of one picture for one task.

    score: of the greedy answer, clamped to 0-100, None where it does not parse (`reason` says why); rationale: what it
    wrote before; completion: all of it. samples: scores of sampled answers, None where one does not parse; mean, sd:
    over those that do. expected, expected_sd: over the scores that the greedy answer might have been
    (expected_score.py). error: why the picture was not asked about.
    """

    image: str
    task: Task
    score: float | None = None
    rationale: str = ""
    completion: str = ""
    truncated: bool = False
    reason: str | None = None
    samples: tuple[float | None, ...] = ()
    mean: float | None = None
    sd: float | None = None
    expected: float | None = None
    expected_sd: float | None = None
    error: str | None = None


class Scorer:
    """A loaded model. One at a time in a process: an engine keeps its memory until the process ends.

    Args:
        model: directory.
        overrides: config words (`rollout.max_new_tokens=512`, `rollout.tensor_parallel=2`), see config.py.

    Raises:
        UserError: no model of a known family in the directory.
    """

    def __init__(self, model: str | os.PathLike[str], overrides: Sequence[str] = ()) -> None:
        self.config = model_config(Path(model), overrides)
        _set_environment(COMMON_ENV)
        from tatar_dist.prompt_texts import PromptTexts

        self.texts = PromptTexts(self.config)
        rollout = self.config.rollout
        rollout.max_model_len = min(rollout.max_model_len, self.texts.longest(rollout.max_new_tokens))
        _set_environment(engine_environment(self.config, _gpu(), len(os.sched_getaffinity(0))))
        from tatar_dist.rollout.engine import RolloutEngine

        self._engine = RolloutEngine(self.config, 0)
        self._engine.setup(len(os.sched_getaffinity(0)), 0)

    def score(
        self,
        pictures: Iterable[Any],
        task: Task | Literal["both"] = "both",
        *,
        samples: int = 0,
        temperature: float = 1.0,
        seed: int = 0,
        expected: bool = False,
    ) -> Iterator[Score]:
        """Scores in the order of the pictures, quality before aesthetics.

        Args:
            pictures: paths, encoded bytes, Pillow images, or (name, bytes); read as they are needed.
            task: iqa, iaa or both.
            samples: sampled answers beside the greedy one; with them come mean and sd.
            temperature, seed: of those.
            expected: also the expectation over the scores that the greedy answer might have been.

        Raises:
            UserError: an unknown task.
        """
        if task != "both" and task not in TASKS:
            raise UserError(f"task {task!r}: must be one of {', '.join(TASKS)}, both")
        from tatar_dist.rollout.engine import Sampling

        tasks = TASKS if task == "both" else (task,)
        limit = self.config.rollout.max_new_tokens
        greedy = Sampling(1, 0.0, limit, expected=expected)
        sampled = Sampling(samples, temperature, limit, seed) if samples else None
        pictures = enumerate(pictures)
        size = max(1, BATCH * self.config.rollout.max_num_seqs // len(tasks))
        while batch := list(islice(pictures, size)):
            found: list[Score | Prompt] = [self._prompt(number, picture, t) for number, picture in batch for t in tasks]
            prompts = [p for p in found if isinstance(p, Prompt)]
            answers = iter(self._engine.generate(prompts, greedy, 0)) if prompts else iter(())
            draws = iter(self._engine.generate(prompts, sampled, 0)) if prompts and sampled else None
            for each in found:
                if isinstance(each, Score):
                    yield each
                    continue
                (answer,) = next(answers).completions
                yield score_of(each, answer, next(draws).completions if draws else ())

    def _prompt(self, number: int, picture: Any, task: Task) -> Prompt | Score:
        """What to ask, or the score that says why not."""
        name, data = read_picture(picture, number)
        if isinstance(data, str):
            return Score(name, task, error=data)
        if isinstance(problem := self.texts.measure(data, task, name), str):
            return Score(name, task, error=problem.removeprefix(f"{name}: "))
        sample = Sample(name, "", task, data, 0.0)
        return Prompt(sample, self.texts.text[task], f"{number}/{task}")


def model_config(model: Path, overrides: Sequence[str] = ()) -> Config:
    """How to ask the model of a directory, as far as its own files say. Raises UserError like `Scorer`."""
    if not model.is_dir():
        raise UserError(f"{model}: no such model directory; a run's newest model is in RUN/checkpoints/latest/model")
    settings = _json(model / "config.json")
    if settings is None:
        raise UserError(f"{model}: no config.json in it, so it is not a Hugging Face model directory")
    kind = str(settings.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(f"{model}: model_type is {kind!r}; known are {', '.join(FAMILIES)}")
    low, high = _pixels(model)
    dtype = str(settings.get("dtype") or settings.get("torch_dtype") or "bfloat16")
    prompts = model / "prompts.yaml"
    words = [
        f"model.path={model}",
        f"model.family={kind}",
        f"model.dtype={dtype if dtype in ('float32', 'bfloat16') else 'bfloat16'}",
        f"model.min_pixels={low}",
        f"model.max_pixels={high}",
        f"data.prompts={prompts if prompts.is_file() else CONFIGS / 'prompts.yaml'}",
        "cluster.gpus_per_node=0",
        f"rollout.max_model_len={_context(settings)}",
    ]
    return load_config([], [*words, *overrides], unused=("output",))


def _pixels(model: Path) -> tuple[int, int]:
    """(least, most) pixels of a picture, as the processor beside the model has them."""
    whole = _json(model / "processor_config.json") or {}
    found = whole.get("image_processor") or _json(model / "preprocessor_config.json") or {}
    size = found.get("size") or {}
    (low, high), (low_key, high_key) = PIXELS
    return (
        int(found.get("min_pixels") or size.get(low_key) or low),
        int(found.get("max_pixels") or size.get(high_key) or high),
    )


def _context(settings: dict[str, Any]) -> int:
    """max_model_len: enough for a large picture and a long answer, no more than the model has."""
    text = settings.get("text_config") or settings
    return min(4096, int(text.get("max_position_embeddings", 4096)))


def _json(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _set_environment(wanted: Mapping[str, str]) -> None:
    """Before what reads it is imported; what the user has set stays."""
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def read_picture(picture: Any, number: int = 0) -> tuple[str, bytes | str]:
    """(name, encoded bytes), or (name, why there are none)."""
    if isinstance(picture, tuple):
        return str(picture[0]), bytes(picture[1])
    if isinstance(picture, bytes | bytearray | memoryview):
        return f"picture {number + 1}", bytes(picture)
    if isinstance(picture, str | os.PathLike):
        try:
            return os.fspath(picture), Path(picture).read_bytes()
        except OSError as e:
            return os.fspath(picture), f"cannot be read: {e.strerror}"
    out = io.BytesIO()
    picture.save(out, "PNG")
    return str(getattr(picture, "filename", "") or f"picture {number + 1}"), out.getvalue()


def score_of(prompt: Prompt, greedy: Completion, sampled: Sequence[Completion] = ()) -> Score:
    """The record of a greedy completion and of sampled ones."""
    said = parse(greedy.text)
    values = tuple(clamped(parse(c.text).value) for c in sampled)
    parsed = [v for v in values if v is not None]
    expected = greedy.expected
    return Score(
        image=prompt.sample.sample_id,
        task=prompt.sample.task,
        score=clamped(said.value),
        rationale=think_text(greedy.text).strip(),
        completion=greedy.text,
        truncated=greedy.finish_reason == "length",
        reason=said.reason,
        samples=values,
        mean=float(np.mean(parsed)) if parsed else None,
        sd=float(np.std(parsed, ddof=1)) if len(parsed) > 1 else None,
        expected=expected.mean if expected else None,
        expected_sd=expected.sd if expected else None,
    )


def clamped(value: float | None) -> float | None:
    return None if value is None else min(max(value, SCORE_MIN), SCORE_MAX)
