"""Prepare images for an endpoint: check, bound the size, encode as a data URL.

`picture` takes the encoded file of a row and makes `data:image/...;base64,...` of at most `max_pixels` pixels. A small
and upright file in a format that endpoints read is sent unchanged. Others are decoded, resized and sent as JPEG.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from tatar_dist.data.images import decode_image

SENT_AS_IS = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}
MAX_BYTES = 8 << 20  # larger files are encoded anew: endpoints refuse bodies of tens of MB
JPEG_QUALITY = 92  # higher than what any teacher can tell apart, and no visible blocks of our own
PATCH = 28  # Qwen-VL's image token covers 28 x 28 pixels; other models count fewer tokens for the same image


@dataclass(frozen=True)
class Picture:
    """Data URL that is sent, and the image's size in pixels."""

    url: str
    width: int
    height: int

    @property
    def tokens(self) -> int:
        """Upper estimate of the picture's tokens, for budgets and rate limits."""
        return -(-self.width // PATCH) * -(-self.height // PATCH) + 4


def picture(data: bytes, max_pixels: int, where: str) -> Picture:
    """Encode an image for a request. Raises UnreadableImage if it does not decode; `where` names it there."""
    decoded = decode_image(data, where)  # always: a teacher must not be asked about an image that training cannot read
    mime = next((m for magic, m in SENT_AS_IS.items() if data.startswith(magic)), None)
    with Image.open(io.BytesIO(data)) as image:
        upright = image.getexif().get(0x0112, 1) in (0, 1)
        plain = image.mode in ("RGB", "L") and not getattr(image, "is_animated", False)
    width, height = decoded.size
    if mime and upright and plain and width * height <= max_pixels and len(data) <= MAX_BYTES:
        return Picture(f"data:{mime};base64,{base64.b64encode(data).decode()}", width, height)
    if width * height > max_pixels:
        scale = (max_pixels / (width * height)) ** 0.5
        size = max(1, int(width * scale)), max(1, int(height * scale))  # rounded down: never over the bound
        decoded = decoded.resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    decoded.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return Picture(f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}", *decoded.size)
