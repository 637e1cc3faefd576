"""Find pictures for `tatar-dist score`; print scores as a table or JSON lines; write a page.

Progress and the pictures that could not be scored go to standard error.
"""

from __future__ import annotations

import base64
import glob
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, PackageLoader
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tatar_dist.assets import looked_in
from tatar_dist.data.images import UnreadableImage, decode_image
from tatar_dist.errors import UserError
from tatar_dist.run.files import write_whole, writing
from tatar_dist.run.progress import Progress
from tatar_dist.scoring.scorer import Score, read_picture

# What a directory is searched for; a file that is named itself is tried whatever it is called.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .avif .heic .heif .tif .tiff .bmp .jp2 .j2k .ppm .pgm .pbm .qoi .mpo".split()
)
NAMES = {"iqa": "quality", "iaa": "aesthetics"}
THUMBNAIL = 240  # pixels of the longer side on the page
MOST_SHOWN = 1000  # pictures on the page
FEW, MOST_CHARS = 20, 200  # pictures whose texts the table shows whole; characters of each with more pictures
TEXTS = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".md", ".yaml", ".yml", ".log", ".py"}


def find_pictures(words: Sequence[str], stdin: Any = None) -> list[str | tuple[str, bytes]]:
    """Find the pictures named by the command-line arguments `words`, each once, in order.

    A directory is searched recursively, sorted by path. `-` reads standard input: one encoded picture, or one file name
    per line. Returns file names, and ("standard input", bytes) for an encoded picture. Raises UserError for an argument
    that names no picture.
    """
    pictures: dict[str, str | tuple[str, bytes]] = {}
    for word in words:
        for picture in _from_stdin((stdin or sys.stdin.buffer).read()) if word == "-" else _files(word):
            pictures.setdefault(os.path.realpath(picture) if isinstance(picture, str) else picture[0], picture)
    return list(pictures.values())


def _files(word: str) -> list[str]:
    """Return the files of a path, a directory (hidden ones left out) or a glob.

    A path may name any file but one of text, which would start an engine for nothing.
    """
    if os.path.isdir(word):
        paths = []
        for directory, inner, names in os.walk(word, onerror=_refuse):
            inner[:] = [name for name in inner if not name.startswith(".")]  # as a Mac's ._a.jpg beside a.jpg
            paths += [os.path.join(directory, name) for name in names if not name.startswith(".")]
        pictures = sorted(p for p in paths if Path(p).suffix.lower() in SUFFIXES)
        if not pictures:
            raise UserError(f"{word}: no pictures in it (looked for {', '.join(sorted(SUFFIXES))})")
        return pictures
    if os.path.exists(word):
        if Path(word).suffix.lower() in TEXTS:
            raise UserError(f"{word}: a text file, no picture; for a list of file names: tatar-dist score - < {word}")
        return [word]
    if files := sorted(p for p in glob.glob(word, recursive=True) if os.path.isfile(p)):
        return files
    raise UserError(f"{word}: no such file, directory or glob{looked_in(word)}")


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}")


def _from_stdin(data: bytes) -> list[Any]:
    if not data.strip():
        raise UserError("-: standard input is empty: give it a picture, or file names, a line each")
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError:  # every picture format has bytes that are not UTF-8, or a NUL
        lines = []
    if not lines or b"\0" in data:
        return [("standard input", data)]
    return [line.strip() for line in lines if line.strip()]


def run(
    load: Callable[[], Iterable[Score]],
    total: int,
    as_json: bool,
    html: Path | None,
    given: Sequence[str | tuple[str, bytes]] = (),
) -> int:
    """Print scores as they arrive, partial ones after Ctrl-C; return how many pictures failed.

    `load` loads the model and returns an iterator that scores. `given`: the pictures, for thumbnails of non-files.
    """
    scores: list[Score] = []
    if html is not None:
        write_page(html, [])  # fail now, not after hours of scoring
    try:
        with Progress("score", total, unit="answer") as progress:
            arriving = load()
            progress.ready()
            for s in arriving:
                scores.append(s)
                if as_json:
                    facts = {k: v for k, v in asdict(s).items() if v not in (None, ())}
                    print(json.dumps(facts | ({"unparsed": s.unparsed} if s.samples else {})), flush=True)
                progress.update(len(scores), {})
    finally:
        _show(scores, as_json)
        if html is not None:
            write_page(html, scores, dict(g for g in given if not isinstance(g, str)))
            print(f"the page: {html}", file=sys.stderr)
    return len({s.image for s in scores if s.error})


