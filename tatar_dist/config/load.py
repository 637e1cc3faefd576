"""Read a configuration: YAML files, then `key=value` words, later wins; unknown keys fail with the nearest name."""

from __future__ import annotations

import difflib
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from tatar_dist.assets import RECIPES, TINY_MODEL, locate, looked_in
from tatar_dist.config.schema import Config
from tatar_dist.errors import UserError


def known_keys(schema: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, leaves and sections."""
    import typing

    hints = typing.get_type_hints(schema)
    keys = []
    for f in fields(schema):
        keys.append(prefix + f.name)
        if is_dataclass(hints[f.name]):
            keys += known_keys(hints[f.name], prefix + f.name + ".")
    return keys


def _key_error(key: str, where: str) -> UserError:
    near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; sections are {', '.join(f.name for f in fields(Config))}"
    return UserError(f"{where}: unknown key {key!r}{hint}")


def _merge(base: Any, update: Any, where: str) -> Any:
    try:
        return OmegaConf.merge(base, update)
    except (ConfigKeyError, ConfigAttributeError) as e:
        raise _key_error(str(e.full_key or e.key), where) from None
    except OmegaConfBaseException as e:
        text = (e.msg or str(e)).splitlines()[0]
        raise UserError(f"{where}: key {e.full_key or e.key!r}: {text}") from None


def load_config(files: list[str], overrides: list[str], unused: tuple[str, ...] = ()) -> Config:
    """Merge schema defaults, `files` in order, then `overrides` (`key=value`); check; return.

    Keys in `unused` may stay without a value and are then "": a command that asks an endpoint has no model.path.

    Raises:
        UserError: missing file, broken YAML, unknown key, wrong type, or a rule of `check` violated.
    """
    conf: Any = OmegaConf.structured(Config)
    for name in files:
        path = locate(name)
        if not path.is_file():
            raise UserError(f"{name}: no such config file{looked_in(name)} (bundled: {', '.join(RECIPES)})")
        if path != Path(name):
            print(f"tatar-dist: {name}: not{looked_in(name)}, the bundled file is used", file=sys.stderr)
        try:
            loaded = OmegaConf.load(path)
        except Exception as e:  # YAML errors come in several classes; each says its line
            raise UserError(f"{name}: not valid YAML: {' '.join(str(e).split())}") from None
        conf = _merge(conf, loaded, name)
    for word in overrides:
        if "=" not in word:
            raise UserError(f"{word!r}: expected key=value (or --config FILE)")
        conf = _merge(conf, OmegaConf.from_dotlist([word]), word)
    for key in unused:
        if OmegaConf.is_missing(*_parent(conf, key)):
            OmegaConf.update(conf, key, "")
    missing = sorted(OmegaConf.missing_keys(conf))
    if missing:
        raise UserError(f"missing value for {', '.join(missing)}: set it in a config file or as {missing[0]}=…")
    from tatar_dist.config.rules import check as check_rules

    result: Config = OmegaConf.to_object(conf)  # type: ignore[assignment]
    if (bundled := locate(result.model.path)) == TINY_MODEL:
        result.model.path = str(bundled)  # any other stands as it was given: checkpoints compare it
    check_rules(result)
    return result


def _parent(conf: Any, key: str) -> tuple[Any, str]:
    """The section that holds a dotted key, and the key's last part."""
    section, _, last = key.rpartition(".")
    return (OmegaConf.select(conf, section) if section else conf), last
