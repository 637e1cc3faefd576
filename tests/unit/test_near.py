"""Near-duplicates across splits: found whatever was done to the picture, told as a warning, and what was compared."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from manifest_cases import picture, problems, raw, row, written
from PIL import Image, ImageEnhance

from tatar_dist.cli import main
from tatar_dist.data.checks.compare import clean
from tatar_dist.data.checks.near import near_duplicates
from tatar_dist.data.checks.validate import validate
from tatar_dist.data.checks.validation import ValidationRows
from tatar_dist.data.images import THUMB, inspect_image
from tatar_dist.demo.data.photos import PHOTOS, load_photo

Image.init()


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def crop(photo: Image.Image, dx: float = 0.0, dy: float = 0.0, size: float = 1.0) -> Image.Image:
    """The middle of a photograph, 0.7 of its sides, moved and scaled by shares of this middle's sides."""
    sides = 0.7 * np.array(photo.size)
    centre = np.array(photo.size) / 2 + np.array([dx, dy]) * sides
    return photo.crop([round(float(edge)) for edge in (*(centre - sides * size / 2), *(centre + sides * size / 2))])


AGAIN = {
    "poor": lambda photo: encoded(crop(photo), quality=20),
    "small": lambda photo: encoded(crop(photo).resize((97, 83)), "PNG"),
    "dark": lambda photo: encoded(ImageEnhance.Brightness(crop(photo)).enhance(0.6)),
    "right": lambda photo: encoded(crop(photo, 0.08), quality=75),
    "up-left": lambda photo: encoded(crop(photo, -0.06, -0.06).resize((300, 200))),
    "tighter": lambda photo: encoded(crop(photo, 0.03, -0.02, 0.9)),
    "wider": lambda photo: encoded(crop(photo, 0.0, 0.02, 1.12)),
}


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    small = [load_photo(photo).copy() for photo in PHOTOS]
    for image in small:
        image.thumbnail((400, 400))
    return small


