"""Requests for teachers (`Build`) and judges (`Judge`), and the evaluation of their answers.

Both classes are pure: they make requests, outcomes and finished rows from rows, settings and wording. Requests go to an
endpoint (asking.py) or to our own engines (local.py). A judge answers with marks in JSON. The seed of a request is a
hash of (run seed, attempt, sample id), so that another attempt samples another text and a resumed run repeats the
requests of the first.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from string import Template
from typing import Any, Literal

from tatar_dist.config.rationale import EndpointConfig, TextConfig, VerdictConfig
from tatar_dist.config.schema import Config
from tatar_dist.data.imports.attributes import place
from tatar_dist.errors import UserError
from tatar_dist.rationale.checks import Reason, check_text, without_reasoning
from tatar_dist.rationale.wording import Wording
from tatar_dist.rollout.engine import group_seed
from tatar_dist.types import TASKS, Task

MARKS: dict[Task, tuple[str, str]] = {
    "iqa": ("visual_fidelity", "score_consistency"),
    "iaa": ("groundedness", "cohesion"),
}
LOWEST, HIGHEST = 1, 5


@dataclass(frozen=True)
class QuestionRow:
    """Columns of a manifest row that a question needs, without image. `number`: index from 0."""

    number: int
    sample_id: str
    dataset: str
    task: Task
    score: float
    rationale: str | None
    attributes: dict[str, str]


@dataclass(frozen=True)
class Kind:
    """How rows of one task are asked about."""

    texts: str  # name of the system and user texts in the wording
    section: str  # of the config ("rationale.teacher"), for messages
    endpoint: EndpointConfig  # with the address, key variable and model of this kind; the path of a local model
    sampling: TextConfig | VerdictConfig
    image: bool
    schema: dict[str, Any] | None = None  # JSON schema that an answer must follow

    @property
    def max_tokens(self) -> int:
        return self.sampling.max_tokens + self.sampling.reasoning_tokens


@dataclass(frozen=True)
class Request:
    """One request without its image."""

    kind: Kind
    sample_id: str
    attempt: int
    system: str
    user: str
    seed: int


@dataclass(frozen=True)
class Answer:
    """An answer. `finish`: "stop", "length" or other. Tokens: the endpoint's, or upper bounds."""

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Outcome:
    """Verdict: accept or reject the sample, or again (reject the answer, allow another attempt)."""

    verdict: Literal["accept", "again", "reject"]
    reasons: tuple[Reason, ...] = ()


