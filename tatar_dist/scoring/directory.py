"""Configure scoring and serving from the directory of a checkpoint, an export or any model.

Family, dtype and context length come from config.json, image sizes from the processor; prompts from `prompts.yaml`
there or in a checkpoint's run, else configs/prompts.yaml; the answer length from the run or generation_config.json,
else the schema's default. Does not import torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tatar_dist.assets import CONFIGS, locate, looked_in
from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config, ModelConfig, RolloutConfig
from tatar_dist.config.validate import read_yaml
from tatar_dist.errors import UserError
from tatar_dist.models.files import check_adapter, check_files

PROMPTS = "prompts.yaml"
OWN_LIMIT = 16_384  # tokens of a picture by the processors of Qwen2.5-VL and Qwen3-VL: more than a prompt has here


def model_config(model: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Return the configuration for a model: settings from its directory, then `overrides`.

    Raises:
        UserError: no such directory, no model of a known family in it, or an unreadable file.
    """
    directory = locate(os.fspath(model))
    if not directory.is_dir():
        hint = "a run's newest model is in RUN/checkpoints/latest/model"
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", os.fspath(model)):
            hint += f"; to score with a model of the hub, first: hf download {model} --local-dir DIRECTORY"
        raise UserError(f"{model}: no such model directory{looked_in(model)}; {hint}")
    check_adapter(directory)
    settings = _json(directory / "config.json")
    newest = directory / "checkpoints/latest/model"
    if settings is None and newest.is_dir():
        raise UserError(f"{model}: a run directory; its newest model is {Path(model) / 'checkpoints/latest/model'}")
    if settings is None:
        raise UserError(f"{model}: no config.json in it, so it is not a Hugging Face model directory")
    kind = _family(directory, settings)
    low, high = _pixels(directory)
    dtype = settings.get("dtype") or settings.get("torch_dtype")
    text = settings.get("text_config") or settings
    words = {
        "model.path": json.dumps(str(directory)),  # quoted for YAML: a directory may be named 123 or a: b
        "model.family": kind,
        "model.dtype": "float32" if dtype == "float32" else ModelConfig.dtype,
        "model.min_pixels": low,
        "model.max_pixels": high,
        "data.prompts": json.dumps(str(_prompts(directory))),
        "data.iqa_fraction": 1.0,  # nothing is learned here: no rule about the length of what is rewarded
        "cluster.gpus_per_node": 0,
        "rollout.max_new_tokens": _answer_tokens(directory),
        "rollout.max_model_len": min(RolloutConfig.max_model_len, int(text.get("max_position_embeddings", 1 << 30))),
    }
    return load_config([], [*(f"{key}={value}" for key, value in words.items()), *overrides], unused=("output",))


def _family(directory: Path, settings: dict[str, Any]) -> str:
    from tatar_dist.models import names

    kind = str(settings.get("model_type"))
    if kind not in names():
        raise UserError(f"{directory}: model_type is {kind!r}; known families are {', '.join(names())}")
    check_files(directory, settings, trained=False)
    return kind


def _pixels(directory: Path) -> tuple[int, int]:
    """Return (minimum, maximum) pixels of a picture. Raises UserError if `directory` has none."""
    newest, older = (_json(directory / name) or {} for name in ("processor_config.json", "preprocessor_config.json"))
    settings = newest.get("image_processor") or older
    settings = settings if isinstance(settings, dict) else {}
    size = settings.get("size")
    size = size if isinstance(size, dict) else {}
    low = settings.get("min_pixels") or size.get("shortest_edge")
    high = settings.get("max_pixels") or size.get("longest_edge")
    if not (isinstance(low, int) and isinstance(high, int)):
        raise UserError(f"{directory}: no processor_config.json in it says how many pixels a picture may have")
    patch, merge = settings.get("patch_size", 14), settings.get("merge_size", 2)
    if not (isinstance(patch, int) and isinstance(merge, int)):
        raise UserError(
            f"{directory}: its processor has patch_size={patch!r} and merge_size={merge!r}: must be integers"
        )
    return low, high if high != OWN_LIMIT * (patch * merge) ** 2 else ModelConfig.max_pixels


def run_of(directory: Path) -> Path | None:
    """Return RUN of a model at RUN/checkpoints/step_000100/model; None for other directories."""
    parents = directory.resolve().parents
    return parents[2] if len(parents) > 2 and parents[1].name == "checkpoints" else None


def _prompts(directory: Path) -> Path:
    run = run_of(directory)
    places = [directory / PROMPTS, *([run / PROMPTS] if run else []), CONFIGS / PROMPTS]
    return next(p for p in places if p.is_file())


def _answer_tokens(directory: Path) -> int:
    """Return max_new_tokens of the run, else of generation_config.json, else of the schema."""
    run = run_of(directory)
    if run is not None and (run / "config.yaml").is_file():
        try:
            return read_yaml(run / "config.yaml", "config")["rollout"]["max_new_tokens"]
        except (KeyError, TypeError):
            raise UserError(f"{run / 'config.yaml'}: does not say rollout.max_new_tokens") from None
    generation = _json(directory / "generation_config.json") or {}
    return int(generation.get("max_new_tokens") or RolloutConfig.max_new_tokens)


def _json(file: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is no such file. Raises UserError if it cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: cannot be read: {' '.join(str(e).split())}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds no JSON object")
    return value
