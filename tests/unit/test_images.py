"""Pictures of every kind, made here: decoded upright, whole and unclipped, or refused by name."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from tatar_dist.data import images
from tatar_dist.data.images import FORMATS, MAX_PIXELS, UnreadableImage, decode_image, inspect_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of oddities in damaged metadata

SMOOTH = np.stack([*np.meshgrid(np.linspace(20, 235, 48), np.linspace(30, 220, 64)), np.full((64, 48), 90.0)], axis=-1)
PHOTO = Image.fromarray(SMOOTH.astype(np.uint8))  # 48 wide, 64 high, different at every corner


def encoded(image: Image.Image, kind: str = "PNG", **save) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **save)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data, "here")
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG from its chunks; `rows` are unfiltered scan lines, each with its leading filter byte."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    between = b"".join(chunk(*e) for e in extra)
    return b"\x89PNG\r\n\x1a\n" + header + between + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_is_set_upright_whatever_its_exif_orientation(orientation, kind):
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    turn |= {7: "TRANSVERSE", 8: "ROTATE_270"}  # what the camera did, so that the tag undoes it
    stored = PHOTO.transpose(Image.Transpose[turn[orientation]]) if orientation in turn else PHOTO
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    assert np.abs(pixels(data) - np.asarray(PHOTO)).max() <= (0 if kind in ("PNG", "TIFF") else 8)
    facts = inspect_image(data)
    assert (facts.width, facts.height, facts.problem) == (48, 64, None)
    # Pillow turns a TIFF while it loads it
    assert ("exif-rotated" in facts.notes) == (orientation != 1 and kind != "TIFF")


def test_our_upright_is_pillows_upright():
    for orientation in range(0, 12):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(PHOTO, "PNG", exif=exif)
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(pixels(data), np.asarray(ImageOps.exif_transpose(image)))


def test_a_broken_exif_block_does_not_cost_the_picture():
    data = encoded(PHOTO, "PNG", exif=b"Exif\x00\x00no TIFF header at all")
    assert np.array_equal(pixels(data), np.asarray(PHOTO))
    assert inspect_image(data).notes == ("broken-exif",)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_cmyk_jpeg_looks_like_the_rgb_picture_it_came_from(progressive):
    data = encoded(PHOTO.convert("CMYK"), "JPEG", quality=95, progressive=progressive)
    assert b"Adobe" in data[:200]
    assert np.abs(pixels(data) - np.asarray(PHOTO)).mean() < 3
    assert inspect_image(data).notes == ("cmyk",)
    assert np.abs(pixels(encoded(PHOTO.convert("CMYK"), "TIFF")) - np.asarray(PHOTO)).max() <= 1


GRADIENT = np.linspace(0, 65535, 256 * 4).round().astype(np.uint16).reshape(32, 32)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_a_16_bit_greyscale_keeps_its_order_and_its_range(kind):
    data = encoded(Image.fromarray(GRADIENT), kind)
    found = pixels(data)
    assert (found[..., 0] == found[..., 1]).all() and (found[..., 0] == found[..., 2]).all()
    flat = found[..., 0].ravel()
    assert flat[0] == 0 and flat[-1] == 255 and (np.diff(flat) >= 0).all() and len(set(flat)) == 256
    assert np.abs(flat - GRADIENT.ravel() / 257).max() <= 0.5
    assert "16-bit" in inspect_image(data).notes and "greyscale" in inspect_image(data).notes


def test_a_dark_16_bit_picture_stays_dark():
    assert pixels(encoded(Image.fromarray((GRADIENT // 4).astype(np.uint16)))).max() == 64


def test_a_big_endian_16_bit_tiff_is_read_like_a_little_endian_one():
    data = encoded(Image.fromarray(GRADIENT.astype(">u2")), "TIFF")
    assert np.array_equal(pixels(data), pixels(encoded(Image.fromarray(GRADIENT), "TIFF")))


def test_a_16_bit_colour_png_is_read_to_its_upper_bytes():
    colours = np.stack([GRADIENT, GRADIENT[::-1], np.full_like(GRADIENT, 30000)], axis=-1).astype(">u2")
    rows = b"".join(b"\0" + line.tobytes() for line in colours)
    data = png(32, 32, 16, 2, rows)
    assert np.abs(pixels(data) - colours.astype(float) / 257).max() <= 1
    assert inspect_image(data).notes == ("16-bit",)


def test_the_transparent_value_of_a_16_bit_png_is_white():
    rows = b"".join(b"\0" + line.astype(">u2").tobytes() for line in GRADIENT)
    found = pixels(png(32, 32, 16, 0, rows, (b"tRNS", struct.pack(">H", int(GRADIENT[3, 3])))))
    assert found[3, 3, 0] == 255 and found[0, 0, 0] == 0


@pytest.mark.parametrize("top, values", [(1.0, (0, 128, 255)), (255.0, (0, 128, 255)), (65535.0, (0, 128, 255))])
def test_float_pictures_are_scaled_and_not_clipped(top, values):
    data = encoded(Image.fromarray(np.array([[0, 0.5 * top, top]] * 3, np.float32)), "TIFF")
    assert tuple(pixels(data)[0, :, 0]) == values


def test_values_beyond_16_bits_or_below_zero_are_stretched():
    wide = np.array([[-1000, 0, 1000]] * 3, np.int32)
    assert tuple(pixels(encoded(Image.fromarray(wide), "TIFF"))[0, :, 0]) == (0, 128, 255)


def test_pixels_that_are_not_finite_are_refused():
    data = encoded(Image.fromarray(np.array([[0, np.nan, 1]] * 3, np.float32)), "TIFF")
    with pytest.raises(UnreadableImage, match="s1: .*not finite"):
        decode_image(data, "s1")
    assert inspect_image(data).problem == "corrupt"


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_on_white(mode, kind):
    image = Image.new(mode, (3, 1), 0)
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (*([0] * (len(mode) - 1)), alpha))
    found = pixels(encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
    assert found[0, :, 0].tolist() == [255, 127, 0]


def test_a_palette_keeps_its_colours_and_its_hole_is_white():
    image = PHOTO.quantize(8)
    assert np.array_equal(pixels(encoded(image)), np.asarray(image.convert("RGB")))
    assert inspect_image(encoded(image)).notes == ("palette",)
    holed = encoded(image, transparency=image.getpixel((0, 0)))
    assert pixels(holed)[0, 0].tolist() == [255, 255, 255]
    assert inspect_image(holed).notes == ("palette", "alpha")


def test_a_1_bit_and_an_8_bit_greyscale_are_read():
    assert sorted(set(pixels(encoded(PHOTO.convert("1"))).ravel())) == [0, 255]
    assert inspect_image(encoded(PHOTO.convert("L"), "JPEG")).notes == ("greyscale",)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_read(kind):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    frames = [Image.new("RGB", (40, 30), c) for c in colours]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert pixels(data)[5, 5].tolist() == [255, 0, 0]
    assert ("several-pictures" if kind == "TIFF" else "animated") in inspect_image(data).notes


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_avif_is_read():
    assert np.abs(pixels(encoded(PHOTO, "AVIF", quality=95)) - np.asarray(PHOTO)).mean() < 4


def test_tiny_and_extremely_long_pictures_are_noted():
    assert inspect_image(encoded(Image.new("RGB", (200, 27)))).notes == ("tiny",)
    assert inspect_image(encoded(Image.new("RGB", (28 * 200, 28)))).notes == ()
    assert inspect_image(encoded(Image.new("RGB", (28, 28 * 200 + 1)))).notes == ("extreme-aspect",)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "QOI"])
def test_a_file_cut_in_half_is_refused_by_name(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = encoded(noise, kind)
    cut = data[: len(data) // 2]
    with pytest.raises(UnreadableImage, match="^sample s7: "):
        decode_image(cut, "sample s7")
    assert inspect_image(cut).problem in ("truncated", "corrupt")
    if kind in ("PNG", "JPEG", "BMP", "PPM"):
        assert inspect_image(cut).problem == "truncated"


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_its_last_bytes_is_truncated(progressive):
    data = encoded(PHOTO, "JPEG", progressive=progressive)
    assert inspect_image(data[:-40]).problem == "truncated"


def test_heic_without_its_plugin_names_it(monkeypatch):
    from tatar_dist.data import images

    monkeypatch.setattr(images, "_register_heif", lambda: None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(UnreadableImage, match="s1: .*HEIC needs `pip install pillow-heif`"):
        decode_image(b"\0\0\0\x18ftypheic\0\0\0\0", "s1")


def test_no_bytes_text_and_programs_are_refused():
    assert inspect_image(b"").problem == "missing"
    assert inspect_image(b"<html>404</html>").problem == "corrupt"
    assert inspect_image(encoded(PHOTO, "EPS")).problem == "corrupt"  # would start Ghostscript
    with pytest.raises(UnreadableImage, match="s1: .*none of the formats JPEG, PNG"):
        decode_image(encoded(PHOTO, "EPS"), "s1")


def test_a_decompression_bomb_is_refused_from_its_header():
    data = png(100_000, 100_000, 8, 2, b"\0" * 100)
    with pytest.raises(UnreadableImage, match="s9: 100000 x 100000 pixels, above the limit of 178,956,970"):
        decode_image(data, "s9")
    facts = inspect_image(data)
    assert (facts.problem, facts.width, facts.format) == ("bomb", 100_000, "PNG")


def test_the_limit_is_ours_and_silent_whatever_pillows_own_is(monkeypatch):
    side = 10_000  # between one and two times Pillow's limit, where Image.open warns
    assert MAX_PIXELS / 2 < side * side < MAX_PIXELS
    bits = b"".join(b"\0" + bytes(side // 8) for _ in range(side))
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect_image(png(side, side, 1, 0, bits)).problem is None
    assert Image.MAX_IMAGE_PIXELS == before
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert inspect_image(png(100_000, 100_000, 8, 2, b"")).problem == "bomb"


def test_threads_decode_side_by_side():
    data, found = [encoded(Image.new("RGB", (50, 50), (i, 0, 0))) for i in range(64)], [-1] * 64

    def work(start: int) -> None:
        for i in range(start, 64, 4):
            found[i] = pixels(data[i])[0, 0, 0]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == list(range(64))


SEEDS = [
    encoded(PHOTO, "JPEG"),
    encoded(PHOTO.convert("CMYK"), "JPEG"),
    encoded(PHOTO.quantize(8), transparency=1),
    encoded(Image.fromarray(GRADIENT), "TIFF"),
    encoded(PHOTO.convert("RGBA"), "WEBP"),
    encoded(PHOTO, "GIF", save_all=True, append_images=[PHOTO.rotate(90)]),
    encoded(PHOTO, "BMP"),
    encoded(PHOTO, "QOI"),
    encoded(PHOTO, "PPM"),
    encoded(PHOTO, "JPEG2000"),
]


def agree(data: bytes) -> None:
    facts = inspect_image(data)
    try:
        image = decode_image(data, "x")
    except UnreadableImage as e:
        assert facts.problem in ("missing", "corrupt", "truncated", "bomb") and str(e) == f"x: {facts.message}"
    else:
        assert facts.problem is None and image.size == (facts.width, facts.height)


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"BM", b"P6 ", b"GIF89a"]),
)
def test_any_bytes_decode_or_are_refused(rest, start):
    agree(start + rest)


@settings(max_examples=300)
@given(st.sampled_from(SEEDS), st.data())
def test_any_damage_to_a_picture_is_refused_or_survived_alike(data, draw):
    changed = bytearray(data[: draw.draw(st.integers(0, len(data)))])
    for _ in range(draw.draw(st.integers(0, 6))):
        if changed:
            changed[draw.draw(st.integers(0, len(changed) - 1))] = draw.draw(st.integers(0, 255))
    agree(bytes(changed))


def test_every_format_named_is_one_that_pillow_knows():
    assert set(FORMATS) - {"HEIF"} <= set(Image.OPEN)


def test_a_jpeg_whose_end_is_zeros_is_truncated_and_zeros_behind_a_whole_one_do_no_harm():
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", quality=90)
    data = buffer.getvalue()
    half = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    assert inspect_image(half).problem == "truncated"
    with pytest.raises(UnreadableImage, match="photo 7: .*zeros where its end should be"):
        decode_image(half, "photo 7")
    assert inspect_image(data + bytes(100)).problem is None


@pytest.mark.parametrize("strip", [1, 7, 100])
@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(GRADIENT)),
        encoded(Image.fromarray(np.linspace(-5, 70_000, 60, dtype=np.float32).reshape(6, 10)), "TIFF"),
        encoded(Image.fromarray(SMOOTH.astype(np.uint8)[..., [0, 1, 2, 1]], "RGBA")),
        encoded(PHOTO.quantize(8), transparency=1),
        encoded(PHOTO, transparency=PHOTO.getpixel((5, 5))),
    ],
)
def test_converting_piece_by_piece_changes_no_pixel(data, strip, monkeypatch):
    whole = pixels(data)
    monkeypatch.setattr(images, "STRIP", strip)
    assert np.array_equal(pixels(data), whole)


PEAK = """
import resource, sys
from pathlib import Path
from tatar_dist.data import images
data = Path(sys.argv[2]).read_bytes()
images.inspect_image(Path(sys.argv[3]).read_bytes())  # the codec and numpy are loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[1] == "inspect":
    assert images.inspect_image(data).problem is None
