"""Cuts a stream of pictures into engine calls: enough that an engine seldom runs empty, no more than memory holds.

An engine decodes all pictures of a call before it begins, 4 bytes a pixel, and vLLM keeps what it makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
MOST_PIXELS = 1 << 29  # of a call, decoded: 2 GiB


def batches_by_pixels(
    items: Iterable[T], size: int, pixels: Callable[[T], int], most: int = MOST_PIXELS
) -> Iterator[list[T]]:
    """Lists of at most `size` items and `most` pixels together; one that has more goes alone."""
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
