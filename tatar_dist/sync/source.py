"""The learner's side of a weight push: full tensors in, bounded buckets of named arrays out.

A bucket is what travels at once, through Ray's object store on any network: `{name: Wire}`. bfloat16 has no numpy type,
so tensors travel as raw bytes with their dtype and shape.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # of from_wire, which knows


@dataclass(frozen=True)
class Wire:
    """One tensor on the wire: `data` (nbytes,) uint8, `dtype` a torch dtype's name, `shape` its full shape."""

    data: np.ndarray
    dtype: str
    shape: tuple[int, ...]


def to_wire(tensor: Any) -> Wire:
    import torch

    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return Wire(flat.numpy(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def from_wire(wire: Wire) -> Any:
    """The tensor on the wire's own memory, not copied. To be read only: Ray's object store ends who writes into it."""
    import torch

    return torch.from_numpy(wire.data).view(getattr(torch, wire.dtype)).reshape(wire.shape)


def buckets(parameters: Iterable[tuple[str, Any]], bucket_bytes: int, sender: bool) -> Iterator[dict[str, Wire]]:
    """Group (name, full tensor) pairs into buckets of at most `bucket_bytes` (a larger tensor travels alone).

    Every rank must exhaust it, because making the tensors is collective; only the sender yields.
    """
    held: dict[str, Wire] = {}
    size = 0
    for name, tensor in parameters:
        if not sender:
            continue
        wire = to_wire(tensor)
        if held and size + wire.data.nbytes > bucket_bytes:
            yield held
            held, size = {}, 0
        held[name] = wire
        size += wire.data.nbytes
    if held:
        yield held