def test_pictures_encoded_again_scaled_or_cropped_elsewhere_are_a_warning_with_pairs(photos, tmp_path, capsys):
    first = [row(i, sample_id=f"photo{i}", image_bytes=encoded(crop(p))) for i, p in enumerate(photos)]
    again = {f"{how}{i}": make(p) for i, p in enumerate(photos) for how, make in AGAIN.items()}
    held = [row(i, sample_id=name, split="test", image_bytes=d) for i, (name, d) in enumerate(again.items())]
    train, test = written(tmp_path / "train.parquet", first), written(tmp_path / "test.parquet", held)
    assert main(["data", "validate", str(train), str(test), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["near"] == len(again)  # each with its own photograph, none with another
    assert found["verdict"].startswith(
        f"All {len(photos) + len(again)} rows can be used, but {len(again)} pairs of pictures across splits are nearly "
        f"the same; {len(photos)} warnings. Compared between splits: file bytes, the looks of "
    )
    lines = [json.loads(line) for line in (tmp_path / "train.problems.jsonl").read_text().splitlines()]
    assert {(line["row"], line["code"], line["level"]) for line in lines} == {
        (i, "near-duplicate", "warning") for i in range(len(photos))
    }
    assert all(f"{line['row']}' (row" in line["message"] and "of test.parquet" in line["message"] for line in lines)
    sheet = Path(found["manifests"][0]["near_duplicates"])
    assert (
        sheet == tmp_path / "train.near-duplicates.jpg"
        and f"]({sheet.name})" in (tmp_path / "train.validate.md").read_text()
    )
    assert Image.open(sheet).size[0] > 2000 and problems(test) == []
    assert found["manifests"][1]["near_duplicates"] is None and not (tmp_path / "test.near-duplicates.jpg").exists()
    (tmp_path / "clean").mkdir()
    counts = clean(validate([train, test], tmp_path), tmp_path / "clean")
    assert [c["kept"] for c in counts.values()] == [len(photos), len(again)]
    assert main(["data", "validate", str(train), str(test), "--no-near-duplicates"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert (
        "and no split leaks. Compared between splits: file bytes. Not compared: references, which are unknown, " in told
    )
    assert "looks (--no-near-duplicates)." in told and problems(train) == [] and not sheet.exists()


def test_what_leaks_by_its_bytes_or_reference_is_not_told_twice(photos, tmp_path):
    one, other = (encoded(crop(photos[0]), quality=quality) for quality in (90, 30))
    same = raw(tmp_path / "bytes.parquet", [row(0, image_bytes=one), row(1, image_bytes=one, split="test", score=0.0)])
    validate([same])
    assert problems(same) == [(0, "leak-image")]
    rows = [row(i, image_bytes=d, meta='{"reference": "r"}') for i, d in enumerate((one, other))]
    reference = raw(tmp_path / "reference.parquet", [rows[0], rows[1] | {"split": "test"}])
    validate([reference])
    assert problems(reference) == [(0, "leak-reference")]
    within = written(tmp_path / "within.parquet", [row(0, image_bytes=one), row(1, image_bytes=other)])
    assert validate([within]).near == 0 and problems(within) == []


@pytest.mark.parametrize(
    "metas, splits, near, told",
    [
        ((None, None, None), ("train",), True, "All 3 rows can be used. One split: nothing to compare."),
        (
            (None, None, None),
            ("train", "test"),
            True,
            "All 3 rows can be used and no split leaks. Compared between splits: file bytes, the looks of 0 of 3 "
            "pictures. Not compared: references, which are unknown.",
        ),
        (
            ("a", None, "b"),
            ("train", "validation"),
            False,
            "All 3 rows can be used and no split leaks. Compared between splits: file bytes, references of 2 of 3 "
            "rows. Not compared: looks (--no-near-duplicates).",
        ),
    ],
)
def test_the_verdict_says_what_was_compared(tmp_path, capsys, metas, splits, near, told):
    rows = [
        row(i, image_bytes=picture(i), split=splits[i % len(splits)], meta=meta and json.dumps({"reference": meta}))
        for i, meta in enumerate(metas)
    ]  # plain colours have no looks to compare
    path = raw(tmp_path / "m.parquet", rows)
    assert main(["data", "validate", str(path), *["--no-near-duplicates"] * (not near)]) == 0
    assert " ".join(capsys.readouterr().out.split()).startswith(f"✓ {told}")
    assert (tmp_path / "m.validate.md").read_text().splitlines()[2].replace("\\", "") == f"**{told}**"


def test_every_mode_and_orientation_of_a_picture_has_the_same_looks(photos):
    photo = crop(photos[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn to the right
    forms = [
        encoded(photo, "PNG"),
        encoded(photo.convert("L"), "PNG"),
        encoded(photo.convert("CMYK")),
        encoded(photo.quantize(64), "PNG"),
        encoded(photo.convert("RGBA"), "PNG"),
        encoded(Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257), "PNG"),
        encoded(photo.transpose(Image.Transpose.ROTATE_90), exif=exif),
    ]
    rows = ValidationRows.of(len(forms))
    rows.thumbnail[:] = [np.frombuffer(inspect_image(form).thumbnail, np.uint8) for form in forms]
    rows.picture[:, 0] = np.arange(1, len(forms) + 1)
    alike, pairs, _ = near_duplicates(rows, np.array([1] + [0] * (len(forms) - 1)), lambda: None)
    assert pairs == len(alike) == len(forms) - 1 and alike[-1][2] > 0.95


def test_each_later_split_is_held_out_of_those_before_it():
    noise = np.random.default_rng(0).integers(0, 256, (4, THUMB**2), dtype=np.uint8)
    rows = ValidationRows.of(6)
    rows.thumbnail[:] = noise[[0, 0, 1, 1, 2, 3]]
    rows.picture[:, 0] = np.arange(1, 7)
    alike, pairs, compared = near_duplicates(rows, np.array([0, 1, 1, 2, -1, 2]), lambda: None)
    assert sorted(pair[:2] for pair in alike) == [(0, 1), (2, 3)] and (pairs, compared) == (2, 5)
