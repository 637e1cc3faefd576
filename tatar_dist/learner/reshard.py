"""Cut a ZeRO-3 checkpoint of M ranks anew for N: same master weights and optimizer state.

ZeRO-3 cuts every parameter on its own: rank r of M holds elements [r k, (r + 1) k) with k = ceil(numel / M), padded
with zeros, and concatenates its pieces, in the order of `param_shapes`, into one flat tensor a sub-group; optimizer
states that have the size of that tensor are cut alike. (deepspeed/runtime/zero/stage3.py, 0.19; its converter to
"universal" checkpoints reads the same layout, but writes a file a parameter and state, and knows Adam only.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Shapes = Sequence[dict[str, Any]]  # a sub-group: parameter name -> shape


def recut(flats: Sequence[Sequence[Tensor]], old: Shapes, new: Shapes, rank: int, ranks: int) -> list[Tensor]:
    """Return one flat tensor per sub-group of `new`: the elements that `rank` of `ranks` holds.

    Args:
        flats: `flats[r][g]` is the flat tensor that saved rank r holds of sub-group g of `old`.

    Raises:
        RuntimeError: a parameter's number of elements differs between `old` and `new`.
    """
    saved: dict[str, tuple[int, list[Tensor]]] = {}  # name -> elements, each saved rank's piece
    for group, parameters in enumerate(old):
        offset = 0
        for name, shape in parameters.items():
            size = math.ceil(math.prod(shape) / len(flats))
            saved[name] = math.prod(shape), [flat[group][offset : offset + size] for flat in flats]
            offset += size
    cut = []
    for parameters in new:
        parts = []
        for name, shape in parameters.items():
            numel, pieces = saved[name]
            if numel != math.prod(shape):
                raise RuntimeError(f"{name} has {math.prod(shape)} elements here, {numel} in the checkpoint")
            size = math.ceil(numel / ranks)
            part = torch.zeros(size, dtype=pieces[0].dtype)
            first, last = rank * size, min((rank + 1) * size, numel)
            for r, piece in enumerate(pieces):
                start, end = max(first, r * len(piece)), min(last, (r + 1) * len(piece))
                if start < end:
                    part[start - first : end - first] = piece[start - r * len(piece) : end - r * len(piece)]
            parts.append(part)
        cut.append(torch.cat(parts))
    return cut


def load(directory: Path, saved_ranks: int, engine: Any, rank: int, ranks: int) -> None:
    """Load the DeepSpeed checkpoint of `saved_ranks` ranks into a new ZeRO-3 engine. Collective.

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
    entries: list[dict[str, Any]] = [{} for _ in new]
    for key, value in base[0]["state"].get(0, {}).items():
        if isinstance(value, Tensor) and value.numel() == zero[0][flat][0].numel():
            flats = [[b["state"][g][key] for g in range(len(old))] for b in base]
            values = recut(flats, old, new, rank, ranks)
        else:
            values = [deepcopy(value) for _ in new]  # the number of steps: the same in all, counted by each
        for entry, v in zip(entries, values, strict=True):
            entry[key] = v
    groups = [
        {**before, "params": fresh["params"]}
        for before, fresh in zip(base[0]["param_groups"], state["optimizer_state_dict"]["param_groups"], strict=True)
    ]
    state["optimizer_state_dict"] = {"state": dict(enumerate(entries)), "param_groups": groups}
    optimizer.load_state_dict({rank: state})
    optimizer.checkpoint_event_epilogue()
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, meta[counter])


def _load_frozen(fragments: Sequence[dict[str, Tensor] | None], engine: Any, rank: int) -> None:
    """Load what is not trained; `fragments[r]`: rank r's flat pieces by name, the last padded."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        here = parameter.ds_tensor.data
        full = torch.cat([f[name].flatten() for f in fragments if f])[: parameter.ds_numel]
        part = full[rank * here.numel() : (rank + 1) * here.numel()]
        here[: part.numel()].copy_(part)


def _read(directory: Path, pattern: str) -> Any:
    """Map the file, so that a rank touches only the bytes it needs."""
    (path,) = directory.glob(pattern)
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
