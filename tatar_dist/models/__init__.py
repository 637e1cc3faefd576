"""Model families: all that is specific to one is in a module here, named by `model.family`.

A family module provides the class `Backbone` with the interface of `base.QwenVL`; to add a family, write that one file
and name it in the config.

    base.py         what the Qwen-VL families have in common
    qwen2_5_vl.py   Qwen2.5-VL
    qwen3_vl.py     Qwen3-VL, dense
    files.py        headers of a model directory's files, checked before anything starts
    costs.py        parameters, FLOPs and bytes by the sizes in config.json, and what a prompt's rows cost
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from tatar_dist.errors import UserError

if TYPE_CHECKING:
    from tatar_dist.models.base import QwenVL


def names() -> list[str]:
    """Return the names of all families: `model_type` in the config.json of a family's models."""
    return [m.name for m in pkgutil.iter_modules(__path__) if m.name not in ("base", "costs", "files")]


def family(name: str) -> type[QwenVL]:
    """Return the `Backbone` class of a family. Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(f"model.family={name!r}: known families are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}").Backbone
