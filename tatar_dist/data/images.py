"""Decode image bytes to upright 8-bit RGB, or raise `UnreadableImage` (sample and reason).

`decode_image` serves every stage; `inspect_image` describes an encoded image for `data validate`. Both use one opener
with one size limit, checked before a pixel is decoded, so that training can read what validation accepts.

Only raster formats are opened: Pillow would pass an EPS file to Ghostscript, and a foreign file must not start a
program. Pillow's own limit, the global `Image.MAX_IMAGE_PIXELS`, applies to the whole process and only warns between
one and two times its value, so it is neither changed nor used. No state is shared, so threads need no lock.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

# Importing a plugin registers its format with Pillow.
from PIL import (  # noqa: F401
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    QoiImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

# Width x height. What Pillow refuses by default (it warns from half of that), and more than the 151 megapixels of the
# largest cameras. Memory at the limit, in bytes a pixel (measured on 25 megapixels): Pillow keeps 4 of a colour
# picture; `decode_image` adds 4 for the RGB picture it returns, and 4 while it turns a transparent one; while it
# decodes, a codec adds none (JPEG, PNG), 4 (TIFF), 6 (progressive JPEG), 8 (AVIF), 12 (WebP) or 20 (JPEG 2000).
# `inspect_image` needs 0.7 GB for a JPEG of this size, 1.8 GB for a progressive one, 4.4 GB for JPEG 2000, the worst.
MAX_PIXELS = 178_956_970
STRIP = 1 << 20  # pixels of a piece, where a conversion would need a copy of another type
MAX_ASPECT = 200  # Qwen2.5-VL's processor refuses a longer side of more than 200 times the shorter
THUMB = 32  # sides of a thumbnail, in pixels, whatever the picture's are
TINY = 28  # pixels; a shorter side below one merged patch of Qwen2.5-VL (2 x 14) is scaled up before it is seen

# All with a signature in their first bytes. An MPO file, a JPEG with several pictures, opens as JPEG.
HEIF_BRANDS = {b"ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "HEIF", "TIFF", "BMP", "JPEG2000", "PPM", "QOI")
_GREY = {"1", "L", "LA", "La", "I", "F"}  # and I;16 in its byte orders
_ORIENTATION = 0x0112  # the EXIF tag
# EXIF orientation -> the transpose that makes the image upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(Exception):
    """Error for bytes that cannot be decoded as an image; the message names sample and reason."""


@dataclass(frozen=True)
class ImageFacts:
    """Result of `inspect_image`. Sizes: pixels, upright (if not decoded: header's); 0: unknown.

    notes: of `cmyk`, `16-bit`, `float`, `greyscale`, `palette`, `alpha`, `exif-rotated` (not for TIFF, which Pillow
        rotates on loading), `broken-exif`, `animated`, `several-pictures`, `tiny`, `extreme-aspect`.
    thumbnail: (THUMB^2) bytes of grey, upright; empty if the image does not decode.
    problem: None if the image decodes; else `missing` (no bytes), `corrupt`, `truncated` or `bomb`, with `message`.
    """

    format: str = ""
    width: int = 0
    height: int = 0
    notes: tuple[str, ...] = ()
    problem: str | None = None
    message: str = ""
    thumbnail: bytes = field(default=b"", repr=False)


class _Refused(Exception):
    """Raised for an image that is not opened; `facts` holds the content of its header."""

    def __init__(self, problem: str, message: str, **header: Any):
        super().__init__(message)
        self.facts = ImageFacts(problem=problem, message=message, **header)


def decode_image(data: bytes | memoryview, where: str) -> Image.Image:
    """Decode bytes to an RGB image, upright by EXIF; `where` names the sample in the error.

    Only the first frame is used. Transparency is composited on white. 16-bit and float greyscale is scaled to 8 bits,
    never clipped (`_to_8_bits`). CMYK is read in Adobe's polarity, as Pillow does; colour profiles are not applied.

    Raises:
        UnreadableImage: no bytes, no known format, damaged, truncated, or more than `MAX_PIXELS`.
    """
    try:
        with _opened(data) as image:
            image.load()
            return _upright_rgb(image, _orientation(image) or 1)
    except _Refused as e:
        raise UnreadableImage(f"{where}: {e}") from None
    except Exception as e:  # decoders of foreign bytes raise anything: struct.error, KeyError, AssertionError, ...
        raise UnreadableImage(f"{where}: cannot decode image: {_reason(e)}") from None


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """Return the header's (width, height), before EXIF rotation; `data` must be decodable."""
    with _opened(data) as image:
        return image.size


def inspect_image(
    data: bytes | memoryview, room: Callable[[int], AbstractContextManager[None]] = lambda pixels: nullcontext()
) -> ImageFacts:
    """Decode once, completely, and describe the image. Raises nothing: a fault is in `problem`.

    `problem` is None exactly when `decode_image` succeeds on the same bytes. `room(pixels)` is entered when the header
    has given the size, before a pixel is decoded, and left when the pixels are freed: it may wait for memory.
    """
    known = ImageFacts()
    try:
        with _opened(data) as image, room(image.width * image.height):
            known = ImageFacts(image.format or "", image.width, image.height)
            deep = any(";16" in str(tile[3]) for tile in image.tile)  # 16 bits a channel, of which Pillow keeps 8
            image.load()
            orientation = _orientation(image)
            if _is_deep(image):
                _range(image)  # raises for pixels that are not finite
            if image.mode != "RGB":  # one pixel shows whether the mode can be converted
                _upright_rgb(image.crop((0, 0, 1, 1)), 1)
            width, height = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
            notes = _notes(image, deep, orientation, _frames(image, data))
            thumbnail = _thumbnail(image, orientation or 1)
            return replace(known, width=width, height=height, notes=notes, thumbnail=thumbnail)
    except _Refused as e:
        return e.facts
    except Image.DecompressionBombError as e:
        return replace(known, problem="bomb", message=f"cannot decode image: {_reason(e)}")
    except Exception as e:  # as in decode_image
        reason = _reason(e)
        code = "truncated" if "truncat" in reason.lower() or isinstance(e, EOFError) else "corrupt"
        return replace(known, problem=code, message=f"cannot decode image: {reason}")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@cache
def _register_heif() -> None:
    """Register the plugin that HEIC needs, if the user has installed it."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


def _opened(data: bytes | memoryview) -> ImageFile.ImageFile:
    """Open an image: its header is read and its size allowed, but no pixel is decoded yet."""
    if not data:
        raise _Refused("missing", "the file is empty")
    _register_heif()
    prefix = bytes(data[:16])
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        fits = accept(prefix) if accept else False
        if isinstance(fits, str):  # the format is known, its codec is not built into this Pillow
            raise _Refused("corrupt", f"cannot decode image: {fits}", format=name)
        if not fits or factory is None:
            continue
        if name == "JPEG" and _ends_in_zeros(data):
            reason = "truncated: zeros where its end should be, as an unfinished download leaves"
            raise _Refused("truncated", f"cannot decode image: {reason}", format=name)
        image = factory(io.BytesIO(data), "")
        width, height = image.size
        if image.width * image.height > MAX_PIXELS:
            reason = f"{width} x {height} pixels, above the limit of {MAX_PIXELS:,} (decompression bomb?)"
            raise _Refused("bomb", reason, format=name, width=width, height=height)
        return image
    if prefix[4:12] in HEIF_BRANDS and "HEIF" not in Image.OPEN:
        raise _Refused("corrupt", "cannot decode image: HEIC needs `pip install pillow-heif`", format="HEIF")
    raise _Refused("corrupt", f"cannot decode image: none of the formats {', '.join(FORMATS)}")


def _ends_in_zeros(data: bytes | memoryview) -> bool:
    """Return whether zeros replace a JPEG's end marker, which decodes to grey without an error."""
    tail = bytes(data[-4096:])
    return tail.endswith(bytes(16)) and not tail.rstrip(b"\0").endswith(b"\xff\xd9")


def _orientation(image: Image.Image) -> int | None:
    """Return a loaded image's EXIF orientation 1-8; None if broken, which viewers ignore too."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as in decode_image; `broken-exif` notes it
        return None
    return orientation if orientation in _UPRIGHT else 1


def _upright_rgb(image: Image.Image, orientation: int) -> Image.Image:
    """Convert a loaded image of any mode to upright RGB, always as a new image."""
    upright = _to_8_bits(image) if _is_deep(image) else image
    if upright.has_transparency_data:
        upright = _on_white(upright)
    if orientation in _UPRIGHT:
        upright = upright.transpose(_UPRIGHT[orientation])
    return upright.convert("RGB") if upright is image or upright.mode != "RGB" else upright


def _thumbnail(image: Image.Image, orientation: int) -> bytes:
    """Scale a loaded image of any mode to ImageFacts.thumbnail, in little memory."""
    if image.mode not in ("RGB", "L", "CMYK"):  # what Pillow averages as it is
        image = _upright_rgb(image.resize((8 * THUMB, 8 * THUMB), Image.Resampling.NEAREST), 1)
    small = image.resize((THUMB, THUMB), Image.Resampling.BOX, reducing_gap=2.0)
    return _upright_rgb(small, orientation).convert("L").tobytes()


def _boxes(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Yield (left, upper, right, lower) of pieces of at most STRIP pixels that cover the image."""
    across = min(image.width, STRIP)
    down = max(1, STRIP // max(1, across))
    for y in range(0, image.height, down):
        for x in range(0, image.width, across):
            yield x, y, min(x + across, image.width), min(y + down, image.height)


def _on_white(image: Image.Image) -> Image.Image:
    """Composite an image of any mode with transparency on white. Returns RGB."""
    page = Image.new("RGB", image.size)
    for box in _boxes(image):
        piece = image.crop(box)
        above = (piece.convert("LA") if piece.mode == "La" else piece).convert("RGBA")
        page.paste(Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB"), box)
    return page


def _is_deep(image: Image.Image) -> bool:
    """Return whether pixels are single numbers of more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _numbers(image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
    """Return a piece of a deep image as (height, width) float64."""
    return np.asarray(image.crop(box)).astype(np.float64)


def _range(image: Image.Image) -> tuple[float, float]:
    """Return the minimum and maximum of a deep image. Raises ValueError unless all are finite."""
    ends = [(values.min(), values.max()) for values in (_numbers(image, box) for box in _boxes(image))]
    least, greatest = float(np.min(ends)), float(np.max(ends))  # NaN, if one is anywhere
    if not np.isfinite([least, greatest]).all():
        raise ValueError("pixels that are not finite numbers")
    return least, greatest


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Convert greyscale (I;16, I, F) to L. The mode sets the range, since no image declares one.

    I;16, and I if its values fit: 0-65535, divided by 257. F within 0-1: times 255; within 0-255: unchanged; within
    0-65535: divided by 257. Anything else is stretched from its least to its greatest value.
    """
    least, greatest = _range(image)
    key = image.info.get("transparency")  # value of transparent pixels: white, as under every other image
    grey = Image.new("L", image.size)
    for box in _boxes(image):
        values = _numbers(image, box)
        if image.mode == "F" and 0 <= least and greatest <= 255:
            scaled = values * (255 if greatest <= 1 else 1)
        elif 0 <= least and greatest <= 65535:
            scaled = values / 257
        else:
            scaled = (values - least) * (255 / max(greatest - least, 1e-300))
        if isinstance(key, int):
            scaled[values == key] = 255
        grey.paste(Image.fromarray(np.round(scaled).astype(np.uint8)), box)
    return grey


def _frames(image: ImageFile.ImageFile, data: bytes | memoryview) -> int:
    """Count the frames; GIF and TIFF are scanned on a second handle, as the first is loaded."""
    if image.format not in ("GIF", "TIFF"):
        return int(getattr(image, "n_frames", 1))
    try:
        with _opened(data) as again:
            return int(getattr(again, "n_frames", 1))
    except Exception:  # damaged after the first frame, the only one used
        return 1


def _notes(image: ImageFile.ImageFile, deep: bool, orientation: int | None, frames: int) -> tuple[str, ...]:
    """Return the notes of `ImageFacts` that hold for a loaded image."""
    mode, (short, long) = image.mode, sorted(image.size)
    stack = image.format in ("TIFF", "MPO")
    notes = {
        "cmyk": mode == "CMYK",
        "16-bit": deep or mode.startswith("I"),
        "float": mode == "F",
        "greyscale": mode in _GREY or mode.startswith("I;16"),
        "palette": mode in ("P", "PA"),
        "alpha": image.has_transparency_data,
        "broken-exif": orientation is None,
        "exif-rotated": orientation not in (None, 1),
        "several-pictures": frames > 1 and stack,
        "animated": frames > 1 and not stack,
        "tiny": short < TINY,
        "extreme-aspect": long > MAX_ASPECT * short,
    }
    return tuple(note for note, holds in notes.items() if holds)
