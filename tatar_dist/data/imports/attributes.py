"""Read eight aesthetic texts per image: ArtiMuse's conversations or `aesthetic_attributes`.

A file has rows `{"image", "conversations": [{"from", "value"}, …]}` (a question that names one attribute, then the
answer) or `{"image", "aesthetic_attributes": {name: text}}`, as JSON lines or a JSON list. Texts are returned by image,
with the method's names and order (`types.EIGHT`). Layout: the conversion script of yinwen2019/TATAR. The conversations
themselves were not seen, so a question must name exactly one of the eight, in any case; nothing else is assumed.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from tatar_dist.data.imports.annotations import json_type, parse
from tatar_dist.errors import UserError


def _letters(name: str) -> str:
    """Normalise a name: `composition_structure` equals `Composition & Structure` and `composition and structure`."""
    return "".join(w for w in re.findall(r"[a-z]+", name.casefold()) if w != "and")


@cache
def _names() -> dict[str, str]:
    """Return the eight names by their letters, in the method's order."""
    from tatar_dist.types import EIGHT

    return {_letters(name): name for name in EIGHT}


def place(name: str) -> int:
    """Return an attribute's index among the eight; 8 for any other name."""
    known = list(_names())
    return known.index(_letters(name)) if _letters(name) in known else len(known)


def in_order(texts: Mapping[str, Any]) -> dict[str, str]:
    """Return texts under the method's names, in its order. Raises UserError for an unknown name, no text, none."""
    attributes: dict[str, str] = {}
    for key, text in texts.items():
        name = _names().get(_letters(key))
        if name is None:
            raise UserError(f"{key!r} is none of the eight attributes ({', '.join(_names().values())})")
        if not isinstance(text, str):
            raise UserError(f"{name!r} is {json_type(text)}, must be text")
        if not text.strip() or not is_text(text):
            raise UserError(f"{name!r} has no usable text")
        if name in attributes:
            raise UserError(f"{name!r} is there twice")
        attributes[name] = text.strip()
    if not attributes:
        raise UserError("no attribute is given")
    return {name: attributes[name] for name in _names().values() if name in attributes}


def is_text(value: str) -> bool:
    """Whether text can be encoded: False for a lone surrogate, which JSON can express but no file can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_attributes(data: bytes, file: str, encoding: str | None = None) -> dict[str, dict[str, str]]:
    """Read attribute texts; return {image name: {attribute: text}}.

    Raises:
        UserError: an unreadable file or one without rows; with FILE:LINE, an invalid row, or an attribute of an image
            given twice with different texts.
    """
    rows = parse(data, file, encoding, [])
    if rows.kind not in ("json", "jsonl"):
        raise UserError(f"{file}: attributes must be JSON lines or a JSON list, this looks like {rows.kind}")
    if rows.bad:
        i = min(rows.bad)
        raise UserError(f"{rows.where(i)}: {rows.bad[i].text}")
    attributes: dict[str, dict[str, str]] = {}
    for i, row in enumerate(rows.rows):
        try:
            image, texts = _row(row)
            earlier = attributes.get(image, {})
            for name in texts.keys() & earlier.keys():
                if texts[name] != earlier[name]:
                    raise UserError(f"image {image!r}: {name!r} is given twice, with different texts")
            attributes[image] = in_order(earlier | texts)
        except UserError as e:
            raise UserError(f"{rows.where(i)}: {e}") from None
    if not attributes:
        raise UserError(f"{file}: there are no rows")
    return attributes


def join(attributes: Mapping[str, dict[str, str]], images: list[str]) -> list[dict[str, str] | None]:
    """Return the texts of each image: by its name, else by its file name if that is unique in `attributes`."""
    by_file: dict[str, str | None] = {}
    for image in attributes:
        name = posixpath.basename(image)
        by_file[name] = None if name in by_file else image
    exact = (attributes.get(image) for image in images)
    return [
        texts if texts is not None else attributes.get(by_file.get(posixpath.basename(image)) or "")
        for texts, image in zip(exact, images, strict=True)
    ]


def _row(row: dict[str, Any]) -> tuple[str, dict[str, str]]:
    image = row.get("image")
    if not isinstance(image, str) or not image.strip():
        raise UserError("key 'image' must be a file name")
    if "conversations" in row:
        return image.strip(), _conversation(row["conversations"])
    if isinstance(row.get("aesthetic_attributes"), dict):
        return image.strip(), in_order(row["aesthetic_attributes"])
    raise UserError("neither 'conversations' (a list) nor 'aesthetic_attributes' (an object) is there")


def _conversation(turns: Any) -> dict[str, str]:
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise UserError("'conversations' must be a list of questions, each followed by its answer")
    values = [turn.get("value") if isinstance(turn, dict) else None for turn in turns]
    attributes: dict[str, str] = {}
    for question, answer in zip(values[::2], values[1::2], strict=True):
        if not isinstance(question, str) or not isinstance(answer, str):
            raise UserError("every turn of 'conversations' needs a text 'value'")
        letters = _letters(question)
        named = [name for key, name in _names().items() if key in letters]
        if len(named) != 1:
            raise UserError(f"a question must name one of the eight attributes, names {len(named)}")
        if named[0] in attributes:
            raise UserError(f"{named[0]!r} is there twice")
        attributes[named[0]] = answer
    return in_order(attributes)
