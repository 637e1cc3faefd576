"""Read YAML files, then `key=value` words; later wins. Unknown keys fail, with a suggestion."""

from __future__ import annotations

import sys
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from tatar_dist.assets import RECIPES, TINY_MODEL, locate, looked_in
from tatar_dist.config import foreign
from tatar_dist.config.rules import check
from tatar_dist.config.schema import Config
from tatar_dist.config.validate import fault, first, near
from tatar_dist.errors import UserError


def known_keys(schema: Any = Config, prefix: str = "") -> list[str]:
    """Return every dotted key of the schema, leaves and sections."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        keys.append(prefix + name)
        if is_dataclass(hint):
            keys += known_keys(hint, prefix + name + ".")
    return keys


def load_config(files: list[str], overrides: list[str], unused: tuple[str, ...] = ()) -> Config:
    """Merge schema defaults, `files` in order, then `overrides` (`key=value`); check; return.

    Keys in `unused` may stay without a value and are then "": a command that asks an endpoint has no model.path.

    Raises:
        UserError: missing file, broken YAML, unknown key, wrong type, or a rule of `check` violated.
    """
    layers: list[tuple[str, Any]] = []
    merged: Any = OmegaConf.create(asdict(Config()))
    for n, where in enumerate([*files, *overrides]):
        if n >= len(files) and "=" not in where:
            raise UserError(f"{where!r}: expected key=value (or --config FILE)")
        try:
            layer = _file(where) if n < len(files) else OmegaConf.from_dotlist([where])
            merged = OmegaConf.merge(merged, layer)
        except (TypeError, OmegaConfBaseException, yaml.YAMLError) as e:
            raise UserError(f"{where}: not keys and values of the config: {' '.join(str(e).split())}") from None
        layers.append((where, layer))
    try:
        missing = OmegaConf.missing_keys(merged)
    except OmegaConfBaseException as e:  # an interpolation of a key that is not there
        raise UserError(f"key {e.full_key!r}: {str(e.msg).splitlines()[0]}") from None
    for key in missing.intersection(unused):
        OmegaConf.update(merged, key, "")
    config = _validated(merged, layers, files)  # first: a mistyped key explains a missing value
    if wanted := sorted(missing.difference(unused)):
        file = files[-1] if files else "a config file"
        raise UserError(f"missing value for {', '.join(wanted)}: set it in {file} or as {wanted[0]}=…")
    if (bundled := locate(config.model.path)) == TINY_MODEL:
        # any other stands as it was given: checkpoints compare it
        config = replace(config, model=replace(config.model, path=str(bundled)))
    check(config)
    return config


def _file(name: str) -> Any:
    path = locate(name)
    if not path.is_file():
        raise UserError(f"{name}: no such config file{looked_in(name)} (bundled: {', '.join(RECIPES)})")
    if path != Path(name):
        print(f"tatar-dist: {name}: not{looked_in(name)}, the bundled file is used", file=sys.stderr)
    try:
        return OmegaConf.load(path)  # an empty file holds no keys; dates are text, as in key=value
    except Exception as e:  # YAML errors come in several classes; each says its line
        raise UserError(f"{name}: not valid YAML: {' '.join(str(e).split())}") from None


def _validated(merged: Any, layers: list[tuple[str, Any]], files: list[str]) -> Config:
    """Return the merged layers as a `Config`. An error names the last layer that gives the key."""
    try:
        return TypeAdapter(Config).validate_python(OmegaConf.to_container(merged, resolve=True))
    except ValidationError as e:
        error = first(e)
        key = ".".join(str(part) for part in error["loc"])
        where = next((w for w, layer in reversed(layers) if _gives(layer, error["loc"])), "")
        if error["type"] == "unexpected_keyword_argument":
            known = foreign.ours(key, error["input"]) or near(key, known_keys())
            raise UserError(f"{where}: unknown key {key!r}{known}") from None
        file = f"{where}: " if where in files else ""  # a word is its key and value
        raise UserError(file + fault(error, Config)) from None


def _gives(layer: Any, path: tuple[int | str, ...]) -> bool:
    for part in path:
        if not OmegaConf.is_dict(layer) or part not in layer:
            return OmegaConf.is_list(layer)
        layer = layer._get_node(part)
    return True
