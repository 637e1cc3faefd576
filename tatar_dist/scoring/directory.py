"""What a model directory says of how its model is to be asked: for scoring and for serving, where no run has a config.

In: a directory that training or `tatar-dist export` wrote, or any of a known family. Out: a `Config`. Family, dtype and
context come from config.json, sizes of pictures from the processor; the wording from `prompts.yaml` beside them or, for
a checkpoint's model, in its run, else configs/prompts.yaml; the length of an answer from the run or from
generation_config.json. No torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tatar_dist.assets import CONFIGS, locate, looked_in
from tatar_dist.config.load import load_config
from tatar_dist.config.schema import Config, ModelConfig, RolloutConfig
from tatar_dist.errors import UserError

PROMPTS = "prompts.yaml"
UNTOUCHED = 12_845_056  # pixels: what Qwen's own processors allow; nobody trained with it here, it fills a context
# file -> where it keeps the sizes of pictures, newest layout first
PROCESSORS = {"processor_config.json": "image_processor", "preprocessor_config.json": None}


def model_config(model: str | os.PathLike[str], overrides: Sequence[str] = (), extra: Sequence[str] = ()) -> Config:
    """The configuration to ask the model with: the directory's words, then `extra`, then the user's `overrides`.

    Raises:
        UserError: no directory, no model of a known family in it, or a file of it that cannot be read.
    """
    directory = locate(os.fspath(model))
    if not directory.is_dir():
        hint = "a run's newest model is in RUN/checkpoints/latest/model"
        raise UserError(f"{model}: no such model directory{looked_in(model)}; {hint}")
    settings = _json(directory / "config.json")
    if settings is None:
        raise UserError(f"{model}: no config.json in it, so it is not a Hugging Face model directory")
    kind = _family(directory, settings)
    low, high = _pixels(directory)
    dtype = settings.get("dtype") or settings.get("torch_dtype")
    text = settings.get("text_config") or settings
    words = {
        "model.path": _quoted(directory),
        "model.family": kind,
        "model.dtype": "float32" if dtype == "float32" else ModelConfig.dtype,
        "model.min_pixels": low,
        "model.max_pixels": ModelConfig.max_pixels if high == UNTOUCHED else high,
        "data.prompts": _quoted(_prompts(directory)),
        "data.iqa_fraction": 1.0,  # nothing is learned here: no rule about the length of what is rewarded
        "cluster.gpus_per_node": 0,
        "rollout.max_new_tokens": _answer_tokens(directory),
        "rollout.max_model_len": min(RolloutConfig.max_model_len, int(text.get("max_position_embeddings", 1 << 30))),
    }
    own = [f"{key}={value}" for key, value in words.items()]
    return load_config([], [*own, *extra, *overrides], unused=("output",))


def _family(directory: Path, settings: dict[str, Any]) -> str:
    from tatar_dist.models import names

    kind = str(settings.get("model_type"))
    if kind not in names():
        raise UserError(f"{directory}: model_type is {kind!r}; known families are {', '.join(names())}")
    if not any(directory.glob("*.safetensors")):
        raise UserError(f"{directory}: holds no *.safetensors weights")
    return kind


def _pixels(directory: Path) -> tuple[int, int]:
    """(least, most) pixels of a picture. Raises UserError where the directory does not tell."""
    for name, section in PROCESSORS.items():
        whole = _json(directory / name)
        found = whole.get(section) if whole and section else whole
        if not found:
            continue
        size = found.get("size") or {}
        try:
            return (
                int(found.get("min_pixels") or size["shortest_edge"]),
                int(found.get("max_pixels") or size["longest_edge"]),
            )
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{directory / name}: does not say how many pixels a picture has") from None
    raise UserError(f"{directory}: neither {' nor '.join(PROCESSORS)} in it, so sizes of pictures are unknown")


def run_of(directory: Path) -> Path | None:
    """The run that a checkpoint's model belongs to, RUN of RUN/checkpoints/step_000100/model; None for another."""
    parents = directory.resolve().parents
    return parents[2] if len(parents) > 2 and parents[1].name == "checkpoints" else None


def _prompts(directory: Path) -> Path:
    run = run_of(directory)
    places = [directory / PROMPTS, *([run / PROMPTS] if run else []), CONFIGS / PROMPTS]
    return next(p for p in places if p.is_file())


def _answer_tokens(directory: Path) -> int:
    """max_new_tokens of the run, of generation_config.json, or of the schema."""
    run = run_of(directory)
    if run is not None and (run / "config.yaml").is_file():
        import yaml

        try:
            return int(yaml.safe_load((run / "config.yaml").read_text())["rollout"]["max_new_tokens"])
        except (yaml.YAMLError, KeyError, TypeError, ValueError) as e:
            raise UserError(f"{run / 'config.yaml'}: does not say rollout.max_new_tokens: {e}") from None
    found = (_json(directory / "generation_config.json") or {}).get("max_new_tokens")
    return int(found) if found else RolloutConfig.max_new_tokens


def _json(file: Path) -> dict[str, Any] | None:
    """None when there is no such file. Raises UserError when it cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: cannot be read: {' '.join(str(e).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds no object")
    return found


def _quoted(path: Path) -> str:
    """As a value of `key=value`, which is read as YAML: a directory may be called 123 or a: b."""
    return json.dumps(str(path))
