"""Read eight aesthetic texts per image: ArtiMuse's conversations or `aesthetic_attributes`.

A file has rows `{"image", "conversations": [{"from", "value"}, …]}` (a question that names one attribute, then the
answer) or `{"image", "aesthetic_attributes": {name: text}}`, as JSON lines or a JSON list. Texts are returned by image,
with the method's names and order (`types.EIGHT`). Layout: the conversion script of yinwen2019/TATAR. The conversations
themselves were not seen, so a question must name exactly one of the eight, in any case; nothing else is assumed.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tatar_dist.data.imports.annotations import json_type, parse
from tatar_dist.errors import UserError
from tatar_dist.types import EIGHT


def _letters(name: str) -> str:
    """Reduce a name to its letters without "and": `A & B`, `a_b` and `A and B` become equal."""
    return "".join(w for w in re.findall(r"[a-z]+", name.casefold()) if w != "and")


_NAMES = {_letters(name): name for name in EIGHT}


def place(name: str) -> int:
    """Return an attribute's index among the eight; 8 for any other name."""
    return [*_NAMES, _letters(name)].index(_letters(name))


def in_order(texts: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Return texts by the method's names, in its order. Raises UserError for an unusable pair."""
    attributes: dict[str, str] = {}
    for key, text in texts:
        name = _NAMES.get(_letters(key))
        if name is None:
            raise UserError(f"{key!r} is none of the eight attributes ({', '.join(EIGHT)})")
        if not isinstance(text, str):
            raise UserError(f"{name!r} is {json_type(text)}, must be text")
        if not text.strip() or not is_text(text):
            raise UserError(f"{name!r} has no usable text")
        if name in attributes:
            raise UserError(f"{name!r} is there twice")
        attributes[name] = text.strip()
    if not attributes:
        raise UserError("no attribute is given")
    return {name: attributes[name] for name in EIGHT if name in attributes}


def is_text(value: str) -> bool:
    """Return whether text can be encoded, unlike a lone surrogate, which JSON can express."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_attributes(data: bytes, file: str, encoding: str | None = None) -> dict[str, dict[str, str]]:
    """Read attribute texts; return {image name: {attribute: text}}.

    Raises UserError naming FILE:LINE of an invalid row, or of an attribute given twice with different texts.
    """
    parsed = parse(data, file, encoding, [])
    if parsed.kind not in ("json", "jsonl"):
        raise UserError(f"{file}: attributes must be JSON lines or a JSON list, this looks like {parsed.kind}")
    parsed.check()
    attributes: dict[str, dict[str, str]] = {}
    for row, at in zip(parsed.rows, parsed.at, strict=True):
        try:
            image, texts = _image_and_texts(row)
            earlier = attributes.get(image, {})
            for name, text in texts.items():
                if earlier.get(name, text) != text:
                    raise UserError(f"image {image!r}: {name!r} is given twice, with different texts")
        except UserError as e:
            raise UserError(f"{at}: {e}") from None
        attributes[image] = in_order((earlier | texts).items())
    return attributes


def join(attributes: Mapping[str, dict[str, str]], images: list[str]) -> list[dict[str, str] | None]:
    """Return each image's texts, by its name, else by its file name if unique in `attributes`."""
    by_file: dict[str, dict[str, str] | None] = {}
    for image, texts in attributes.items():
        name = posixpath.basename(image)
        by_file[name] = None if name in by_file else texts
    return [attributes.get(image) or by_file.get(posixpath.basename(image)) for image in images]


def _image_and_texts(row: dict[str, Any]) -> tuple[str, dict[str, str]]:
    image = row.get("image")
    if not isinstance(image, str) or not image.strip():
        raise UserError("key 'image' must be a file name")
    if "conversations" in row:
        return image.strip(), in_order(_conversation(row["conversations"]))
    if isinstance(row.get("aesthetic_attributes"), dict):
        return image.strip(), in_order(row["aesthetic_attributes"].items())
    raise UserError("neither 'conversations' (a list) nor 'aesthetic_attributes' (an object) is there")


def _conversation(turns: Any) -> Iterable[tuple[str, str]]:
    """Yield (attribute, answer) for each question and answer."""
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise UserError("'conversations' must be a list of questions, each followed by its answer")
    values = [turn.get("value") if isinstance(turn, dict) else None for turn in turns]
    for question, answer in zip(values[::2], values[1::2], strict=True):
        if not isinstance(question, str) or not isinstance(answer, str):
            raise UserError("every turn of 'conversations' needs a text 'value'")
        named = [name for letters, name in _NAMES.items() if letters in _letters(question)]
        if len(named) != 1:
            raise UserError(f"a question must name one of the eight attributes, names {len(named)}")
        yield named[0], answer