def ordered_attributes(attributes: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (name, text) of non-blank attributes: the eight in the method's order, then others."""
    texts = [(name, text.strip()) for name, text in attributes.items() if text.strip()]
    return sorted(texts, key=lambda pair: place(pair[0]))


def _destination(endpoint: EndpointConfig, text: TextConfig, model_path: str) -> EndpointConfig:
    """Return where to ask for a kind of text: our engines, its own address, or the teacher's."""
    if endpoint.local:
        return replace(endpoint, url="", api_key_env="", model=model_path)
    if text.url:
        endpoint = replace(endpoint, url=text.url, api_key_env=text.api_key_env)
    return replace(endpoint, model=text.model or endpoint.model)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Question(ABC):
    """Base class of both: requests, and the settings that a journal must agree with."""

    name: str
    about: tuple[str, ...] = ("task", "score", "attributes")  # values of a row that are asked about, but for the image

    def __init__(self, config: Config, wording: Wording, endpoint: EndpointConfig, kinds: dict[Task, Kind]) -> None:
        self.config, self.c, self.wording = config, config.rationale, wording
        self.endpoint, self.kinds = endpoint, kinds

    def request(self, row: QuestionRow, attempt: int) -> Request:
        kind = self.kinds[row.task]
        attributes = "\n".join(f"{name}: {text}" for name, text in ordered_attributes(row.attributes))
        rationale = (row.rationale or "").strip()
        blanks = {"score": f"{row.score:.1f}", "attributes": attributes, "rationale": rationale}
        texts, seed = self.wording.texts[kind.texts], group_seed(self.config.seed, attempt, row.sample_id)
        return Request(kind, row.sample_id, attempt, texts.system, Template(texts.user).substitute(blanks), seed)

    def settings(self, tasks: set[Task]) -> dict[str, Any]:
        """Return the settings that change requests as a flat dict; a journal of others is refused."""
        settings: dict[str, Any] = {"command": f"rationale {self.name}", "seed": self.config.seed}
        for kind in (self.kinds[task] for task in tasks):
            values = {k: getattr(kind.sampling, k) for k in ("temperature", "top_p", "max_tokens", "reasoning_tokens")}
            texts = self.wording.texts[kind.texts]
            values |= {"model": kind.endpoint.model, "image": kind.image}
            values |= {"system": _hash(texts.system), "user": _hash(texts.user)}
            settings |= {f"{kind.texts}.{key}": value for key, value in values.items()}
            if kind.image:
                settings["max_pixels"] = (self.config.model if self.endpoint.local else self.endpoint).max_pixels
        return settings

    def digest(self, row: QuestionRow) -> str:
        """Hash what is asked about the row; answers are not reused for a row that changed since."""
        return _hash(json.dumps([getattr(row, name) for name in self.about]))

    def require_endpoint(self, tasks: set[Task]) -> None:
        """Raise UserError if the settings lack an address, a model name, or a local model's path."""
        for kind in (self.kinds[task] for task in sorted(tasks)):
            endpoint = kind.endpoint
            if endpoint.local and not endpoint.model:
                raise UserError(f"{kind.section}.local=true: name the model directory as model.path=…")
            if not (endpoint.local or endpoint.url and endpoint.model):
                raise UserError(
                    f"{kind.section}.{'model' if endpoint.url else 'url'} is empty: give the address of an "
                    f"OpenAI-compatible endpoint (http://host:port/v1) and the name of its model, or "
                    f"{kind.section}.local=true for our own engines"
                )

    def checked(self, row: QuestionRow, text: str, finish: str = "stop") -> tuple[Reason, ...]:
        """Return the reasons of the hard checks to reject a text of the row."""
        return tuple(check_text(text, finish, row.task, row.score, row.attributes, self.c, self.wording))

    def origin(self, row: QuestionRow, attempt: int) -> dict[str, Any]:
        """Return who answered what, for the meta of an accepted row."""
        request = self.request(row, attempt)
        role = request.kind.section.rpartition(".")[2]
        prompt = _hash(f"{request.system}\0{request.user}")
        return {role: request.kind.endpoint.model, "attempt": attempt, "prompt": prompt}

    @abstractmethod
    def before(self, row: QuestionRow) -> tuple[Reason, ...]:
        """Return reasons to reject the row without asking."""

    @abstractmethod
    def read(self, row: QuestionRow, answer: Answer) -> Outcome: ...

    @abstractmethod
    def finished(self, values: dict[str, Any], row: QuestionRow, attempt: int, answer: Answer) -> dict[str, Any]:
        """Return the accepted row of the output. `values`: the manifest's own columns."""


class Build(Question):
    """Questions to a teacher, which writes the row's rationale: fast for IQA, slow for IAA."""

    name = "build"

    def __init__(self, config: Config, wording: Wording) -> None:
        c, kinds = config.rationale, {}
        texts: tuple[tuple[Task, str, TextConfig], ...] = (("iqa", "fast", c.fast), ("iaa", "slow", c.slow))
        for task, name, text in texts:
            endpoint = _destination(c.teacher, text, config.model.path)
            kinds[task] = Kind(name, "rationale.teacher", endpoint, text, text.image)
        super().__init__(config, wording, c.teacher, kinds)

    def before(self, row: QuestionRow) -> tuple[Reason, ...]:
        count, least = len(ordered_attributes(row.attributes)), self.c.min_attributes
        if row.task == "iqa" or count >= least:
            return ()
        text = f"the row has {count} attribute texts, a slow rationale goes through {least} at least"
        return (Reason("no-attributes", text),)

    def read(self, row: QuestionRow, answer: Answer) -> Outcome:
        reasons = self.checked(row, without_reasoning(answer.text), answer.finish)
        return Outcome("again" if reasons else "accept", reasons)

    def finished(self, values: dict[str, Any], row: QuestionRow, attempt: int, answer: Answer) -> dict[str, Any]:
        note = {**self.origin(row, attempt), "tokens": answer.completion_tokens}
        text = without_reasoning(answer.text)
        return {**values, "rationale": text, "meta": {**values["meta"], "rationale": note}}


def marks_schema(task: Task) -> dict[str, Any]:
    """Return the answer's JSON schema, strict as OpenAI's and vLLM's structured outputs require."""
    mark = {"type": "integer", "enum": list(range(LOWEST, HIGHEST + 1))}
    return {
        "type": "object",
        "properties": {name: dict(mark) for name in MARKS[task]},
        "required": list(MARKS[task]),
        "additionalProperties": False,
    }


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def read_marks(text: str, task: Task) -> dict[str, int] | Reason:
    """Return marks by name in the schema's order, or a Reason with code "judge-json".

    Never raises and never guesses: accepts one JSON object of the schema, without prose or a code fence around it.
    """
    try:
        answer = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as e:  # ValueError: not JSON, or an integer of thousands of digits
        return Reason("judge-json", f"not one JSON object: {str(e)[:100]}")
    if not isinstance(answer, dict) or set(answer) != set(MARKS[task]):
        return Reason("judge-json", f"not an object with the keys {' and '.join(MARKS[task])}")
    for name in MARKS[task]:
        if type(answer[name]) is not int or not LOWEST <= answer[name] <= HIGHEST:  # isinstance takes a boolean, too
            return Reason("judge-json", f"{name} is no whole number from {LOWEST} to {HIGHEST}")
    return {name: answer[name] for name in MARKS[task]}


def low_marks(marks: dict[str, int], reject_at: int) -> list[Reason]:
    """Return one reason for each mark that is `reject_at` or less."""
    return [
        Reason(f"low-{name}", f"the judge gave {name} {value} of {HIGHEST}, {reject_at} or less rejects")
        for name, value in marks.items()
        if value <= reject_at
    ]


class Judge(Question):
    """Questions to a judge, which marks the row's rationale after the hard checks (no cost)."""

    name = "judge"
    about = (*Question.about, "rationale")

    def __init__(self, config: Config, wording: Wording) -> None:
        c = config.rationale
        endpoint = _destination(c.judge, TextConfig(), config.model.path)
        kinds = {t: Kind(f"judge.{t}", "rationale.judge", endpoint, c.verdict, True, marks_schema(t)) for t in TASKS}
        super().__init__(config, wording, c.judge, kinds)

    def settings(self, tasks: set[Task]) -> dict[str, Any]:
        return super().settings(set(TASKS))  # a build that is still growing may come to the other task later

    def before(self, row: QuestionRow) -> tuple[Reason, ...]:
        return self.checked(row, row.rationale or "")

    def marks(self, row: QuestionRow, answer: Answer) -> dict[str, int] | Reason:
        return read_marks(without_reasoning(answer.text), row.task)

    def read(self, row: QuestionRow, answer: Answer) -> Outcome:
        """Return a verdict's outcome; retry an unparsed one unless temperature 0 would repeat it."""
        unread: Literal["again", "reject"] = "again" if self.c.verdict.temperature > 0 else "reject"
        if answer.finish != "stop":
            return Outcome(unread, (Reason("judge-cut-off", f"the judge's answer ended with {answer.finish!r}"),))
        marks = self.marks(row, answer)
        if isinstance(marks, Reason):
            return Outcome(unread, (marks,))
        low = low_marks(marks, self.c.verdict.reject_at)
        return Outcome("reject" if low else "accept", tuple(low))

    def finished(self, values: dict[str, Any], row: QuestionRow, attempt: int, answer: Answer) -> dict[str, Any]:
        note = {**self.origin(row, attempt), "marks": self.marks(row, answer)}
        return {**values, "meta": {**values["meta"], "judge": note}}