def _show(scores: Sequence[Score], as_json: bool) -> None:
    """Print the table, and on standard error the pictures and answers without a score."""
    if not as_json and not all(s.error for s in scores):
        Console().print(as_table(scores))
    bad = _bad(scores)
    messages = [f"{name}: {error}" for name, error in bad]
    if bad:
        messages.append(f"{len(bad)} of {len({s.image for s in scores})} pictures could not be scored")
    if without := sum(s.score is None and not s.error for s in scores):
        hint = "before SFT a model does not know the format"
        messages.append(f"{without} of {len(scores)} answers hold no score; {hint}")
    if unparsed := sum(s.unparsed for s in scores):
        n = sum(len(s.samples) for s in scores)
        messages.append(f"{unparsed} of {n} sampled answers hold no score; mean and spread are of the others")
    for message in messages:
        print(f"tatar-dist: {message}", file=sys.stderr)


def _bad(scores: Iterable[Score]) -> list[tuple[str, str]]:
    """Return (picture, error) of the pictures that could not be scored."""
    return list(dict.fromkeys((s.image, s.error) for s in scores if s.error))


def as_table(scores: Sequence[Score]) -> Table:
    """Return a rich table: a row per scored picture with its name, words and scores.

    With more than `FEW` pictures each text is cut after `MOST_CHARS` characters.
    """
    tasks = [task for task in NAMES if any(s.task == task for s in scores)]
    wide = any(s.expected is not None or s.unparsed for s in scores)
    named = by_picture(scores)
    where = os.path.dirname(os.path.commonprefix(list(named))) if len(named) > 1 else ""
    table = Table(expand=True, show_lines=True)
    table.add_column(
        f"picture{f' in {escape(where)}' if where else ''}, and the model's words", overflow="fold", ratio=1
    )
    for task in tasks:
        table.add_column(NAMES[task], justify="right", no_wrap=True, min_width=13 if wide else 10)
    for name, by_task in named.items():
        text = Text(name.removeprefix(where).lstrip("/") if where else name, style="bold")
        for task in by_task:
            said = " ".join((by_task[task].rationale or by_task[task].reason or "").split())
            if len(named) > FEW and len(said) > MOST_CHARS:
                said = f"{said[:MOST_CHARS]}…"
            text.append(f"\n{f'{NAMES[task]}: ' if len(tasks) > 1 else ''}{said}" if said else "", style="not bold")
        table.add_row(text, *(_cell(by_task.get(t)) for t in tasks))
    return table


def _cell(s: Score | None) -> str:
    if s is None:
        return ""
    lines = ["no score" if s.score is None else f"{s.score:.1f}"]
    lines += [f"± {s.sd:.1f}"] if s.sd is not None else []
    lines += [f"{s.unparsed} of {len(s.samples)} unread"] if s.unparsed else []
    lines += [f"expected {s.expected:.1f}"] if s.expected is not None else []
    return "\n".join(lines)


def by_picture(scores: Iterable[Score]) -> dict[str, dict[str, Score]]:
    """Return picture -> task -> score, without pictures that could not be scored."""
    pictures: dict[str, dict[str, Score]] = {}
    for s in scores:
        if not s.error:
            pictures.setdefault(s.image, {})[s.task] = s
    return pictures


def write_page(file: Path, scores: Sequence[Score], kept: Mapping[str, bytes] = MappingProxyType({})) -> None:
    """Write a self-contained HTML page, best first; above `MOST_SHOWN` only the best and worst.

    `kept`: encoded pictures that are not files, by name. Raises UserError if the page cannot be written.
    """
    ranked = sorted(by_picture(scores).items(), key=lambda entry: _rank(entry[1].values()))
    left_out = max(0, len(ranked) - MOST_SHOWN)
    if left_out:
        ranked = ranked[: MOST_SHOWN // 2] + ranked[-MOST_SHOWN // 2 :]
    environment = Environment(loader=PackageLoader("tatar_dist.scoring", "."), autoescape=True)
    page = environment.get_template("score_page.html.j2").render(
        pictures=ranked,
        tasks=NAMES,
        bad=_bad(scores),
        left_out=left_out,
        thumbnail=lambda name: _thumbnail(name, kept.get(name)),
    )
    with writing(file):
        write_whole(file, page.encode("utf-8", "replace"))


def _rank(scores: Iterable[Score]) -> float:
    """Return a sort key: the highest mean score first, pictures without a score last."""
    values = [s.score for s in scores if s.score is not None]
    return -sum(values) / len(values) if values else 1.0


def _thumbnail(name: str, data: bytes | None) -> str | None:
    """Return a small JPEG data URI of `data`, else of file `name`; None if it cannot be read."""
    encoded = data or read_picture(name)[1]
    if isinstance(encoded, str):
        return None
    try:
        picture = decode_image(encoded, name)
    except UnreadableImage:
        return None
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
