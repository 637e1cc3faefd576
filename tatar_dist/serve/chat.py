"""Build chat requests with our prompts, and read scores from the answers. Pure functions.

Prompts, forbidden tokens and parser are those of training, so that scores agree with evaluation.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tatar_dist.data.images import MAX_ASPECT, UnreadableImage, decode_image
from tatar_dist.evaluate.metrics import spread
from tatar_dist.prompts.answer import Prompts, clamped, parse, think_text
from tatar_dist.rollout.engine import FORBIDDEN_BIAS
from tatar_dist.serve.requests import RequestRefused, from_base64
from tatar_dist.types import Task


@dataclass(frozen=True)
class Scoring:
    """Settings shared by all requests. `model`: served model name. `forbidden`: token ids."""

    model: str
    prompts: Prompts
    forbidden: tuple[int, ...]
    max_tokens: int

    @property
    def logit_bias(self) -> dict[str, float]:
        return {str(i): FORBIDDEN_BIAS for i in self.forbidden}


def picture_url(data: bytes) -> str:
    """Decode a picture of any format; encode it, upright and lossless, as vLLM's PNG data URL.

    Raises RequestRefused for data that cannot be decoded, and for a picture that is too long for its width.
    """
    try:
        image = decode_image(data, "image")
    except UnreadableImage as e:
        raise RequestRefused(str(e)) from None
    short, long = sorted(image.size)
    if long > MAX_ASPECT * short:
        raise RequestRefused(f"image: {long} x {short} pixels, longer than {MAX_ASPECT} times its shorter side")
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)  # short-lived: fast rather than small
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def messages(scoring: Scoring, task: Task, url: str) -> list[dict[str, Any]]:
    """Return the chat messages of a task's prompt with this picture."""
    system, user = scoring.prompts.messages(task)
    picture = {"type": "image_url", "image_url": {"url": url}}
    return [system, {**user, "content": [picture, *(p for p in user["content"] if p["type"] != "image")]}]


def request_body(scoring: Scoring, task: Task, url: str, n: int, temperature: float) -> dict[str, Any]:
    """Return the body of a chat request for `n` answers. Temperature 0 is greedy."""
    return {
        "model": scoring.model,
        "messages": messages(scoring, task, url),
        "n": n,
        "temperature": temperature,
        "max_completion_tokens": scoring.max_tokens,
        "logit_bias": scoring.logit_bias,
    }


def preset(scoring: Scoring, task: Task, body: Mapping[str, Any]) -> dict[str, Any]:
    """Replace a user's text in a chat request to model `task` by our prompt around its picture.

    The request's own options are kept. The default is greedy, or temperature 1 if several answers are requested.

    Raises:
        RequestRefused: no picture or several, one that cannot be read, or one that is not in the request (nothing is
            fetched); an invalid logit_bias.
    """
    urls = _pictures(body.get("messages"))
    if not urls:
        raise RequestRefused(f"model {task}: no picture in the messages; add an image_url with a data URL")
    if len(urls) > 1:  # before any is decoded: each may take gigabytes
        raise RequestRefused(f"model {task}: {len(urls)} pictures in the messages; it judges one in a request")
    bias = body.get("logit_bias") or {}
    if not isinstance(bias, dict):
        raise RequestRefused("logit_bias: must be an object, {token id: bias}")
    request = {**body, "messages": messages(scoring, task, picture_url(from_base64(urls[0])))}
    if body.get("temperature") is None:
        request["temperature"] = float((body.get("n") or 1) != 1)
    if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        request["max_completion_tokens"] = scoring.max_tokens
    request["logit_bias"] = {**bias, **scoring.logit_bias}
    return request


def _pictures(given: Any) -> list[str]:
    """Return the pictures' data URLs in order; vLLM refuses messages of an unknown structure."""
    contents = [m.get("content") for m in given if isinstance(m, dict)] if isinstance(given, list) else []
    parts = [p for c in contents if isinstance(c, list) for p in c if isinstance(p, dict) and "image_url" in p]
    urls = [p["image_url"].get("url") if isinstance(p["image_url"], dict) else p["image_url"] for p in parts]
    for url in urls:
        if not isinstance(url, str) or not url.startswith("data:"):
            raise RequestRefused("image_url: must be a data URL (data:image/…;base64,…); this server fetches no URLs")
    return urls


def answer(choice: Mapping[str, Any]) -> dict[str, Any]:
    """Parse a choice: score (0-100, None if it did not parse), rationale, reason, truncated."""
    text, cut = choice["message"]["content"] or "", choice["finish_reason"] == "length"
    parsed = parse(text)
    reason = f"cut off at the longest answer allowed, {parsed.reason}" if parsed.reason and cut else parsed.reason
    return {"score": clamped(parsed.value), "rationale": think_text(text).strip(), "reason": reason, "truncated": cut}


def summary(greedy: Mapping[str, Any], sampled: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one task's part of the `/score` reply.

    `score`, `rationale` and `reason` (why there is no score) are of the greedy answer. `n`, `parsed` and `truncated`
    count the sampled ones. `mean` and `sd` (divisor n - 1) are over those that parsed, None if there are too few.
    """
    scores = [s["score"] for s in sampled]
    mean, sd = spread(scores)
    return {
        "score": greedy["score"],
        "rationale": greedy["rationale"],
        "reason": greedy["reason"],
        "samples": list(sampled),
        "mean": mean,
        "sd": sd,
        "n": len(sampled),
        "parsed": sum(score is not None for score in scores),
        "truncated": sum(s["truncated"] for s in sampled),
    }
