"""Draw contact sheets: of a manifest, `tatar-dist data show`; of pairs, `data validate`.

A sheet shows each image above its sample id, score, task and the first words of its rationale. An image that
does not decode is marked. Texts and scores are streamed; images are read only for the rows shown.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tatar_dist.data.checks.validation import Checked, Key, PoolFacts, Validation, rows_by_pool
from tatar_dist.data.images import UnreadableImage, decode_image
from tatar_dist.data.manifest import Manifest, open_parquet, read_manifest
from tatar_dist.data.schema import SCHEMA
from tatar_dist.errors import UserError
from tatar_dist.run.files import probe, writing, written_whole

SORTS = {"score": "from the lowest score to the highest", "random": "at random", "row": "in the order of the file"}
SCALE = 2  # pixels a point, so that small type is crisp
TILE, CAPTION, GAP, MARGIN, HEAD = 190, 74, 18, 28, 58  # points
ACROSS, PAIRS = 6, 24  # tiles in a line; pairs on a sheet of near-duplicates
PAPER, TILE_PAPER, INK, QUIET, RED = "#ffffff", "#f3f5f7", "#22303c", "#71808c", "#b8433b"
TASK_INK = {"iqa": "#2f6f94", "iaa": "#a9701f"}


@dataclass(frozen=True)
class Shown:
    """Result of `show`."""

    path: Path
    rows: int
    pools: list[PoolFacts]
    images: str  # where the images lie, in words
    chosen: list[int]  # rows on the sheet
    broken: int  # images on it that cannot be shown
    absent: int  # of these, files that cannot be read
    sheet: Path

    def as_json(self) -> dict[str, Any]:
        texts = {"path": str(self.path), "rows": self.rows, "images": self.images, "sheet": str(self.sheet)}
        numbers = {"shown": self.chosen, "broken": self.broken, "absent": self.absent}
        return texts | numbers | {"pools": [p.as_json() for p in self.pools]}


def show(path: Path, n: int, sort: str, dataset: str | None, sheet: Path, image_root: Path | None = None) -> Shown:
    """Summarise a manifest and draw `n` of its rows.

    `image_root` replaces the stored base of image paths. Raises UserError for an unknown `sort` or `dataset`, a
    manifest that is invalid or has no rows, and a sheet that cannot be written.
    """
    if sort not in SORTS:
        raise UserError(f"--sort {sort}: must be one of {', '.join(SORTS)}")
    probe(sheet)
    manifest = read_manifest(path, image_root)
    try:
        pools, rows, scores = _survey(manifest, dataset)
    except UnicodeDecodeError:  # in a column that read_manifest does not check
        raise UserError(f"{path}: some text is not UTF-8; tatar-dist data validate {path} lists the rows") from None
    if not len(rows):
        there = ", ".join(sorted({p.dataset for p in manifest.pools}))
        raise UserError(f"{path}: " + (f"no row of data set {dataset!r}; it has {there}" if there else "has no rows"))
    chosen = chosen_rows(rows, scores, n, sort)
    subtitle = f"{len(chosen)} of {len(rows):,} rows, {SORTS[sort]}"
    page, broken, absent = drawn_sheet(path.name, [(manifest, row) for row in chosen], subtitle)
    with writing(sheet):
        sheet.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(sheet) as place:
            page.save(place, "PNG")
    where = "pictures in the rows" if manifest.embedded else f"pictures in {manifest.image_root}"
    return Shown(path, len(manifest), pools, where, chosen, broken, absent, sheet)


def near_duplicates_sheet(validation: Validation, manifest: Checked) -> bytes:
    """Return a JPEG of the PAIRS most alike rows, each beside its held-out near-duplicate."""
    tiles, opened = [], {}
    own = [pair for pair in validation.near_pairs if manifest.first <= pair[0] < manifest.first + manifest.rows]
    for row in chain(*(pair[:2] for pair in own[:PAIRS])):
        home = next(m for m in validation.manifests if m.first <= row < m.first + m.rows)
        if home.first not in opened:
            file, *_ = open_parquet(home.path)
            with file:
                starts = np.cumsum([0, *(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))])
                columns = tuple(
                    n for n in SCHEMA.names if n in file.schema_arrow.names
                )  # read_manifest checks all rows
            opened[home.first] = Manifest(home.path, (), starts, columns, home.root, True, "")
        tiles.append((opened[home.first], row - home.first))
    shown = f"{len(tiles) // 2} of {len(own):,} rows with a near-duplicate in a held-out split, the most alike first"
    page, *_ = drawn_sheet(manifest.path.name, tiles, f"{shown}: left the row, right the held-out one")
    buffer = io.BytesIO()
    page.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _survey(manifest: Manifest, dataset: str | None) -> tuple[list[PoolFacts], np.ndarray, np.ndarray]:
    """Return statistics of all pools, and row numbers and scores of the selected data set."""
    columns = ("dataset", "task", "split", "score", "score_std", "rationale", "attributes")
    facts: dict[Key, PoolFacts] = {}
    rows: list[int] = []
    scores: list[float] = []
    for first, table in manifest.tables(columns):
        values = {name: table.column(name).to_pylist() for name in columns}
        for key, positions in rows_by_pool(values).items():
            facts.setdefault(key, PoolFacts(*key)).add(values, positions)
            if dataset in (None, key[0]):
                rows += [first + i for i in positions]
                scores += [values["score"][i] for i in positions]
    return list(facts.values()), np.array(rows), np.array(scores)


def chosen_rows(rows: np.ndarray, scores: np.ndarray, n: int, sort: str) -> list[int]:
    """Choose at most `n` rows by `sort`: evenly spaced score ranks, seeded random or first rows."""
    if sort == "random":
        order = np.random.default_rng(0).permutation(len(rows))[:n]
    elif sort == "row":
        order = np.argsort(rows, kind="stable")[:n]
    else:
        ranked = np.lexsort((rows, scores))
        order = ranked[np.unique(np.linspace(0, len(rows) - 1, min(n, len(rows))).round().astype(int))]
    return [int(r) for r in rows[order]]


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which matplotlib ships and which covers most scripts. `size` in points."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size * SCALE)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float, lines: int) -> list[str]:
    """Wrap a text's start to at most `lines` lines of `width` pixels; an ellipsis marks a cut."""
    text = " ".join(text[:600].split())
    for letters in range(int(width / font.getlength("i")), 1, -1):
        wrapped = textwrap.wrap(text, letters, max_lines=lines, placeholder="…")
        if all(font.getlength(line) <= width for line in wrapped):
            return wrapped
    return ["…"]


