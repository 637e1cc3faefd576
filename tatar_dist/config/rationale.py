"""The `rationale` section of the config: teacher, judge, and their limits.

Figures of the method are from METHOD section "Rationale construction" of the paper's code. API keys never stand here:
`api_key_env` names the environment variable that holds one.
"""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Literal
from urllib.parse import parse_qsl, urlsplit

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator
from pydantic import Field as Rule
from pydantic.dataclasses import dataclass

from tatar_dist.config.validate import STRICT_KEYS, AboveZero, AtLeastOne, AtLeastZero, Float, Int, NotNegative, Why
from tatar_dist.errors import UserError

ALLOWED_QUERY = {"api-version"}  # what some endpoints want in the address; anything else might be a secret


def check_url(url: str) -> str:
    """Refuse an address that is none or carries a secret; messages never repeat such an address."""
    if not url:
        return url
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("not a valid address") from None
    query = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)} - ALLOWED_QUERY
    for secret, given in (
        ("a user name or password", "@" in parts.netloc),
        ("a query (?…), which may carry a key", query or parts.fragment),
    ):
        if given:
            raise ValueError(f"holds {secret}; put the key into an environment variable and name it in api_key_env")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} must start with http:// or https:// and name a host")
    return url


def _check_variable(name: str) -> str:
    if name and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):  # it may be the key itself, so it is not repeated
        raise ValueError("must be the name of an environment variable, never the key itself")
    return name


Url = Annotated[str, AfterValidator(check_url)]
Variable = Annotated[str, AfterValidator(_check_variable)]
FiniteAboveZero = Annotated[AboveZero, Rule(allow_inf_nan=False)]
Share = Annotated[Float, Gt(0), Le(1)]
Split = Literal["train", "validation", "test"]
Splits = Annotated[list[Split] | None, Why("null takes all rows")]


@dataclass(frozen=True, config=STRICT_KEYS)
class EndpointConfig:
    local: bool = False  # true: our own vLLM engines (model.path, cluster, rollout) answer, no endpoint
    url: Url = ""  # an OpenAI-compatible API up to its version, e.g. http://127.0.0.1:8000/v1
    model: str = ""  # the name under which the endpoint serves the model
    api_key_env: Variable = ""  # environment variable that holds the key; "" = the endpoint wants none
    max_pixels: Annotated[Int, Ge(28 * 28)] = 1048576  # a larger image is made smaller before it is sent
    timeout_s: FiniteAboveZero = 180.0  # for one whole answer
    structured: bool = True  # ask for JSON by schema where JSON is wanted; false: by words alone
    prompt_price: NotNegative = 0.0  # per million tokens, in any currency; for the cost shown
    completion_price: NotNegative = 0.0  # likewise, of the answer


@dataclass(frozen=True, config=STRICT_KEYS)
class TextConfig:
    """How one kind of text is asked for and what it must be like."""

    url: Url = ""  # "" = the teacher's; another endpoint for this kind alone (cost is reckoned by the teacher's prices)
    api_key_env: Variable = ""  # of that other endpoint: the teacher's key goes to the teacher's address alone
    model: str = ""  # "" = the teacher's
    image: bool = True  # send the image; false for a text-only teacher
    temperature: NotNegative = 0.3  # of sampling
    top_p: Share = 0.8  # of sampling
    max_tokens: AtLeastOne = 140  # of the text; one cut off by it is rejected
    reasoning_tokens: AtLeastZero = 0  # on top of max_tokens, for a teacher that thinks before it writes
    min_words: AtLeastOne = 30  # a shorter text is rejected
    max_words: Int = 50  # a longer text is rejected
    sentences: AtLeastZero = 0  # exactly this many; 0 = any number


@dataclass(frozen=True, config=STRICT_KEYS)
class VerdictConfig:
    """How the judge is asked, and which marks (1-5) reject."""

    temperature: NotNegative = 0.0  # of sampling
    top_p: Share = 1.0  # of sampling
    max_tokens: AtLeastOne = 120  # of the judge's answer
    reasoning_tokens: AtLeastZero = 0  # on top of max_tokens, for a judge that thinks before it answers
    reject_at: Annotated[Int, Ge(0), Le(4), Why("marks are 1 to 5")] = 2  # a mark of this or less rejects the sample


@dataclass(frozen=True, config=STRICT_KEYS)
class LimitsConfig:
    concurrency: AtLeastOne = 64  # requests in flight
    requests_per_minute: NotNegative = 0.0  # requests sent; 0 = no limit
    tokens_per_minute: NotNegative = 0.0  # prompt + reserved completion tokens; 0 = no limit
    retries: AtLeastZero = 6  # after a failed request; 429 does not count
    backoff_s: FiniteAboveZero = 1.0  # first wait, doubled each time, with jitter
    backoff_max_s: FiniteAboveZero = 60.0  # the longest wait
    give_up_s: FiniteAboveZero = 1800.0  # for one sample's request with all its waits, those after 429 included
    failures_in_a_row: AtLeastOne = 16  # given up with no answer between them; refusals after an answer do not count
    stop_wait_s: NotNegative = 20.0  # after Ctrl-C, for answers in flight
    budget_tokens: AtLeastOne | None = None  # prompt + completion tokens over all runs of one output; null = no budget


@dataclass(frozen=True, config=STRICT_KEYS)
class RationaleConfig:
    prompts: str = "configs/rationale_prompts.yaml"  # what teachers and judges are told; word lists of the checks
    attempts: AtLeastOne = 3  # times a sample is asked before it is rejected for good
    splits: Splits = field(default_factory=lambda: list[Split](["train"]))  # rows looked at; null = all
    limit: AtLeastOne | None = None  # so many of these rows are looked at; null = all
    teacher: EndpointConfig = field(default_factory=EndpointConfig)
    fast: TextConfig = field(default_factory=lambda: TextConfig(sentences=2))
    slow: TextConfig = field(
        default_factory=lambda: TextConfig(temperature=0.2, top_p=0.9, max_tokens=500, min_words=125, max_words=400)
    )
    min_attributes: Annotated[Int, Ge(0), Le(8)] = 5  # of the eight that a slow text must touch, in order
    copied_words: Annotated[Int, Ge(2)] = 16  # so many in a row from the attribute texts are a copy
    judge: EndpointConfig = field(default_factory=EndpointConfig)
    verdict: VerdictConfig = field(default_factory=VerdictConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)


def check(c: RationaleConfig) -> None:
    """Check rules that join keys. UserError names the key, never a value that may be a secret."""
    for key, text in (("rationale.fast", c.fast), ("rationale.slow", c.slow)):
        if text.url and c.teacher.local:
            raise UserError(f"{key}.url: with rationale.teacher.local=true our engines write all texts; leave it out")
        if text.api_key_env and not text.url:
            raise UserError(f"{key}.api_key_env: belongs to {key}.url, which is empty; the teacher's is its own")
        if text.min_words > text.max_words:
            raise UserError(f"{key}.min_words={text.min_words}: must lie between 1 and max_words={text.max_words}")
        if text.min_words > text.max_tokens:
            raise UserError(f"{key}.max_tokens={text.max_tokens}: cannot hold min_words={text.min_words} words")
