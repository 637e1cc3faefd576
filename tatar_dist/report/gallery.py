"""Select the answers to show, with their pictures as data URIs.

Takes predictions of the models in order of training, or sampled completions, and returns `Card`s. The selection is
deterministic: four answers that training moved closest to the target, the four best (one per quarter of the target
range, for variety) and the four worst. An image is shown once.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from tatar_dist.data.images import decode_image
from tatar_dist.data.manifest import Manifest, read_manifest
from tatar_dist.prompts.answer import clamped
from tatar_dist.report.reading import Rollouts, RunFiles, clean, noted
from tatar_dist.report.verdict import TASK_NAMES, name_of

EACH = 4
_THINK = re.compile(r"<think>(.*?)(?:</think>|<answer>|$)", re.IGNORECASE | re.DOTALL)
KEEP_BYTES, KEEP_SIDE = 48_000, 400  # a picture within both is embedded as it is: JPEG would add a distortion to judge
SMALL_SIDE = 320

Key = tuple[str, str]  # data set, sample id


@dataclass(frozen=True)
class Card:
    """One image and its scores. scores: (model, score or None); `why`: improved | best | worst."""

    why: str
    sample_id: str
    image: str | None
    target: float
    scores: list[tuple[str, float | None]]
    text: str
    has_think: bool


def key_of(row: dict[str, Any]) -> Key:
    """Return the key of an image, (data set, sample id): ids are unique only within a data set."""
    return str(row["dataset"]), str(row["sample_id"])


def error(row: dict[str, Any]) -> float | None:
    """Return |prediction - target| in points, prediction clamped to 0-100; None without a score."""
    prediction = clamped(row["prediction"])
    return None if prediction is None else abs(prediction - row["target"])


def choose(last: Sequence[dict[str, Any]], before: dict[Key, dict[str, Any]]) -> list[tuple[str, Key]]:
    """Select up to 3 x EACH (why, key). last: final model's rows; before: the previous by key."""
    chosen: dict[str, list[Key]] = {"improved": [], "best": [], "worst": []}

    def take(why: str, rows: Iterable[dict[str, Any]], most: int) -> None:
        taken = {key for keys in chosen.values() for key in keys}
        chosen[why] += islice((key for row in rows if (key := key_of(row)) not in taken), max(0, most))

    scored = [(e, r) for r in last if (e := error(r)) is not None]
    both = [(e, r, before[key_of(r)]) for e, r in scored if key_of(r) in before]
    gains = [(was - e, r) for e, r, earlier in both if (was := error(earlier)) is not None and was > e]
    take("improved", (r for _, r in sorted(gains, key=lambda g: (-g[0], g[1]["sample_id"]))), EACH)
    # At most half of the worst are answers without a score: more of them would all say the same.
    take("worst", (r for r in last if r["prediction"] is None), EACH // 2)
    wrong = sorted(scored, key=lambda s: (-s[0], s[1]["sample_id"]))
    take("worst", (r for _, r in wrong[: len(wrong) // 2]), EACH - len(chosen["worst"]))
    right = [r for _, r in sorted(scored, key=lambda s: (s[0], s[1]["sample_id"]))]
    for quarter in range(EACH):
        take("best", (r for r in right if min(int(r["target"] * EACH / 100), EACH - 1) == quarter), 1)
    take("best", right, EACH - len(chosen["best"]))
    return [(why, key) for why, keys in chosen.items() for key in keys]


def rationale(completion: str | None) -> tuple[str, bool]:
    """Return (the think text, True), or (the whole completion, False) if it has none."""
    text = clean(completion)
    think = _THINK.search(text)
    inside = think.group(1).strip() if think else ""
    return (inside, True) if inside else (text, False)


class Pictures:
    """Find samples by id in manifests, encode their pictures as data URIs; errors go to `notes`."""

    def __init__(self, manifests: Sequence[Path], image_root: str | None, notes: list[str]) -> None:
        self._notes = notes
        self._where: dict[Key, tuple[Manifest, int]] = {}
        for path in manifests:
            with noted(path, notes):
                manifest = read_manifest(path, image_root)
                for first, table in manifest.tables(["dataset", "sample_id"]):
                    keys = zip(*(column.to_pylist() for column in table.columns), strict=True)
                    self._where |= {key: (manifest, i) for i, key in enumerate(keys, first)}

    def uri(self, key: Key) -> str | None:
        """Return data:image/...;base64,..., or None if the picture is missing or cannot be decoded."""
        if key in self._where:
            manifest, i = self._where[key]
            with noted(manifest.path, self._notes):
                return _data_uri(manifest.get(i).image, key[1])
        return None


def _data_uri(data: bytes, name: str) -> str:
    """Encode a picture, scaled down if it is large. Raises UnreadableImage."""
    picture = decode_image(data, name)  # also proves that these bytes are a picture, before embedding them
    with Image.open(io.BytesIO(data)) as opened:
        kind = (opened.format or "").lower()
    if kind not in ("png", "jpeg", "webp") or len(data) > KEEP_BYTES or max(picture.size) > KEEP_SIDE:
        picture.thumbnail((SMALL_SIDE, SMALL_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=88)
        kind, data = "jpeg", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def walls(run: RunFiles, rollouts: Rollouts | None, pictures: Pictures) -> list[tuple[str, str, list[Card]]]:
    """Return (heading, task, cards) of held-out answers, else of the last sampled completions.

    `rollouts` are those of the last GRPO training. For these, an image is represented by its first completion, and
    "improved" compares its first visit with its last one.
    """
    if any(e.predictions for e in run.evaluations):
        by_model = [(e.model, {key_of(p): p for p in e.predictions}) for e in run.evaluations if e.predictions]
        groups = [(name_of(run, d), run.task(d), run.evaluations[-1].of(d)) for d in run.datasets]
        # "Improved" is measured from SFT: the base model's scores, where it gives any, are noise.
        before = by_model[-2][1] if len(by_model) > 1 else {}
    elif rollouts is not None:
        before, last = visits(rollouts)
        by_model = [("asked first", before), ("asked last", last)] if before else [("completion", last)]
        groups = [(n, t, [r for r in last.values() if r["task"] == t]) for t, n in TASK_NAMES.items()]
    else:
        return []
    result = []
    for name, task, rows in groups:
        row_of, cards = {key_of(r): r for r in rows}, []
        for why, key in choose(rows, before):
            row = row_of[key]
            completion = row["completion"] if "completion" in row or rollouts is None else rollouts.text(row)
            text, has_think = rationale(completion)
            scores = [(model, answers[key]["prediction"]) for model, answers in by_model if key in answers]
            image = pictures.uri(key)
            cards.append(Card(why, key[1], image, row["target"], scores, text, has_think))
        if cards:
            result.append((name, task, cards))
    return result


def visits(rollouts: Rollouts) -> tuple[dict[Key, dict[str, Any]], dict[Key, dict[str, Any]]]:
    """Return the (first, last) visits of images by key, each visit as its first completion.
    The last visits are those in the late steps; a first visit is included only if it is in an earlier step."""
    last: dict[Key, dict[str, Any]] = {}
    for row in rollouts.part(late=True):
        if row["file"] > last.get(key_of(row), {"file": -1})["file"]:
            last[key_of(row)] = row
    first: dict[Key, dict[str, Any]] = {}
    for row in rollouts.rows:
        if (key := key_of(row)) in last and row["file"] < last[key]["file"]:
            first.setdefault(key, row)
    return first, last
