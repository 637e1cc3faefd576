"""Group images into engine calls: enough that an engine seldom runs empty, within a memory limit.

An engine decodes all images of a call before it starts, at 4 bytes per pixel, and vLLM keeps the processed inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
MOST_PIXELS = 1 << 29  # of a call, decoded: 2 GiB


def batches_by_pixels(
    items: Iterable[T], size: int, pixels: Callable[[T], int], most: int = MOST_PIXELS
) -> Iterator[list[T]]:
    """Yield lists of at most `size` items and `most` pixels in total; a larger item is yielded alone."""
    call: list[T] = []
    total = 0
    for item in items:
        own = pixels(item)
        if call and (len(call) == size or total + own > most):
            yield call
            call, total = [], 0
        call.append(item)
        total += own
    if call:
        yield call