else:
    images.decode_image(data, "x")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("name, depth, colour, channel_bytes", [("16-bit grey", 16, 0, 2), ("transparent", 8, 6, 4)])
@pytest.mark.parametrize("what, most", [("inspect", 6), ("decode", 11)])
def test_memory_of_a_large_picture_is_what_the_limit_says(tmp_path, name, depth, colour, channel_bytes, what, most):
    side = 4000
    (tmp_path / "large").write_bytes(png(side, side, depth, colour, (b"\0" + bytes(side * channel_bytes)) * side))
    (tmp_path / "small").write_bytes(png(9, 9, depth, colour, (b"\0" + bytes(9 * channel_bytes)) * 9))
    words = [sys.executable, "-c", PEAK, what, str(tmp_path / "large"), str(tmp_path / "small")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout) / side**2 < most  # bytes a pixel


def test_inspection_asks_for_room_when_it_knows_the_size_and_gives_it_back():
    asked: list[int] = []

    @contextmanager
    def room(size):
        asked.append(size)
        try:
            yield
        finally:
            asked.append(-size)

    assert inspect_image(encoded(PHOTO), room).problem is None
    assert inspect_image(encoded(PHOTO)[:-60], room).problem == "truncated"
    assert asked == [48 * 64, -48 * 64] * 2
    assert inspect_image(png(100_000, 100_000, 8, 2, b""), room).problem == "bomb" and len(asked) == 4
