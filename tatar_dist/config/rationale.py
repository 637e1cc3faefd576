"""The `rationale` section of the config: teacher, judge, and their limits.

config/schema.py merges YAML and `key=value` words into these dataclasses, and `check` applies their rules. Figures of
the method are from METHOD section "Rationale construction" of the paper's code. API keys never stand here:
`api_key_env` names the environment variable that holds one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlsplit

from tatar_dist.errors import UserError
from tatar_dist.types import SPLITS


@dataclass
class EndpointConfig:
    local: bool = False  # true: our own vLLM engines (model.path, cluster, rollout) answer, no endpoint
    url: str = ""  # an OpenAI-compatible API up to its version, e.g. http://127.0.0.1:8000/v1
    model: str = ""  # the name under which the endpoint serves the model
    api_key_env: str = ""  # environment variable that holds the key; "" = the endpoint wants none
    max_pixels: int = 1048576  # a larger image is made smaller before it is sent
    timeout_s: float = 180.0  # for one whole answer
    structured: bool = True  # ask for JSON by schema where JSON is wanted; false: by words alone
    prompt_price: float = 0.0  # per million tokens, in any currency; for the cost shown
    completion_price: float = 0.0  # likewise, of the answer


@dataclass
class TextConfig:
    """How one kind of text is asked for and what it must be like."""

    url: str = ""  # "" = the teacher's; another endpoint for this kind alone (cost is reckoned by the teacher's prices)
    api_key_env: str = ""  # of that other endpoint: the teacher's key goes to the teacher's address alone
    model: str = ""  # "" = the teacher's
    image: bool = True  # send the image; false for a text-only teacher
    temperature: float = 0.3  # of sampling
    top_p: float = 0.8  # of sampling
    max_tokens: int = 140  # of the text; one cut off by it is rejected
    reasoning_tokens: int = 0  # on top of max_tokens, for a teacher that thinks before it writes
    min_words: int = 30  # a shorter text is rejected
    max_words: int = 50  # a longer text is rejected
    sentences: int = 0  # exactly this many; 0 = any number


@dataclass
class VerdictConfig:
    """How the judge is asked, and which marks (1-5) reject."""

    temperature: float = 0.0  # of sampling
    top_p: float = 1.0  # of sampling
    max_tokens: int = 120  # of the judge's answer
    reasoning_tokens: int = 0  # on top of max_tokens, for a judge that thinks before it answers
    reject_at: int = 2  # a mark of this or less rejects the sample


@dataclass
class LimitsConfig:
    concurrency: int = 64  # requests in flight
    requests_per_minute: float = 0.0  # requests sent; 0 = no limit
    tokens_per_minute: float = 0.0  # prompt + reserved completion tokens; 0 = no limit
    retries: int = 6  # after a failed request; 429 does not count
    backoff_s: float = 1.0  # first wait, doubled each time, with jitter
    backoff_max_s: float = 60.0  # the longest wait
    give_up_s: float = 1800.0  # for one sample's request with all its waits, those after 429 included
    failures_in_a_row: int = 16  # given up with no answer between them; refusals after an answer do not count
    stop_wait_s: float = 20.0  # after Ctrl-C, for answers in flight
    budget_tokens: int | None = None  # prompt + completion tokens over all runs of one output; null = no budget


@dataclass
class RationaleConfig:
    prompts: str = "configs/rationale_prompts.yaml"  # what teachers and judges are told; word lists of the checks
    attempts: int = 3  # times a sample is asked before it is rejected for good
    splits: list[str] | None = field(default_factory=lambda: ["train"])  # whose rows are looked at; null = all
    limit: int | None = None  # so many of these rows are looked at; null = all
    teacher: EndpointConfig = field(default_factory=EndpointConfig)
    fast: TextConfig = field(default_factory=lambda: TextConfig(sentences=2))
    slow: TextConfig = field(
        default_factory=lambda: TextConfig(temperature=0.2, top_p=0.9, max_tokens=500, min_words=125, max_words=400)
    )
    min_attributes: int = 5  # of the eight that a slow text must touch, in order
    copied_words: int = 16  # so many in a row from the attribute texts are a copy
    judge: EndpointConfig = field(default_factory=EndpointConfig)
    verdict: VerdictConfig = field(default_factory=VerdictConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)


ALLOWED_QUERY = ("api-version",)  # what some endpoints want in the address; anything else might be a secret
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_url(url: str, key: str) -> None:
    """Refuse an address that is none, or that carries a secret; such an address is not repeated in the error."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise UserError(f"{key}: not a valid address") from None
    if "@" in parts.netloc:
        raise UserError(
            f"{key}: holds a user name or password; put the key into an environment variable and name it in api_key_env"
        )
    if any(name not in ALLOWED_QUERY for name, _ in parse_qsl(parts.query, keep_blank_values=True)) or parts.fragment:
        raise UserError(
            f"{key}: holds a query (?…), which may carry a key; put the key into an environment variable and name it "
            "in api_key_env"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{key}={url!r}: must start with http:// or https:// and name a host")


def _at_least(key: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:  # negated, so that NaN is refused too
        raise UserError(f"{key}={value}: must be at least {least:g}")


def _above_zero(key: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{key}={value}: must be above 0")


def _check_sampling(key: str, c: TextConfig | VerdictConfig) -> None:
    _at_least(f"{key}.temperature", c.temperature, 0)
    _at_least(f"{key}.max_tokens", c.max_tokens, 1)
    _at_least(f"{key}.reasoning_tokens", c.reasoning_tokens, 0)
    if not 0 < c.top_p <= 1:
        raise UserError(f"{key}.top_p={c.top_p}: must lie above 0 and at most at 1")


def _check_variable(key: str, name: str) -> None:
    if name and not _VARIABLE.fullmatch(name):  # it may be the key itself, so it is not repeated
        raise UserError(f"{key}: must be the name of an environment variable, never the key itself")


def _check_endpoint(key: str, c: EndpointConfig) -> None:
    if c.url:
        check_url(c.url, f"{key}.url")
    _check_variable(f"{key}.api_key_env", c.api_key_env)
    _at_least(f"{key}.max_pixels", c.max_pixels, 28 * 28)
    _above_zero(f"{key}.timeout_s", c.timeout_s)
    _at_least(f"{key}.prompt_price", c.prompt_price, 0)
    _at_least(f"{key}.completion_price", c.completion_price, 0)


def check(c: RationaleConfig) -> None:
    """Rules that types cannot say. Raises UserError naming the key, never a value that may be a secret."""
    _at_least("rationale.attempts", c.attempts, 1)
    _at_least("rationale.limit", c.limit, 1)
    for split in c.splits or ():
        if split not in SPLITS:
            raise UserError(f"rationale.splits: {split!r} is none of {', '.join(SPLITS)}; null takes all rows")
    _at_least("rationale.min_attributes", c.min_attributes, 0)
    _at_least("rationale.copied_words", c.copied_words, 2)
    if c.min_attributes > 8:
        raise UserError(f"rationale.min_attributes={c.min_attributes}: there are eight attributes")
    for name, text in (("fast", c.fast), ("slow", c.slow)):
        key = f"rationale.{name}"
        _check_sampling(key, text)
        if text.url:
            check_url(text.url, f"{key}.url")
        _check_variable(f"{key}.api_key_env", text.api_key_env)
        if text.url and c.teacher.local:
            raise UserError(
                f"{key}.url: with rationale.teacher.local=true our own engines write all texts; leave it out"
            )
        if text.api_key_env and not text.url:
            raise UserError(f"{key}.api_key_env: belongs to {key}.url, which is empty; the teacher's is its own")
        _at_least(f"{key}.sentences", text.sentences, 0)
        if not 1 <= text.min_words <= text.max_words:
            raise UserError(f"{key}.min_words={text.min_words}: must lie between 1 and max_words={text.max_words}")
        if text.min_words > text.max_tokens:
            raise UserError(f"{key}.max_tokens={text.max_tokens}: cannot hold min_words={text.min_words} words")
    _check_sampling("rationale.verdict", c.verdict)
    if not 0 <= c.verdict.reject_at <= 4:
        raise UserError(f"rationale.verdict.reject_at={c.verdict.reject_at}: marks are 1 to 5, so 0 to 4")
    _check_endpoint("rationale.teacher", c.teacher)
    _check_endpoint("rationale.judge", c.judge)
    limits = c.limits
    for name in ("concurrency", "failures_in_a_row"):
        _at_least(f"rationale.limits.{name}", getattr(limits, name), 1)
    for name in ("requests_per_minute", "tokens_per_minute", "retries", "stop_wait_s"):
        _at_least(f"rationale.limits.{name}", getattr(limits, name), 0)
    for name in ("backoff_s", "backoff_max_s", "give_up_s"):
        _above_zero(f"rationale.limits.{name}", getattr(limits, name))
    _at_least("rationale.limits.budget_tokens", limits.budget_tokens, 1)
