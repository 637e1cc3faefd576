"""Check the files of a model directory before anything is started on them. No torch.

`check_files` reads headers only, so it takes milliseconds for a model of any size. Whether the tensors are those that
the model class expects is known to transformers: `QwenVL.check_weights`.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tatar_dist.errors import UserError

INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs"
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
TOKENIZERS = ("tokenizer.json", "vocab.json")
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
OTHERS = ("tokenizer_config.json", "chat_template.json", "generation_config.json")
COPY = "copy it from the model that this one was made from"
PICKLED = ("*.bin", "*.pt", "*.pth")


def check_files(directory: Path, settings: dict[str, Any], trained: bool) -> None:
    """Check weights, tokenizer, processor and chat template; `settings` are its config.json.

    Without its tokenizer's file transformers makes an empty one, which encodes other tokens.

    Args:
        trained: the model will be trained, so its weights must not be quantised.

    Raises:
        UserError: quantised weights; a shard that is absent, cut off or a Git LFS pointer; weights in pickle files
            only; no tokenizer, image processor or chat template, or one that is damaged.
    """
    quantised = settings.get("quantization_config")
    if quantised and trained:
        method = quantised.get("quant_method", "an unnamed method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"{directory}: its weights are quantised ({method}); quantised weights cannot be trained or pushed: name "
            "the model in bfloat16 that they were made from"
        )
    for file in shards(directory):
        check_shard(file)
    found = {name: _json(directory / name) for name in (*TOKENIZERS, *PROCESSORS, *OTHERS)}
    for what, names in (("tokenizer", TOKENIZERS), ("image processor", PROCESSORS)):
        if not any(found[name] for name in names):
            raise UserError(f"{directory}: no {what} ({' or '.join(names)}): {COPY}")
    template = directory / TEMPLATES[0]
    if template.is_file() and b"messages" not in template.read_bytes():
        raise UserError(f"{template}: not a chat template, it reads no messages: {COPY}")
    if not template.is_file() and not any((directory / name).exists() for name in TEMPLATES[1:]):
        if not any(found[name].get("chat_template") for name in (OTHERS[0], PROCESSORS[0])):
            places = "chat_template.jinja, or chat_template in tokenizer_config.json"
            raise UserError(f"{directory}: no chat template ({places}): {COPY}")


def shards(directory: Path) -> list[Path]:
    """Return a model directory's weight files. Raises UserError if one of the index is absent."""
    index = directory / INDEX
    if not index.exists():
        found = sorted(f for f in directory.glob("*.safetensors") if not f.name.startswith("."))
        if not found:
            pickled = sorted(f.name for pattern in PICKLED for f in directory.glob(pattern))
            hint = (
                f", only {pickled[0]}: save it again with save_pretrained(safe_serialization=True)" if pickled else ""
            )
            raise UserError(f"{directory}: holds no *.safetensors weights{hint}")
        return found
    names = sorted(set(_json(index).get("weight_map", {}).values()))
    if not names:
        raise UserError(f"{index}: names no weights (weight_map)")
    absent = [n for n in names if not (directory / n).is_file()]
    if absent:
        raise UserError(
            f"{directory}: {len(absent)} of {len(names)} weight files that {INDEX} names are absent ({absent[0]}): "
            "fetch the model again"
        )
    return [directory / n for n in names]


def check_shard(file: Path) -> None:
    """Raise UserError if a file is no whole safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(len(POINTER))
        if start == POINTER:
            raise UserError(f"{file}: a Git LFS pointer, not the weights: run `git lfs pull` in its directory")
        f.seek(0)
        length = struct.unpack("<Q", start[:8])[0] if size >= 8 else 0
        if not 2 <= length <= size - 8:
            raise UserError(f"{file}: not a safetensors file, or cut off after {size} bytes: fetch it again")
        f.seek(8)
        try:
            header: dict[str, Any] = json.loads(f.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            end = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError) as e:
            raise UserError(f"{file}: not a safetensors file: its header is damaged: fetch it again") from e
    if size < end:
        raise UserError(f"{file}: cut off after {size} of {end} bytes: fetch it again")


def check_adapter(directory: Path) -> None:
    """Raise UserError if `directory` holds an adapter (PEFT) rather than a model."""
    file = directory / "adapter_config.json"
    if file.exists() and not (directory / "config.json").exists():
        base = _json(file).get("base_model_name_or_path") or "its base model"
        raise UserError(
            f"{directory}: an adapter of {base}, not a model: merge it first, with PEFT's merge_and_unload() and "
            "save_pretrained(), and save the processor of the base model beside it"
        )


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as e:
        raise UserError(f"{file}: not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds no JSON object")
    return value
