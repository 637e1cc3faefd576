"""Pictures and chat requests in, chat requests with our wording out; chat answers in, scores out. Pure functions.

The same prompts, forbidden tokens and parser as in training: a score from here is the score that evaluation finds.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tatar_dist.data.images import MAX_ASPECT, UnreadableImage, decode_image
from tatar_dist.evaluate.metrics import spread
from tatar_dist.prompts.answer import Prompts, clamped, parse, think_text
from tatar_dist.rollout.engine import FORBIDDEN_BIAS
from tatar_dist.serve.requests import RequestRefused, from_base64
from tatar_dist.types import Task


@dataclass(frozen=True)
class Scoring:
    """What every request of a server shares. `model`: the name it serves the model by. `forbidden`: token ids."""

    model: str
    prompts: Prompts
    forbidden: tuple[int, ...]
    max_tokens: int

    @property
    def logit_bias(self) -> dict[str, float]:
        return {str(i): FORBIDDEN_BIAS for i in self.forbidden}


def upright(data: bytes) -> Image.Image:
    """Encoded bytes of any kind that `decode_image` reads -> the RGB picture. Raises RequestRefused."""
    try:
        image = decode_image(data, "image")
    except UnreadableImage as e:
        raise RequestRefused(str(e)) from None
    short, long = sorted(image.size)
    if long > MAX_ASPECT * short:
        raise RequestRefused(
            f"image: {image.width} x {image.height} pixels, longer than {MAX_ASPECT} times its shorter side"
        )
    return image


def data_url(image: Image.Image) -> str:
    """The picture, exactly, as a URL that vLLM reads."""
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)  # nobody keeps it: fast rather than small
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def messages(scoring: Scoring, task: Task, url: str) -> list[dict[str, Any]]:
    """The prompt of a task with this picture in it."""
    system, user = scoring.prompts.messages(task)
    picture = {"type": "image_url", "image_url": {"url": url}}
    return [system, {**user, "content": [picture, *(p for p in user["content"] if p["type"] != "image")]}]


def request_body(scoring: Scoring, task: Task, url: str, n: int, temperature: float) -> dict[str, Any]:
    """A chat request for `n` answers; temperature 0 is greedy."""
    return {
        "model": scoring.model,
        "messages": messages(scoring, task, url),
        "n": n,
        "temperature": temperature,
        "max_completion_tokens": scoring.max_tokens,
        "logit_bias": scoring.logit_bias,
    }


def preset(scoring: Scoring, task: Task, body: Mapping[str, Any]) -> dict[str, Any]:
    """A user's chat request to the model `task` with our wording around its picture; the text it had is left out.

    Its own options stay; where it has none, an answer is greedy, or sampled at 1 if several are asked for.

    Raises:
        RequestRefused: no picture or several, one that cannot be read, or one that is not in the request (nothing is
            fetched); a logit_bias that is none.
    """
    urls = _pictures(body.get("messages"))
    if not urls:
        raise RequestRefused(f"model {task}: no picture in the messages; add an image_url with a data URL")
    if len(urls) > 1:  # before any is decoded: each may take gigabytes
        raise RequestRefused(f"model {task}: {len(urls)} pictures in the messages; it judges one in a request")
    bias = body.get("logit_bias") or {}
    if not isinstance(bias, dict):
        raise RequestRefused("logit_bias: must be an object, {token id: bias}")
    found = {**body, "messages": messages(scoring, task, data_url(upright(from_base64(urls[0]))))}
    if body.get("temperature") is None:
        found["temperature"] = float((body.get("n") or 1) != 1)
    if body.get("max_tokens") is None and body.get("max_completion_tokens") is None:
        found["max_completion_tokens"] = scoring.max_tokens
    found["logit_bias"] = {**bias, **scoring.logit_bias}
    return found


def _pictures(given: Any) -> list[str]:
    """Data URLs of the pictures in chat messages, in order. What has no known shape is left for vLLM to refuse."""
    contents = [m.get("content") for m in given if isinstance(m, dict)] if isinstance(given, list) else []
    parts = [p for c in contents if isinstance(c, list) for p in c if isinstance(p, dict) and "image_url" in p]
    urls = [p["image_url"].get("url") if isinstance(p["image_url"], dict) else p["image_url"] for p in parts]
    for url in urls:
        if not isinstance(url, str) or not url.startswith("data:"):
            raise RequestRefused("image_url: must be a data URL, data:image/…;base64,…; this server fetches no picture")
    return urls


def answer(choice: Mapping[str, Any]) -> dict[str, Any]:
    """A choice of a chat completion -> score (0-100; None if it did not parse), rationale, reason, truncated."""
    text, cut = choice["message"]["content"] or "", choice["finish_reason"] == "length"
    parsed = parse(text)
    reason = parsed.reason
    if reason and cut:
        reason = f"cut off at the longest answer allowed, {reason}"
    return {"score": clamped(parsed.value), "rationale": think_text(text).strip(), "reason": reason, "truncated": cut}


def summary(greedy: Mapping[str, Any], sampled: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A task's answer to `/score`.

    `score`, `rationale`, `reason` (why there is no score) are the greedy answer's. `n`, `parsed`, `truncated` count the
    sampled ones, `mean` and `sd` (of a sample: n - 1) are of those that parsed; None where too few did.
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
