"""Requests for teachers (`Build`) and judges (`Judge`), and the evaluation of their answers.

Both classes are pure: they make requests, outcomes and finished rows from rows, settings and wording. Requests go to an
endpoint (asking.py) or to our own engines (local.py). The seed of a request is a hash of (run seed, attempt, sample
id), so that another attempt samples another text and a resumed run repeats the requests of the first.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tatar_dist.config.rationale import EndpointConfig, TextConfig, VerdictConfig
from tatar_dist.config.schema import Config
from tatar_dist.data.imports.attributes import place
from tatar_dist.errors import UserError
from tatar_dist.rationale.checks import Reason, check_text, without_reasoning
from tatar_dist.rationale.marks import low_marks, read_marks, schema
from tatar_dist.rationale.wording import Wording
from tatar_dist.rollout.engine import group_seed
from tatar_dist.types import TASKS, Task


@dataclass(frozen=True)
class QuestionRow:
    """The columns of a manifest row that a question needs, without the image. `number` is the row index from 0."""

    number: int
    sample_id: str
    dataset: str
    task: Task
    score: float
    rationale: str | None
    attributes: dict[str, str]


@dataclass(frozen=True)
class Target:
    """Destination of a request. `url` is "" for our own engines; `key` is the setting that holds the address."""

    key: str
    url: str
    model: str
    api_key_env: str
    max_pixels: int
    timeout_s: float
    structured: bool


@dataclass(frozen=True)
class Request:
    """One request without its image. `schema` is the JSON schema that the answer must follow, if any."""

    sample_id: str
    task: Task
    attempt: int
    target: Target
    system: str
    user: str
    image: bool
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    schema: dict[str, Any] | None

    @property
    def prompt_hash(self) -> str:
        return _hash(f"{self.system}\0{self.user}")


@dataclass(frozen=True)
class Answer:
    """An answer. `finish`: "stop", "length" or the endpoint's own value. Token counts: its own, or upper bounds."""

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Outcome:
    """accept: keep the sample; again: reject the answer, allow another attempt; reject: reject the sample."""

    verdict: Literal["accept", "again", "reject"]
    reasons: tuple[Reason, ...] = ()


def ordered_attributes(attributes: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name, text) of the attribute texts that are not blank: the eight in the method's order, then any others."""
    found = [(name, str(text).strip()) for name, text in attributes.items() if str(text).strip()]
    return sorted(found, key=lambda pair: place(pair[0]))


def _target(key: str, endpoint: EndpointConfig, own: TextConfig | None, model_path: str) -> Target:
    url, env, where = endpoint.url, endpoint.api_key_env, f"{key}.url"
    model = (own.model if own else "") or endpoint.model
    if endpoint.local:
        url, env, model = "", "", model_path
    elif own and own.url:
        url, env = own.url, own.api_key_env
    return Target(where, url, model, env, endpoint.max_pixels, endpoint.timeout_s, endpoint.structured)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Question(ABC):
    """Base class of both: requests, and the settings that a journal must agree with."""

    name: str
    endpoint: EndpointConfig

    def __init__(self, config: Config, wording: Wording) -> None:
        self.config, self.c, self.wording = config, config.rationale, wording
        self.targets: dict[Task, Target] = {}

    @abstractmethod
    def words_of(self, task: Task) -> str:
        """Name of the task's texts in the wording."""

    @abstractmethod
    def sampling(self, task: Task) -> TextConfig | VerdictConfig: ...

    @abstractmethod
    def with_image(self, task: Task) -> bool: ...

    def schema(self, task: Task) -> dict[str, Any] | None:
        return None

    def blanks(self, row: QuestionRow) -> dict[str, str]:
        texts = "\n".join(f"{name}: {text}" for name, text in ordered_attributes(row.attributes))
        return {"score": f"{row.score:.1f}", "attributes": texts, "rationale": (row.rationale or "").strip()}

    def request(self, row: QuestionRow, attempt: int) -> Request:
        system, user = self.wording.ask(self.words_of(row.task), self.blanks(row))
        s = self.sampling(row.task)
        return Request(
            sample_id=row.sample_id,
            task=row.task,
            attempt=attempt,
            target=self.targets[row.task],
            system=system,
            user=user,
            image=self.with_image(row.task),
            temperature=s.temperature,
            top_p=s.top_p,
            max_tokens=s.max_tokens + s.reasoning_tokens,
            seed=group_seed(self.config.seed, attempt, row.sample_id),
            schema=self.schema(row.task),
        )

    def settings(self, tasks: set[Task]) -> dict[str, Any]:
        """Flat dict of all settings that change the requests. A journal with other values is not continued."""
        found: dict[str, Any] = {"command": f"rationale {self.name}", "seed": self.config.seed}
        for task in sorted(tasks):
            words, s = self.words_of(task), self.sampling(task)
            found |= {f"{words}.{k}": getattr(s, k) for k in ("temperature", "top_p", "max_tokens", "reasoning_tokens")}
            found |= {
                f"{words}.model": self.targets[task].model,
                f"{words}.image": self.with_image(task),
                f"{words}.system": _hash(self.wording.system[words]),
                f"{words}.user": _hash(self.wording.user[words].template),
            }
            if self.with_image(task):
                local = self.endpoint.local
                found["max_pixels"] = self.config.model.max_pixels if local else self.endpoint.max_pixels
        return found

    def about(self, row: QuestionRow) -> list[Any]:
        """Values of a row that are asked about, without the image."""
        return [row.task, row.score, row.attributes]

    def digest(self, row: QuestionRow) -> str:
        """Hash of what is asked about the row; answers are not reused for a row that has changed since."""
        return _hash(json.dumps(self.about(row)))

    @abstractmethod
    def before(self, row: QuestionRow) -> list[Reason]:
        """Reasons to reject the row without asking."""

    @abstractmethod
    def read(self, row: QuestionRow, answer: Answer) -> Outcome: ...

    @abstractmethod
    def finished(self, values: dict[str, Any], row: QuestionRow, attempt: int, answer: Answer) -> dict[str, Any]:
        """Accepted row of the output. `values`: the manifest's own columns."""


