"""Export the trained model of a run as a Hugging Face directory that loads without our code.

The directory is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tatar_dist.assets import looked_in
from tatar_dist.config.load import load_config
from tatar_dist.errors import UserError
from tatar_dist.prompts.answer import Prompts
from tatar_dist.run.checkpoints import CheckpointRef, finished
from tatar_dist.run.directory import PROMPTS
from tatar_dist.run.files import first_damage, write_files
from tatar_dist.scoring import card as model_card

if TYPE_CHECKING:
    import torch

    from tatar_dist.models.base import QwenVL

SHARD_SIZE = "5GB"
OTHER_FILES = 64 << 20  # bytes at most of tokenizer, configs and card
WEIGHTS = (".safetensors", ".safetensors.index.json")


def model_of(run: str | Path) -> Path:
    """Return the newest finished checkpoint's model path. Raises UserError if there is none."""
    return checkpoint_of(run)[0] / "model"


def checkpoint_of(run: str | Path, step: int | None = None) -> CheckpointRef:
    """Return a finished checkpoint: `step`'s or the newest. Raises UserError if there is none."""
    steps, damaged = [], list[str]()
    for directory, state in finished(Path(run), damaged):
        if step is None or state["step"] == step:
            return directory, state
        steps.append(str(state["step"]))
    if not steps:
        there = "" if Path(run).is_dir() else f": no such directory{looked_in(run)}"
        wrong = f", only damaged ones: {'; '.join(damaged)}" if damaged else ""
        raise UserError(f"{run}: no finished checkpoint{there}{wrong}")
    raise UserError(f"--step {step}: {run} has no such finished checkpoint; it has {', '.join(reversed(steps))}")


def run(
    run_directory: str | Path,
    output: str | Path,
    *,
    step: int | None = None,
    shard_size: str = SHARD_SIZE,
    dtype: str | None = None,
    evaluation: str | Path | None = None,
) -> Path:
    """Export to `output`, absent or an empty directory other than the current; return its path.

    Args:
        step: training step of the checkpoint; None = the newest.
        shard_size: maximal size of a weights file, for example 5GB or 500MB; a larger tensor gets a file of its own.
        dtype: bfloat16 or float32; None = as trained.
        evaluation: directory of an evaluation of this checkpoint; None = the newest one beside the run, if any.

    Raises:
        UserError: no finished checkpoint, a damaged one, a bad option, too little disk space, or no write access.
    """
    from tatar_dist.models import family

    target, source = Path(output), Path(run_directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{output}: exists and is not an empty directory")
    if target.exists() and target.samefile("."):  # the rename would replace the working directory
        raise UserError(f"--output {output}: is the directory that you are in: name a new one, or go to another first")
    checkpoint, state = checkpoint_of(source, step)
    files = {name: facts for name, facts in state["files"].items() if name.startswith("model/")}
    if damage := first_damage(checkpoint, files, hashes=True):
        raise UserError(f"{checkpoint}: damaged: {damage}: give another one with --step")
    config = load_config([str(source / "config.yaml")], [])
    model = checkpoint / "model"
    # runs of an older version kept only the file's name
    prompts = Prompts.load(source / PROMPTS if (source / PROMPTS).exists() else config.data.prompts)
    tensors = _tensors(model, dtype)
    _require_room(target, sum(t.nbytes for t in tensors.values()) + OTHER_FILES)
    backbone = family(config.model.family)(replace(config.model, path=str(model)))
    facts = model_card.facts(source, checkpoint, state, config, evaluation)
    facts |= {
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        "max_new_tokens": config.rollout.max_new_tokens,
        "max_model_len": config.rollout.max_model_len,
        "forbidden": backbone.forbidden_ids(),
        "prompts": prompts,
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
            beside = Path(name)
            write_weights = partial(_write_weights, tensors=tensors, shard_size=shard_size)
            write_others = partial(_write_others, model=model, backbone=backbone, prompts=prompts, facts=facts)
            write_files(beside, [(".", write_weights), (".", write_others)])  # also syncs them, and names a full disk
            beside.chmod(0o755)
            os.rename(beside, target)  # also over an empty directory
    except OSError as e:
        raise UserError(f"{output}: cannot write: {e.strerror or e}") from e
    return target


def _tensors(model: Path, dtype: str | None) -> dict[str, torch.Tensor]:
    """Return name -> tensor in the dtype to write, mapped from the file unless converted.

    Raises UserError for a bad dtype or no weights.
    """
    import torch
    from safetensors.torch import load_file

    if dtype not in (None, "bfloat16", "float32"):
        raise UserError(f"--dtype {dtype}: must be bfloat16 or float32")
    tensors = {name: t for path in model.glob("*.safetensors") for name, t in load_file(path).items()}
    if not tensors:
        raise UserError(f"{model}: no *.safetensors weights in it")
    if dtype:
        wanted = getattr(torch, dtype)
        tensors = {name: t.to(wanted) if t.is_floating_point() else t for name, t in tensors.items()}
    return tensors


def _require_room(target: Path, needed: int) -> None:
    """Raise UserError if the disk of `target` has fewer than `needed` bytes free."""
    existing = next(p for p in (target, *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(f"{target}: needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free")


def _write_others(directory: Path, model: Path, backbone: QwenVL, prompts: Prompts, facts: dict[str, Any]) -> None:
    """Write all files but the weights."""
    from transformers import GenerationConfig

    for path in model.iterdir():
        if not path.name.endswith(WEIGHTS):
            shutil.copyfile(path, directory / path.name)
    settings = {"dtype": "", **json.loads((model / "config.json").read_text())}
    (directory / "config.json").write_text(json.dumps(_with_dtype(settings, facts["dtype"]), indent=2) + "\n")
    generation = GenerationConfig(  # as in rollout/engine.py: greedy, up to the end of the turn
        do_sample=False,
        max_new_tokens=facts["max_new_tokens"],
        eos_token_id=backbone.end_of_turn(),
        pad_token_id=backbone.tokenizer.pad_token_id,
        suppress_tokens=facts["forbidden"],
    )
    (directory / "generation_config.json").write_text(generation.to_json_string())
    (directory / PROMPTS).write_text(prompts.to_yaml(), encoding="utf-8")
    (directory / model_card.NAME).write_text(model_card.render(facts), encoding="utf-8")


def _write_weights(directory: Path, tensors: dict[str, torch.Tensor], shard_size: str) -> None:
    """Write the weights in shards, with their index. Raises UserError for a bad size."""
    from huggingface_hub import save_torch_state_dict

    try:
        save_torch_state_dict(tensors, directory, max_shard_size=shard_size)
    except ValueError as e:
        raise UserError(f"--shard-size {shard_size}: expected a size such as 5GB or 500MB: {e}") from None
    for path in directory.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors makes files that only their owner may read


def _with_dtype(settings: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a copy of config.json with the weights' dtype, also in the sections of model parts."""
    copy = {k: _with_dtype(v, dtype) if isinstance(v, dict) else v for k, v in settings.items()}
    return copy | dict.fromkeys(copy.keys() & {"dtype", "torch_dtype"}, dtype)
