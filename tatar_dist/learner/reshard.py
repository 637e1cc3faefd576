"""A ZeRO-3 checkpoint of M ranks for one rank of N: the same master weights and optimizer state, cut anew.

ZeRO-3 cuts every parameter on its own: rank r of M holds elements [r k, (r + 1) k) with k = ceil(numel / M), padded
with zeros, and concatenates its pieces, in the order of `param_shapes`, into one flat tensor a sub-group; optimizer
states that have the size of that tensor are cut alike. (deepspeed/runtime/zero/stage3.py, 0.19; its converter to
"universal" checkpoints reads the same layout, but writes a file a parameter and state, and knows Adam only.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shapes = Sequence[dict[str, Any]]  # a sub-group: parameter name -> shape


@dataclass(frozen=True)
class Piece:
    """Where every rank's piece of a parameter lies: `size` elements from `offset` on in the flat tensor `group`."""

    group: int
    offset: int
    size: int
    numel: int


def pieces(shapes: Shapes, ranks: int) -> dict[str, Piece]:
    parts = {}
    for group, parameters in enumerate(shapes):
        offset = 0
        for name, shape in parameters.items():
            numel = math.prod(shape)
            size = -(-numel // ranks)
            parts[name] = Piece(group, offset, size, numel)
            offset += size
    return parts


def recut(flats: Sequence[Sequence[Tensor]], old: Shapes, new: Shapes, rank: int, ranks: int) -> list[Tensor]:
    """Return one flat tensor per sub-group of `new`: the elements that `rank` of `ranks` holds.

    Args:
        flats: `flats[r][g]` is the flat tensor that saved rank r holds of sub-group g of `old`.

    Raises:
        RuntimeError: a parameter's number of elements differs between `old` and `new`.
    """
    before, after = pieces(old, len(flats)), pieces(new, ranks)
    cut = []
    for parameters in new:
        parts = []
        for name in parameters:
            b, a = before[name], after[name]
            if b.numel != a.numel:
                raise RuntimeError(f"{name} has {a.numel} elements here, {b.numel} in the checkpoint")
            part = torch.zeros(a.size, dtype=flats[0][b.group].dtype)
            first, last = rank * a.size, min((rank + 1) * a.size, b.numel)
            for r, flat in enumerate(flats):
                start, end = max(first, r * b.size), min(last, (r + 1) * b.size)
                if start < end:
                    at = b.offset + start - r * b.size
                    part[start - first : end - first] = flat[b.group][at : at + end - start]
            parts.append(part)
        cut.append(torch.cat(parts))
    return cut


def load(directory: Path, saved_ranks: int, engine: Any, rank: int, ranks: int) -> None:
    """Load the DeepSpeed checkpoint in `directory`, of `saved_ranks` ranks, into a fresh ZeRO-3 engine. Collective.

    Weights that are not trained are restored, too: the model's own directory may hold others by now.
    """
    saved = [_read(directory, f"*zero_pp_rank_{r}_mp_rank_00_optim_states.pt") for r in range(saved_ranks)]
    models = [_read(directory, f"zero_pp_rank_{r}_mp_rank_00_model_states.pt") for r in range(saved_ranks)]
    meta = models[0]
    _load_frozen([m["frozen_param_fragments"] for m in models], engine, rank)
    zero = [s["optimizer_state_dict"] for s in saved]
    old, new = meta["param_shapes"], engine._get_zero_param_shapes()
    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    state = optimizer.state_dict()  # the fresh one gives the form
    for key in ("loss_scaler", "dynamic_loss_scale", "overflow"):
        state[key] = zero[0][key]
    flat = "fp32_flat_groups"
    state[flat] = recut([z[flat] for z in zero], old, new, rank, ranks)
    base = [z["optimizer_state_dict"] for z in zero]
    whole = pieces(old, len(saved))
    entries: dict[int, dict[str, Any]] = {
        g: dict(base[0]["state"].get(whole[next(iter(names))].group, {})) for g, names in enumerate(new)
    }
    for key in entries[0]:
        flats = [[b["state"][g][key] for g in range(len(old))] for b in base]
        if isinstance(flats[0][0], Tensor) and flats[0][0].numel() == zero[0][flat][0].numel():
            for g, tensor in enumerate(recut(flats, old, new, rank, ranks)):
                entries[g][key] = tensor
    groups = [
        {**before, "params": fresh["params"]}
        for before, fresh in zip(base[0]["param_groups"], state["optimizer_state_dict"]["param_groups"], strict=True)
    ]
    state["optimizer_state_dict"] = {"state": entries, "param_groups": groups}
    optimizer.load_state_dict({rank: state})
    optimizer.checkpoint_event_epilogue()
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, meta[counter])


def _load_frozen(fragments: Sequence[dict[str, Tensor] | None], engine: Any, rank: int) -> None:
    """`fragments[r]`: saved rank r's flat pieces of what is not trained, by name; the last one is padded."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        here = parameter.ds_tensor.data
        whole = torch.cat([f[name].flatten() for f in fragments if f])[: parameter.ds_numel]
        part = whole[rank * here.numel() : (rank + 1) * here.numel()]
        here[: part.numel()].copy_(part)


def _read(directory: Path, pattern: str) -> Any:
    """Mapped, not read: a rank touches only the bytes it needs."""
    (path,) = directory.glob(pattern)
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