def _end(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cut a text to `width` pixels at its front: ids differ at their ends."""
    text = " ".join(text.split())
    for start in range(max(0, len(text) - 100), len(text)):
        shown = "…" + text[start:] if start else text
        if font.getlength(shown) <= width:
            return shown
    return "…"


def drawn_sheet(title: str, tiles: Sequence[tuple[Manifest, int]], subtitle: str) -> tuple[Image.Image, int, int]:
    """Draw a contact sheet of rows; return (RGB image, broken images, absent ones of these)."""
    across = min(ACROSS, len(tiles))
    down = -(-len(tiles) // across)
    width = 2 * MARGIN + max(across, 3) * (TILE + GAP) - GAP
    height = HEAD + MARGIN + down * (TILE + CAPTION + GAP)
    page = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN * SCALE, 16 * SCALE), " ".join(title.split()), INK, _font(16, True))
    pen.text((MARGIN * SCALE, 37 * SCALE), subtitle, QUIET, _font(10))
    broken = absent = 0
    for k, (manifest, row) in enumerate(tiles):
        x = (MARGIN + k % across * (TILE + GAP)) * SCALE
        y = (HEAD + k // across * (TILE + CAPTION + GAP)) * SCALE
        values, data = manifest.row(row), None
        try:
            data = manifest.image(values, row)
            _paste(page, decode_image(data, values["sample_id"]), x, y)
        except (UnreadableImage, UserError) as e:
            broken += 1
            absent += data is None and isinstance(e, UnreadableImage)
            _draw_broken(pen, x, y, str(e).removeprefix(f"{manifest.path}: ").removeprefix(f"{values['sample_id']}: "))
        _draw_caption(pen, x, y + (TILE + 6) * SCALE, values)
    return page, broken, absent


def _paste(page: Image.Image, picture: Image.Image, x: int, y: int) -> None:
    """Paste the image into the middle of its tile, as large as fits."""
    side = TILE * SCALE
    factor = side / max(picture.size)
    width, height = (max(1, round(edge * factor)) for edge in picture.size)
    page.paste(TILE_PAPER, (x, y, x + side, y + side))
    picture = picture.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    page.paste(picture, (x + (side - width) // 2, y + (side - height) // 2))


def _draw_broken(pen: ImageDraw.ImageDraw, x: int, y: int, why: str) -> None:
    side, inset = TILE * SCALE, 12 * SCALE
    pen.rectangle((x, y, x + side - 1, y + side - 1), "#fbf1f0", RED, SCALE)
    pen.text((x + inset, y + inset), "cannot be read", RED, _font(11, True))
    for k, line in enumerate(_wrapped(why, _font(9), side - 2 * inset, 8)):
        pen.text((x + inset, y + inset + (22 + 14 * k) * SCALE), line, INK, _font(9))


def _draw_caption(pen: ImageDraw.ImageDraw, x: int, y: int, values: dict[str, Any]) -> None:
    side = TILE * SCALE
    score, task = f"{values['score']:.1f}", values["task"]
    pen.text((x, y), score, INK, _font(13, True))
    at = x + _font(13, True).getlength(score) + 8 * SCALE
    pen.text((at, y + 3 * SCALE), task, TASK_INK.get(task, QUIET), _font(10, True))
    at += _font(10, True).getlength(task) + 8 * SCALE
    name = _end(values["sample_id"], _font(9), x + side - at)
    pen.text((x + side - _font(9).getlength(name), y + 4 * SCALE), name, QUIET, _font(9))
    for k, line in enumerate(_wrapped(values["rationale"] or "no rationale", _font(9), side, 3)):
        pen.text((x, y + (22 + 13 * k) * SCALE), line, INK if values["rationale"] else QUIET, _font(9))