class Build(Question):
    """Questions to a teacher, which writes the row's rationale: fast for IQA, slow for IAA."""

    name = "build"

    def __init__(self, config: Config, wording: Wording) -> None:
        super().__init__(config, wording)
        self.endpoint = self.c.teacher
        for task in TASKS:
            self.targets[task] = _target("rationale.teacher", self.endpoint, self._text(task), config.model.path)

    def _text(self, task: Task) -> TextConfig:
        return self.c.fast if task == "iqa" else self.c.slow

    def words_of(self, task: Task) -> str:
        return "fast" if task == "iqa" else "slow"

    def sampling(self, task: Task) -> TextConfig:
        return self._text(task)

    def with_image(self, task: Task) -> bool:
        return self._text(task).image

    def before(self, row: QuestionRow) -> list[Reason]:
        found = len(ordered_attributes(row.attributes))
        if row.task == "iaa" and found < self.c.min_attributes:
            text = (
                f"the row has {found} attribute texts, a slow rationale goes through {self.c.min_attributes} at least"
            )
            return [Reason("no-attributes", text)]
        return []

    def text(self, answer: Answer) -> str:
        return without_reasoning(answer.text)

    def read(self, row: QuestionRow, answer: Answer) -> Outcome:
        text = self.text(answer)
        reasons = check_text(text, answer.finish, row.task, row.score, row.attributes, self.c, self.wording)
        return Outcome("again", tuple(reasons)) if reasons else Outcome("accept")

    def finished(self, values: dict[str, Any], row: QuestionRow, attempt: int, answer: Answer) -> dict[str, Any]:
        note = {
            "teacher": self.targets[row.task].model,
            "attempt": attempt,
            "prompt": self.request(row, attempt).prompt_hash,
            "tokens": answer.completion_tokens,
        }
        return {**values, "rationale": self.text(answer), "meta": {**values["meta"], "rationale": note}}


class Judge(Question):
    """Questions to a judge, which marks the row's rationale. The hard checks come first and cost nothing."""

    name = "judge"

    def __init__(self, config: Config, wording: Wording) -> None:
        super().__init__(config, wording)
        self.endpoint = self.c.judge
        for task in TASKS:
            self.targets[task] = _target("rationale.judge", self.endpoint, None, config.model.path)

    def words_of(self, task: Task) -> str:
        return f"judge.{task}"

    def sampling(self, task: Task) -> VerdictConfig:
        return self.c.verdict

    def with_image(self, task: Task) -> bool:
        return True

    def schema(self, task: Task) -> dict[str, Any] | None:
        return schema(task)

    def settings(self, tasks: set[Task]) -> dict[str, Any]:
        return super().settings(set(TASKS))  # a build that is still growing may come to the other task later

    def about(self, row: QuestionRow) -> list[Any]:
        return [*super().about(row), row.rationale]

    def before(self, row: QuestionRow) -> list[Reason]:
        text = row.rationale or ""
        return check_text(text, "stop", row.task, row.score, row.attributes, self.c, self.wording)

    def marks(self, row: QuestionRow, answer: Answer) -> dict[str, int] | Reason:
        return read_marks(without_reasoning(answer.text), row.task)

    def read(self, row: QuestionRow, answer: Answer) -> Outcome:
        """Outcome of a verdict. One that cannot be parsed is retried, except at temperature 0: it would be the same."""
        unread: Literal["again", "reject"] = "again" if self.c.verdict.temperature > 0 else "reject"
        if answer.finish != "stop":
            return Outcome(unread, (Reason("judge-cut-off", f"the judge's answer ended with {answer.finish!r}"),))
        marks = self.marks(row, answer)
        if isinstance(marks, Reason):
            return Outcome(unread, (marks,))
        low = low_marks(marks, self.c.verdict.reject_at)
        return Outcome("reject", tuple(low)) if low else Outcome("accept")

    def finished(self, values: dict[str, Any], row: QuestionRow, attempt: int, answer: Answer) -> dict[str, Any]:
        marks = self.marks(row, answer)
        assert not isinstance(marks, Reason), "an accepted answer has marks"
        note = {
            "judge": self.targets[row.task].model,
            "marks": marks,
            "attempt": attempt,
            "prompt": self.request(row, attempt).prompt_hash,
        }
        return {**values, "meta": {**values["meta"], "judge": note}}


def require_target(question: Question, tasks: set[Task]) -> None:
    """Raises UserError if the settings name no address, no model name, or no path of a local model."""
    section = question.targets[min(tasks)].key.removesuffix(".url")
    if question.endpoint.local:
        if not question.config.model.path:
            raise UserError(f"{section}.local=true: name the model directory as model.path=…")
        return
    for task in sorted(tasks):
        target = question.targets[task]
        if not target.url:
            raise UserError(
                f"{target.key} is empty: give the address of an OpenAI-compatible endpoint (http://host:port/v1), or "
                f"{section}.local=true for our own engines"
            )
        if not target.model:
            raise UserError(f"{section}.model is empty: give the name under which {target.url} serves the model")
