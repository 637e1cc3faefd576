"""Score pictures with one engine in this process, without Ray: also by `tatar-dist score`.

Each picture and task gives a `Score`, in order, as batches finish; a picture that cannot be read gives its `error`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tatar_dist.data.images import UnreadableImage, decode_image
from tatar_dist.errors import UserError
from tatar_dist.evaluate.answers import batches_by_pixels
from tatar_dist.evaluate.metrics import spread
from tatar_dist.plan.memory import check_fit
from tatar_dist.plan.plan import resolve
from tatar_dist.prompts.answer import DIRECT, clamped, parse, think_text
from tatar_dist.rollout.options import COMMON_ENV, engine_environment, gpu_available, set_environment
from tatar_dist.run.gpus import check_here
from tatar_dist.scoring.directory import model_config
from tatar_dist.types import TASKS, Completion, Prompt, Sample, Task

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = 2  # prompts of an engine call, as a multiple of what the engine works on at once
# modes of Pillow that a PNG holds; others are converted to RGB
PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"}


@dataclass(frozen=True)
class Score:
    """Result of one picture and task.

    score: of the greedy answer, clamped to 0-100, None if it does not parse (`reason` gives the cause); rationale: its
    thinking text; completion: the whole answer. samples: scores of sampled answers, None for one that does not parse;
    mean, sd: of those that do. expected, expected_sd: mean and standard deviation over the scores that the greedy
    answer could have had (prompts/expected.py). error: why the picture was not scored.
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

    @property
    def unparsed(self) -> int:
        """Return how many of the sampled answers hold no score."""
        return self.samples.count(None)


class Scorer:
    """A loaded model. Use one per process: an engine keeps its memory until the process ends.

    Args:
        model: model directory.
        overrides: config overrides (`rollout.max_new_tokens=512`, `rollout.tensor_parallel=2`), see config/schema.py.

    Raises:
        UserError: no model of a known family in the directory.
    """

    def __init__(self, model: str | os.PathLike[str], overrides: Sequence[str] = ()) -> None:
        self.config = model_config(model, overrides)
        set_environment(COMMON_ENV)
        from tatar_dist.prompts.render import PromptTexts

        self.texts = PromptTexts(self.config)
        rollout = self.config.rollout
        longest = min(rollout.max_model_len, self.texts.longest(rollout.max_new_tokens))
        self.config = replace(self.config, rollout=replace(rollout, max_model_len=longest))
        check_fit(self.config, resolve(self.config, "evaluate"), check_here(rollout.tensor_parallel))
        set_environment(engine_environment(self.config, gpu_available(self.config), len(os.sched_getaffinity(0))))
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
        direct: bool = False,
    ) -> Iterator[Score]:
        """Yield scores in the order of the pictures, quality before aesthetics.

        Args:
            pictures: paths, encoded bytes, Pillow images, or (name, bytes); read lazily.
            task: iqa, iaa or both.
            samples: number of sampled answers in addition to the greedy one; gives mean and sd.
            temperature, seed: of the sampled answers.
            expected: also give the expectation over the scores that the greedy answer could have had.
            direct: begin every answer with <answer>: no rationale, in a fraction of the time.

        Raises:
            UserError: an unknown task.
        """
        if task != "both" and task not in TASKS:
            raise UserError(f"task {task!r}: must be one of {', '.join(TASKS)}, both")
        from tatar_dist.rollout.engine import Sampling

        tasks: tuple[Task, ...] = TASKS if task == "both" else (task,)
        limit = self.config.rollout.max_new_tokens
        greedy = Sampling(1, 0.0, limit, expected=expected)
        sampled = Sampling(samples, temperature, limit, seed) if samples else None
        begun = DIRECT if direct else ""
        decoded = (self._look(number, picture, tasks, begun) for number, picture in enumerate(pictures))
        size = max(1, BATCH * self.config.rollout.max_num_seqs // len(tasks))
        for call in batches_by_pixels(decoded, size, lambda picture: picture[1]):
            asked = [entry for entries, _ in call for entry in entries]
            prompts = [p for p in asked if isinstance(p, Prompt)]
            answers = iter(self._engine.generate(prompts, greedy, 0) if prompts else ())
            draws = iter(self._engine.generate(prompts, sampled, 0)) if prompts and sampled else None
            for prompt in asked:
                if isinstance(prompt, Score):  # an error
                    yield prompt
                    continue
                (answer,) = next(answers).completions
                yield score_of(prompt, answer, next(draws).completions if draws else ())

    def _look(self, number: int, picture: Any, tasks: Sequence[Task], begun: str) -> tuple[list[Score | Prompt], int]:
        """Read and decode a picture; return a prompt (or score with error) per task, and its pixels."""
        name, data = read_picture(picture, number)
        error = data if isinstance(data, str) else ""
        size = (0, 0)
        if not error:
            try:
                size = decode_image(data, name).size  # type: ignore[arg-type]
            except UnreadableImage as e:
                error = str(e).removeprefix(f"{name}: ")
        asked: list[Score | Prompt] = []
        for task in tasks:
            problem = error or self.texts.tokens_with(size, task)
            if isinstance(problem, str):
                asked.append(Score(name, task, error=problem))
            else:
                sample = Sample(name, "", task, data, 0.0)  # type: ignore[arg-type]
                asked.append(Prompt(sample, self.texts.text[task], f"{number}/{task}", begun=begun))
        return asked, size[0] * size[1]


def read_picture(picture: Any, number: int = 0) -> tuple[str, bytes | str]:
    """Read a picture as (name, encoded bytes), or as (name, error text) if that fails."""
    if isinstance(picture, tuple):
        return str(picture[0]), bytes(picture[1])
    if isinstance(picture, bytes | bytearray | memoryview):
        return f"picture {number + 1}", bytes(picture)
    if isinstance(picture, str | os.PathLike):
        try:
            if Path(picture).exists() and not Path(picture).is_file():  # reading a pipe would block
                return os.fspath(picture), "is no file"
            return os.fspath(picture), Path(picture).read_bytes()
        except OSError as e:
            return os.fspath(picture), f"cannot be read: {e.strerror}"
    name = str(getattr(picture, "filename", "") or f"picture {number + 1}")
    try:
        return name, _encoded(picture)
    except Exception as e:  # decoders raise anything for damaged data
        return name, f"cannot be read: {' '.join(str(e).split())}"


def _encoded(picture: Image) -> bytes:
    """Encode a Pillow image as an upright PNG."""
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(picture)
    out = io.BytesIO()
    (upright if upright.mode in PNG_MODES else upright.convert("RGB")).save(out, "PNG", compress_level=0)
    return out.getvalue()


def score_of(prompt: Prompt, greedy: Completion, sampled: Sequence[Completion] = ()) -> Score:
    """Make the `Score` of a prompt from its greedy and sampled completions."""
    answer = parse(greedy.text)
    values = tuple(clamped(parse(c.text).value) for c in sampled)
    mean, sd = spread(values)
    expected = greedy.expected
    return Score(
        image=prompt.sample.sample_id,
        task=prompt.sample.task,
        score=clamped(answer.value),
        rationale=think_text(greedy.text).strip(),
        completion=greedy.text,
        truncated=greedy.finish_reason == "length",
        reason=answer.reason,
        samples=values,
        mean=mean,
        sd=sd,
        expected=expected.mean if expected else None,
        expected_sd=expected.sd if expected else None,
    )
