"""`data show`: which rows stand on the contact sheet, what is drawn, and that only those pictures are read."""

from __future__ import annotations

import io
import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tatar_dist.cli import main
from tatar_dist.data.checks.sheet import RED, _end, _font, _wrapped, chosen_rows, show
from tatar_dist.data.writing import write_manifest

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 20)]


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (60, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def manifest(path, n=12, **changes):
    rows = [
        {"sample_id": f"s{i}", "dataset": "de"[i % 2], "task": "iqa", "image_bytes": picture(COLOURS[i % 4])}
        | {"score": float(97 * i % 100), "split": "train", "rationale": "Blur in the sky." if i % 3 else None}
        | changes
        for i in range(n)
    ]
    write_manifest(path, rows)
    return path


def share_of(page: Image.Image, colour) -> float:
    return float((np.asarray(page) == colour).all(axis=-1).mean())


def test_the_sheet_shows_the_pictures_and_says_where_it_is(tmp_path, capsys):
    path = manifest(tmp_path / "m.parquet")
    assert main(["data", "show", str(path), "--rows", "8"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == str(tmp_path / "m.sheet.png") and "pictures in the rows" in out
    page = Image.open(tmp_path / "m.sheet.png")
    assert all(share_of(page, c) > 0.005 for c in COLOURS)


def test_json_tells_pools_and_rows(tmp_path, capsys):
    path = manifest(tmp_path / "m.parquet")
    sheet = str(tmp_path / "x" / "s.png")
    assert main(["data", "show", str(path), "--rows", "3", "--sort", "row", "--output", sheet, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["shown"], found["broken"], found["sheet"]) == ([0, 1, 2], 0, sheet)
    assert [(p["dataset"], p["rows"], p["rationales"]) for p in found["pools"]] == [("d", 6, 4), ("e", 6, 4)]


def test_broken_pictures_are_shown_as_such(tmp_path):
    rows = [("a", picture(COLOURS[0])), ("b", b"no picture"), ("c", None)]
    write_manifest(
        tmp_path / "m.parquet",
        [
            {"sample_id": k, "dataset": "d", "task": "iaa", "split": "test", "score": 1.0}
            | ({"image_bytes": data} if data else {"image": "gone.png"})
            for k, data in rows
        ],
    )
    found = show(tmp_path / "m.parquet", 24, "row", None, tmp_path / "s.png")
    page = Image.open(found.sheet)
    assert found.broken == 2 and share_of(page, tuple(bytes.fromhex(RED[1:]))) > 0.001


def test_one_data_set_alone_and_an_unknown_one(tmp_path, capsys):
    path = manifest(tmp_path / "m.parquet")
    found = show(path, 24, "score", "e", tmp_path / "s.png")
    assert sorted(found.chosen) == [6, 7, 8, 9, 10, 11]  # the writer puts pools together: d first
    assert main(["data", "show", str(path), "--dataset", "koniq"]) == 2
    assert "no row of data set 'koniq'; it has d, e" in capsys.readouterr().err
    assert main(["data", "show", str(path), "--sort", "size"]) == 2
    assert "must be one of score, random, row" in capsys.readouterr().err


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=60),
    st.integers(1, 30),
    st.sampled_from(["score", "random", "row"]),
)
def test_rows_are_chosen_once_each_as_many_as_asked_for(scores, n, sort):
    rows = np.arange(len(scores)) * 3
    chosen = chosen_rows(rows, np.array(scores), n, sort)
    assert len(chosen) == len(set(chosen)) == min(n, len(scores)) and set(chosen) <= set(rows.tolist())
    if sort == "score":
        shown = [scores[r // 3] for r in chosen]
        assert shown == sorted(shown) and shown[0] == min(scores) and (n == 1 or shown[-1] == max(scores))
    assert chosen == chosen_rows(rows, np.array(scores), n, sort)


@given(st.text(max_size=300), st.integers(20, 400))
def test_captions_never_run_over_their_tile(text, width):
    font = _font(9)
    for shown in (_end(text, font, width), *_wrapped(text, font, width, 3)):
        assert font.getlength(shown) <= width or shown == "…"


def test_two_long_ids_stay_distinguishable():
    font = _font(9)
    names = [_end(f"a/very/long/directory/of/some/data/set/picture-{i:06d}.png", font, 200) for i in range(2)]
    assert names[0] != names[1] and all("…" in n for n in names)
